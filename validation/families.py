"""Checks of published runs by family: errors of time, coverage of intervals, and the spread between releases.

Layouts weigh equally: the mean over the rows of a layout counts once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from simulator.campaign import uncertainty
from simulator.campaign.uncertainty import SignedError

GROUP = "runs"
AT_SCALE = "MoE at 64 or more accelerators"


def summary(checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By family, and by all complete rows of MoE runs at 64 or more accelerators: errors of time, in percent."""
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for check in checks:
        if check["group"] == GROUP and check["time_error_percent"] is not None:
            families[check["family"]].append(check)
            if check["moe"] and check["accelerators"] >= 64:
                families[AT_SCALE].append(check)
    errors = tuple(signed_errors(checks))
    return {family: _summary(rows, errors) for family, rows in sorted(families.items())}


def signed_errors(checks: Iterable[Mapping[str, Any]]) -> list[SignedError]:
    """Mean log error of every layout with complete rows, in the order of their names."""
    by_layout: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for check in checks:
        if check["complete"] and check["time_error_percent"] is not None:
            by_layout[check["layout"]].append(check)
    found = []
    for layout, rows in sorted(by_layout.items()):
        log_error = float(np.mean([math.log1p(row["time_error_percent"] / 100.0) for row in rows]))
        first = rows[0]
        shown = (first["hardware"], first["vendor"], first["moe"], first["accelerators"])
        found.append(SignedError(layout, *shown, round(log_error, 5)))
    return found


def release_spread(checks: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How far measurements of one layout lie apart that differ in the software's release alone: largest over least - 1.

    By layout, in percent: the noise floor of reality. Rows of one prediction and several measurements.
    """
    measured: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for check in checks:
        if check["group"] == GROUP and check["time_error_percent"] is not None and check["reached"]:
            same = (check["layout"], check["name"].rpartition(": ")[2], round(check["reached"], 6))
            measured[same].append(check["expected"])
    return {
        f"{layout}: {quantity}": 100.0 * (max(some) / min(some) - 1.0)
        for (layout, quantity, _), some in sorted(measured.items())
        if len(some) > 1
    }


def _summary(rows: Sequence[dict[str, Any]], errors: tuple[SignedError, ...]) -> dict[str, Any]:
    complete = [row for row in rows if row["complete"]]
    open_ = [row for row in rows if not row["complete"]]
    result: dict[str, Any] = {"rows": len(rows), "layouts": len({row["layout"] for row in rows})}
    signed = _by_layout(complete, "time_error_percent")
    size = np.array([float(np.mean(np.abs(values))) for values in signed.values()])
    result["complete_layouts"] = len(size)
    if len(size):
        result |= {
            "mape": float(size.mean()),
            "median": float(np.median(size)),
            "p90": float(np.quantile(size, 0.9)),
            "worst": float(max(abs(row["time_error_percent"]) for row in complete)),
            "bias": float(np.mean([np.mean(values) for values in signed.values()])),
        }
    based = _by_layout(rows, "baseline_error_percent")
    if based:
        result["baseline_mape"] = float(np.mean([np.mean(np.abs(values)) for values in based.values()]))
    if open_:
        result["inside_range"] = float(np.mean([bool(row["ok"]) for row in open_]))
        result["median_range_width_percent"] = float(np.median([row["range_width_percent"] for row in open_]))
    inside, asked = uncertainty.coverage(errors, frozenset(signed))
    result["interval_coverage"] = inside / asked if asked else None
    return result


def _by_layout(rows: Sequence[dict[str, Any]], key: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row[key] is not None:
            found[row["layout"]].append(row[key])
    return found


__all__ = ["AT_SCALE", "GROUP", "release_spread", "signed_errors", "summary"]
