"""What ``moesim validate --runs --write`` leaves behind: docs/accuracy.md with its figure, and the signed errors.

The page is written from the checks alone. The signed errors go into :mod:`simulator.campaign.uncertainty`, one for
each layout with a complete row, and with them fingerprints of the evidence and of the profiles; a test compares these
with the files, so that a page that no longer belongs to the code is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from simulator.campaign import uncertainty
from simulator.campaign.uncertainty import SignedError
from validation.evidence import FOLDER, sources
from validation.families import release_spread, signed_errors

ROOT = Path(__file__).parent.parent
PAGE, FIGURE = ROOT / "docs" / "accuracy.md", ROOT / "docs" / "accuracy.svg"
PROFILES = ROOT / "hardware_profiles"
Check = Mapping[str, Any]
_INTRODUCTION = """\
Written by `moesim validate --runs --write`. Nothing here is judged on what it was fitted on: kernel curves come from
kernel tables, and the stack term of each run from the *other* layouts of its stack
([decision 8](decisions/0008-the-stack-term.md)). A third of the layouts is set aside and not on this page
([evidence](evidence.md)). Errors are of the step time; positive means predicted slower.""".splitlines()


Ablation = Mapping[str, Mapping[str, float]]


def write(
    checks: Sequence[Check], summary: Mapping[str, Mapping[str, Any]], ablation: Ablation | None = None
) -> list[Path]:
    """Write the page, its figure and the signed errors; ``ablation``: errors by family without parts."""
    errors = signed_errors(checks)
    rows = [vars(each) for each in errors]
    record = {"fingerprints": fingerprints(), "rows": _sample(checks), "layouts": rows}
    uncertainty.FILE.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    uncertainty.signed_errors.cache_clear()
    PAGE.write_text("\n".join(_page(checks, summary, errors, ablation or {})) + "\n", "utf-8")
    _draw(checks)
    return [PAGE, FIGURE, uncertainty.FILE]


def fingerprints() -> dict[str, str]:
    """SHA-256 of all evidence files and of all hardware profiles."""
    return {
        folder.name: hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.yaml")))).hexdigest()
        for folder in (FOLDER, PROFILES)
    }


def _sample(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """One row of each source with its prediction, for the test that predicts some of them again."""
    seen: dict[str, dict[str, Any]] = {}
    for check in checks:
        source = check["layout"].split("/")[0]
        if check["complete"] and check["time_error_percent"] is not None and check["role"] == "fit":
            row = {key: check[key] for key in ("name", "reached", "gap_fraction", "issue_s")}
            seen.setdefault(source, row)
    return list(seen.values())


def _page(
    checks: Sequence[Check],
    summary: Mapping[str, Mapping[str, Any]],
    errors: Sequence[SignedError],
    ablation: Ablation,
) -> Iterator[str]:
    yield "# Accuracy: predictions against published runs"
    yield ""
    yield from _INTRODUCTION
    yield ""
    yield "![Predicted against published step time](accuracy.svg)"
    yield ""
    for part in (
        _families(summary),
        _interval(summary, errors),
        _misses(checks),
        _ablation(ablation),
        _stacks(checks),
        _releases(checks),
        _runs(checks),
        _contrasts(checks),
        _memory(checks),
    ):
        yield from part


def _families(summary: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from _table(
        ["family", "layouts", "MAPE", "median", "p90", "bias", "constant MFU", "inside range", "width", "in interval"],
        (
            [
                family,
                str(each["layouts"]),
                *(_percent(each.get(key)) for key in ("mape", "median", "p90", "bias", "baseline_mape")),
                _share(each.get("inside_range")),
                _percent(each.get("median_range_width_percent")),
                _share(each.get("interval_coverage")),
            ]
            for family, each in summary.items()
        ),
    )
    yield ""
    yield "Constant MFU: what the mean MFU of the family's other layouts gives. Inside range: incomplete rows whose"
    yield "measurement lies inside the predictions over all swept values and over the middle half of the stack terms of"
    yield "the other layouts, with the median width of that range. In interval: see below."


def _interval(summary: Mapping[str, Mapping[str, Any]], errors: Sequence[SignedError]) -> Iterator[str]:
    inside, asked = uncertainty.coverage(tuple(errors))
    if not asked:
        return
    low, high = binomtest(inside, asked).proportion_ci(0.95)
    yield ""
    yield "## Interval"
    yield ""
    yield f"The 80 % interval that an estimate prints, formed for every layout from all others, holds {inside} of"
    yield f"{asked} measurements: {100 * inside / asked:.0f} % (95 % binomial interval {100 * low:.0f} to"
    yield f"{100 * high:.0f} %). It does not cover failures and restarts, data loading, layouts that nobody tuned,"
    yield "or hardware far from all of these."


def _misses(checks: Sequence[Check]) -> Iterator[str]:
    """The worst rows, one of each layout, with what their time is made of and what could explain them."""
    missed = [check for check in checks if check["ok"] is False and check["time_error_percent"] is not None]
    worst: dict[str, Check] = {}
    for check in sorted(missed, key=lambda check: -abs(math.log1p(check["time_error_percent"] / 100.0))):
        worst.setdefault(check["layout"], check)
    yield ""
    yield "## The ten worst misses"
    yield ""
    seen: dict[str, str] = {}  # where a reason was given first
    rows = []
    for check in list(worst.values())[:10]:
        name, reason = check["name"].rpartition(": ")[0], " ".join((check["reason"] or "").split())
        terms = ", ".join(f"{term} {share:.0f} %" for term, share in (check["terms_percent"] or {}).items())
        first = seen.setdefault(reason, name)
        rows.append([name, f"{check['time_error_percent']:+.1f} %", terms, reason if first == name else f"as {first}"])
    yield from _table(["run", "error of time", "largest terms of the prediction", "what could explain it"], rows)


def _ablation(ablation: Ablation) -> Iterator[str]:
    if not ablation:
        return
    parts = list(dict.fromkeys(part for row in ablation.values() for part in row))
    yield ""
    yield "## Without parts of the physics"
    yield ""
    yield "MAPE of the complete rows: with everything; with one efficiency for every shape; with all communication"
    yield "exposed; with every expert equally likely; without the stack term. For the other columns it is fitted again."
    yield ""
    yield from _table(
        ["family", *parts],
        ([family, *(_percent(row.get(part)) for part in parts)] for family, row in ablation.items()),
    )


def _stacks(checks: Sequence[Check]) -> Iterator[str]:
    gaps: dict[str, list[float]] = defaultdict(list)
    for check in checks:
        if check["time_error_percent"] is not None:
            gaps[check["stack"]].append(check["gap_fraction"])
    yield ""
    yield "## Stack terms"
    yield ""
    yield "Idle and unmodelled time as a share of compute, each run's from the other layouts of its stack:"
    yield ""
    yield from _table(
        ["stack", "rows", "from", "to"],
        ([name, str(len(some)), f"{min(some):.3f}", f"{max(some):.3f}"] for name, some in sorted(gaps.items())),
    )


def _releases(checks: Sequence[Check]) -> Iterator[str]:
    spread = release_spread(checks)
    if not spread:
        return
    yield ""
    yield "## Releases of the same software"
    yield ""
    yield "One layout measured under several releases, largest over least: the layout alone cannot tell more."
    yield ""
    yield from _table(["layout", "spread"], ([name, _percent(value)] for name, value in spread.items()))


def _runs(checks: Sequence[Check]) -> Iterator[str]:
    yield ""
    yield "## Runs"
    timed = [check for check in checks if check["time_error_percent"] is not None]
    for source in sources():
        rows = [check for check in timed if check["layout"].startswith(f"{source.name}/")]
        if not rows:
            continue
        yield ""
        yield f"### {source.name}"
        yield ""
        yield f"[{source.source.title}]({source.source.url}). {' '.join(source.rule.split())}"
        for each in source.misses:
            yield ""
            yield f"Misses of {', '.join(each.of)}: {' '.join(each.why.split())}"
        yield ""
        shown = rows if len(rows) <= 40 else sorted(rows, key=lambda row: -abs(row["time_error_percent"]))[:15]
        if len(shown) < len(rows):
            yield f"The 15 of {len(rows)} rows that are farthest off:"
            yield ""
        yield from _table(
            ["run", "published", "predicted", "range", "error of time", "constant MFU", "engine"],
            (
                [
                    check["name"].split("/", 1)[1],
                    f"{check['expected']:.5g} {check['unit']}",
                    f"{check['reached']:.5g}",
                    "" if check["range"] is None else "{:.4g} to {:.4g}".format(*check["range"]),
                    f"{check['time_error_percent']:+.1f} %",
                    _percent(check["baseline_error_percent"]),
                    check["engine"],
                ]
                for check in shown
            ),
        )


def _contrasts(checks: Sequence[Check]) -> Iterator[str]:
    yield ""
    yield "## Contrasts"
    yield ""
    yield from _table(
        ["two runs", "published", "predicted", "range", "within", ""],
        (
            [
                check["name"],
                f"{check['expected']:.3f}",
                f"{check['reached']:.3f}",
                "" if check["range"] is None else "{:.3f} to {:.3f}".format(*check["range"]),
                f"{check['tolerance']:.3g}",
                "met" if check["ok"] else "missed",
            ]
            for check in checks
            if check["group"] == "contrasts"
        ),
    )


def _memory(checks: Sequence[Check]) -> Iterator[str]:
    yield ""
    yield "## Memory"
    yield ""
    yield from _table(
        ["run", "published", "predicted", "error"],
        (
            [
                check["name"],
                f"{check['expected']:.4g} {check['unit']}",
                f"{check['reached']:.4g}",
                f"{check['error_percent']:+.1f} %",
            ]
            for check in checks
            if check["group"] == "runs" and check["unit"] in ("GiB", "GB") and check["reached"] is not None
        ),
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100.0 * value:.0f} %"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f} %" if value < 0 else f"{value:.1f} %"


def _draw(checks: Sequence[Check]) -> None:
    """Signed error of every complete row by accelerators, and the ranges of incomplete ones."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "moesim"  # the same bytes every time
    from matplotlib import pyplot

    families = sorted({check["family"] for check in checks if check["time_error_percent"] is not None})
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    for number, family in enumerate(families):
        rows = [check for check in checks if check["family"] == family and check["time_error_percent"] is not None]
        complete = [row for row in rows if row["complete"]]
        colour, marker = mpl.colormaps["tab20"](number % 20), "o^sDvP*X<>"[number % 10]
        spread = 1.0 + 0.02 * (number - len(families) / 2.0)
        axes.scatter(
            [row["accelerators"] * spread for row in complete],
            [row["time_error_percent"] for row in complete],
            s=14,
            color=colour,
            marker=marker,
            label=f"{family} ({len(rows)})",
            alpha=0.7,
        )
        for row in rows:
            if not row["complete"] and row["range"] is not None:
                low, high = sorted(100.0 * (math.exp(e) - 1.0) for e in row["log_range"])
                axes.plot([row["accelerators"] * spread] * 2, [low, high], color=colour, alpha=0.5, linewidth=2)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("accelerators")
    axes.set_ylabel("predicted over published step time - 1, %")
    axes.set_ylim(-85, 75)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(FIGURE, metadata={"Date": None})
    pyplot.close(figure)


__all__ = ["FIGURE", "PAGE", "fingerprints", "write"]
