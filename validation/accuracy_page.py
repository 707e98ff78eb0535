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

import numpy as np
from scipy.stats import binomtest

from simulator.campaign import uncertainty
from simulator.campaign.uncertainty import SignedError
from validation.evidence import FOLDER, sources

ROOT = Path(__file__).parent.parent
PAGE, FIGURE = ROOT / "docs" / "accuracy.md", ROOT / "docs" / "accuracy.svg"
PROFILES = ROOT / "hardware_profiles"
Check = Mapping[str, Any]
_INTRODUCTION = """\
Written by `moesim validate --runs --write`. Nothing here is judged on what it was fitted on: kernel curves come from
kernel tables, and the stack term of each run from the *other* layouts of its stack
([decision 8](decisions/0008-the-stack-term.md)). A third of the layouts is set aside and not on this page
([evidence](evidence.md)). Errors are of the step time; positive means predicted slower.""".splitlines()


def write(checks: Sequence[Check], summary: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Write the page, its figure and the signed errors."""
    errors = signed_errors(checks)
    rows = [vars(each) for each in errors]
    record = {"fingerprints": fingerprints(), "rows": _sample(checks), "layouts": rows}
    uncertainty.FILE.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    uncertainty.signed_errors.cache_clear()
    PAGE.write_text("\n".join(_page(checks, summary, errors)) + "\n", "utf-8")
    _draw(checks)
    return [PAGE, FIGURE, uncertainty.FILE]


def signed_errors(checks: Iterable[Check]) -> list[SignedError]:
    """Mean log error of every layout with complete rows."""
    by_layout: dict[str, list[Check]] = defaultdict(list)
    for check in checks:
        if check["complete"] and check["time_error_percent"] is not None and check["role"] == "fit":
            by_layout[check["layout"]].append(check)
    found = []
    for layout, rows in sorted(by_layout.items()):
        log_error = float(np.mean([math.log1p(row["time_error_percent"] / 100.0) for row in rows]))
        first = rows[0]
        found.append(
            SignedError(
                layout,
                first["hardware"],
                first["vendor"],
                first["moe"],
                first["accelerators"],
                round(log_error, 5),
            )
        )
    return found


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
    checks: Sequence[Check], summary: Mapping[str, Mapping[str, Any]], errors: Sequence[SignedError]
) -> Iterator[str]:
    inside, asked = uncertainty.coverage(tuple(errors))
    yield "# Accuracy: predictions against published runs"
    yield ""
    yield from _INTRODUCTION
    yield ""
    yield "![Predicted against published step time](accuracy.svg)"
    yield ""
    yield from _table(
        ["family", "layouts", "MAPE", "median", "p90", "bias", "constant MFU", "inside range", "median width"],
        (
            [
                family,
                str(each["layouts"]),
                *(_percent(each.get(key)) for key in ("mape", "median", "p90", "bias", "baseline_mape")),
                "" if each.get("inside_range") is None else f"{100 * each['inside_range']:.0f} %",
                _percent(each.get("median_range_width_percent")),
            ]
            for family, each in summary.items()
        ),
    )
    yield ""
    yield "Constant MFU: what the mean MFU of the family's other layouts gives. Inside range: incomplete rows whose"
    yield "measurement lies inside the predictions over all swept values, with the width of that range."
    yield ""
    yield "## Interval"
    yield ""
    if asked:
        low, high = binomtest(inside, asked).proportion_ci(0.95)
        yield f"The 80 % interval that an estimate prints, formed for every layout from all others, holds {inside} of"
        yield f"{asked} measurements: {100 * inside / asked:.0f} % (95 % binomial interval {100 * low:.0f} to"
        yield f"{100 * high:.0f} %). It does not cover failures and restarts, data loading, layouts that nobody tuned,"
        yield "or hardware far from all of these."
    yield ""
    yield "## Stack terms"
    yield ""
    gaps: dict[str, list[float]] = defaultdict(list)
    for check in checks:
        if check["time_error_percent"] is not None:
            gaps[check["stack"]].append(check["gap_fraction"])
    yield "Idle and unmodelled time as a share of compute, each run's from the other layouts of its stack:"
    yield ""
    yield from _table(
        ["stack", "rows", "from", "to"],
        ([name, str(len(some)), f"{min(some):.3f}", f"{max(some):.3f}"] for name, some in sorted(gaps.items())),
    )
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
        yield ""
        shown = rows if len(rows) <= 40 else sorted(rows, key=lambda row: -abs(row["time_error_percent"]))[:15]
        if len(shown) < len(rows):
            yield f"The 15 of {len(rows)} rows that are farthest off:"
            yield ""
        yield from _table(
            ["run", "published", "predicted", "range", "error of time", "constant MFU"],
            (
                [
                    check["name"].split("/", 1)[1],
                    f"{check['expected']:.5g} {check['unit']}",
                    f"{check['reached']:.5g}",
                    "" if check["range"] is None else "{:.4g} to {:.4g}".format(*check["range"]),
                    f"{check['time_error_percent']:+.1f} %",
                    _percent(check["baseline_error_percent"]),
                ]
                for check in shown
            ),
        )
    contrasts = [check for check in checks if check["group"] == "contrasts"]
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
            for check in contrasts
        ),
    )
    memory = [check for check in checks if check["group"] == "runs" and check["unit"] in ("GiB", "GB")]
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
            for check in memory
            if check["reached"] is not None
        ),
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


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
    axes.set_ylim(-70, 70)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(FIGURE, metadata={"Date": None})
    pyplot.close(figure)


__all__ = ["FIGURE", "PAGE", "fingerprints", "signed_errors", "write"]
