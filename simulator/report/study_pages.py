"""Studies as HTML: the section of variants and sweeps, and pages that hold nothing but a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from simulator.campaign.result import simulator_version
from simulator.report.balancing import over_steps_figure
from simulator.report.curves import sweep_figure
from simulator.report.families import families, row_labels
from simulator.report.page import bullets, details, figure, filled, save, section, table
from simulator.report.style import GIB, seconds, short
from simulator.spec import Scenario
from simulator.study import LoadRow
from simulator.study import Row as StudyRow

Row = Mapping[str, Any]


def study_section(rows: Sequence[Row]) -> str:
    """The rows of a sweep or of variants: a figure for each family, and a table."""
    if not rows:
        return ""
    base = rows[0].get("gpu_hours")
    body = [
        (
            label,
            short(row["gpu_hours"]),
            f"{row['gpu_hours'] / base - 1:+.1%}" if base else "",
            seconds(row["step_time_s"]),
            f"{row['memory_peak_bytes'] / GIB:.1f}",
            f"{row['dropped_token_fraction']:.2%}",
            f"{row['padding_fraction']:.1%}",
            short(row["parameters_total"]),
            short(row["parameters_active"]),
        )
        for label, row in zip(row_labels(rows), rows, strict=True)
        if row.get("gpu_hours") is not None
    ]
    heads = (
        "scenario",
        "accelerator-hours",
        "against the first",
        "step",
        "memory, GiB",
        "dropped",
        "padding",
        "parameters",
        "active",
    )
    drawn = [figure(sweep_figure(family), f"study{index}") for index, family in enumerate(families(rows))]
    note = "The same scenario with other choices, on the same draw of expert loads. A grey dotted line is the base."
    return section("Variants and sweeps", note, *drawn, table(heads, "lrrrrrrrr", body))


def write_sweep(scenario: Scenario, rows: Sequence[StudyRow], path: str | Path) -> None:
    """Write the rows of a study as a page; rows without an estimate are named with their reason."""
    failed = [f"{row.name}: {row.error}" for row in rows if row.error is not None]
    sections = [study_section([row.as_dict() for row in rows if row.error is None])]
    if failed:
        sections.append(section("Points without an estimate", "", bullets(failed)))
    engines = sorted({row.values["engine"] for row in rows if row.error is None})
    _write(scenario, f"{len(rows)} scenarios", sections, path, [f"{engine} engine" for engine in engines])


def write_over_steps(scenario: Scenario, rows: Sequence[LoadRow], path: str | Path) -> None:
    """Write the expert load over training steps as a page."""
    note = (
        "Every strategy starts from the same stated load and the same draw of documents. MaxVio is the busiest expert "
        "over the mean, less 1, of the expected load of a global batch, in which documents average out. Dropped is the "
        "share of the assignments of one expert group's microbatch that the capacity factor drops, with one capacity "
        "for the group. All numbers are means over the decoder's MoE layers."
    )
    heads = ("strategy", "training step", "CV", "MaxVio", "microbatch: busiest / mean", "dropped")
    body = [
        (
            escape(row.strategy),
            f"{row.step:,}",
            f"{row.cv:.4f}",
            f"{row.max_violation:.4f}",
            f"{row.batch_max_over_mean:.3f}",
            f"{row.dropped_fraction_at_capacity_factor:.2%}",
        )
        for row in rows
    ]
    parts = (figure(over_steps_figure(rows), "over-steps"), details("All numbers", table(heads, "lrrrrr", body)))
    _write(scenario, scenario.model.name, [section("Expert load over training steps", note, *parts)], path)


def _write(
    scenario: Scenario, subtitle: str, sections: Sequence[str], path: str | Path, more: Sequence[str] = ()
) -> None:
    facts = (f"moesim {simulator_version()}", *more, f"seed {scenario.routing.seed}")
    save(path, filled(scenario.name, escape(subtitle), escape(" · ".join(facts)), sections))
