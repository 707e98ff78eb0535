"""Published runs in a terminal: errors by family, every MoE run, contrasts, and the worst misses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from simulator.report.tables import number, pairs_table

Check = Mapping[str, Any]
MISSES = 10


def runs_view(
    checks: Sequence[Check],
    summary: Mapping[str, Mapping[str, Any]],
    ablation: Mapping[str, Mapping[str, float]] | None = None,
) -> RenderableType:
    """All of ``moesim validate --runs``; ``ablation``: errors without parts of the physics, by family."""
    timed = [check for check in checks if check["time_error_percent"] is not None]
    memory = [check for check in checks if check["group"] == "runs" and _is_memory(check)]
    parts: list[RenderableType] = [_families(summary)]
    moe = [check for check in timed if check["moe"]]
    if moe:
        parts.append(_rows("MoE runs", moe))
    contrasts = [check for check in checks if check["group"] == "contrasts"]
    if contrasts:
        parts.append(_contrasts(contrasts))
    if memory:
        parts.append(_rows("Memory", memory))
    if ablation:
        parts.append(_without(ablation))
    missed = sorted((check for check in timed if check["ok"] is False), key=_distance, reverse=True)[:MISSES]
    if missed:
        parts.append(_rows(f"The {len(missed)} worst misses", missed))
    refused = [check for check in checks if check["reached"] is None]
    if refused:
        parts.append(_rows("Not simulated", refused))
    met = sum(check["ok"] is True for check in checks)
    judged = sum(check["ok"] is not None for check in checks)
    parts.append(Text(f"{met} of {judged} are met; all rows: --json"))
    return Group(*parts)


def _without(ablation: Mapping[str, Mapping[str, float]]) -> RenderableType:
    names = list(dict.fromkeys(part for row in ablation.values() for part in row))
    rows = [(family, *(_percent(row.get(name)) for name in names)) for family, row in ablation.items()]
    heads = ("family", *(name if name == "full" else f"without {name}" for name in names))
    return pairs_table("MAPE of complete rows without parts of the physics", rows, *heads)


def _families(summary: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    rows = [
        (
            family,
            f"{each['layouts']}",
            _percent(each.get("mape")),
            _percent(each.get("median")),
            _percent(each.get("p90")),
            _percent(each.get("bias"), signed=True),
            _percent(each.get("baseline_mape")),
            _share(each.get("inside_range")),
            _percent(each.get("median_range_width_percent")),
            _share(each.get("interval_coverage")),
        )
        for family, each in summary.items()
    ]
    heads = ("family", "layouts", "MAPE", "median", "p90", "bias", "constant MFU", "in range", "width", "in interval")
    return pairs_table("Errors of the step time by family (complete rows; layouts weigh equally)", rows, *heads)


def _rows(title: str, checks: Sequence[Check]) -> RenderableType:
    rows = [
        (
            check["name"],
            number(check["expected"], check["unit"]),
            "refused" if check["reached"] is None else number(check["reached"], check["unit"]),
            _range(check),
            _percent(check["error_percent"], signed=True),
            _percent(check["baseline_error_percent"], signed=True),
            {True: "met", False: "MISSED", None: ""}[check["ok"]],
        )
        for check in checks
    ]
    heads = ("run", "published", "predicted", "range", "error", "constant MFU", "")
    return pairs_table(title, rows, *heads)


def _contrasts(checks: Sequence[Check]) -> RenderableType:
    rows = [
        (
            check["name"],
            number(check["expected"], check["unit"]),
            number(check["reached"], check["unit"]),
            _range(check),
            number(check["tolerance"], check["unit"]),
            {True: "met", False: "MISSED", None: ""}[check["ok"]],
        )
        for check in checks
    ]
    return pairs_table("Contrasts", rows, "two runs", "published", "predicted", "range", "within", "")


def _is_memory(check: Check) -> bool:
    return check["unit"] in ("GiB", "GB")


def _distance(check: Check) -> float:
    return abs(float(check["time_error_percent"]))


def _range(check: Check) -> str:
    if check["range"] is None:
        return ""
    low, high = check["range"]
    return f"{low:.4g} to {high:.4g}"


def _percent(value: float | None, *, signed: bool = False) -> str:
    return "" if value is None else f"{value:+.1f} %" if signed else f"{value:.1f} %"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100.0 * value:.0f} %"


__all__ = ["runs_view"]
