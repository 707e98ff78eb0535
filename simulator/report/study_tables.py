"""Terminal tables of studies: rows of a sweep, what moved against the base, loads over training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from simulator.report.tables import GIB, new_table, number, titled
from simulator.study import LoadRow, Row, difference

_LONGEST_NAME = 36
"""Letters of a row's name that stay on one line; longer names are folded before numbers are."""


def rows_table(rows: Sequence[Row]) -> RenderableType:
    """A study: cost, drops, padding, memory and parameters per row, against the base."""
    base = rows[0]
    table = new_table(
        "scenario",
        "GPU-hours",
        "vs base",
        "step",
        "dropped",
        "padding",
        "memory",
        "fits",
        "params",
        "active",
        "MFU",
        "what moved most",
    )
    table.columns[0].no_wrap = max(len(row.name) for row in rows) <= _LONGEST_NAME
    for row in rows:
        if row.error is not None:
            table.add_row(escape(row.name), Text(row.error, style="red"), *[""] * 10)
            continue
        values = row.values
        moved = "" if row is base or base.error else _moved(base.values, values)
        change = "" if row is base or base.error else f"{values['gpu_hours'] / base.values['gpu_hours'] - 1:+.1%}"
        table.add_row(
            escape(row.name),
            number(values["gpu_hours"], ""),
            change,
            number(values["step_time_s"], "s"),
            f"{values['dropped_token_fraction']:.2%}",
            f"{values['padding_fraction']:.1%}",
            f"{values['memory_peak_bytes'] / GIB:.1f} GiB",
            "yes" if values["fits"] else Text("no", style="red"),
            number(values["parameters_total"], ""),
            number(values["parameters_active"], ""),
            f"{values['mfu']:.1%}",
            moved,
        )
    engines = {row.values["engine"] for row in rows if row.error is None}
    return titled(f"{len(rows)} scenarios, {' and '.join(sorted(engines))} engine", table)


def terms_table(rows: Sequence[Row]) -> RenderableType:
    """Step time of every row minus the base's, term by term."""
    base, others = rows[0], [row for row in rows[1:] if row.error is None]
    table = new_table("term", "base", *(escape(row.name) for row in others))
    title = "Step time against the base, term by term (seconds)"
    if base.error is not None:
        return titled(title, table)
    changes = [difference(base.values, row.values) for row in others]
    names = sorted(
        {name for change in changes for name in change},
        key=lambda name: -max((abs(c.get(name, 0.0)) for c in changes), default=0.0),
    )
    for name in names:
        table.add_row(
            name,
            f"{base.values['step_breakdown_s'].get(name, 0.0):.4f}",
            *(f"{change.get(name, 0.0):+.4f}" for change in changes),
        )
    table.add_section()
    table.add_row("total", f"{base.values['step_time_s']:.4f}", *(f"{sum(change.values()):+.4f}" for change in changes))
    return titled(title, table)


def load_table(name: str, rows: Sequence[LoadRow]) -> RenderableType:
    """Load over training steps: MaxVio and dropped share, a column for each strategy."""
    strategies = list(dict.fromkeys(row.strategy for row in rows))
    found = {(row.step, row.strategy): row for row in rows}
    table = new_table("training step", *(escape(strategy) for strategy in strategies))
    for step in dict.fromkeys(row.step for row in rows):
        cells = (found[step, strategy] for strategy in strategies)
        shown = (f"{cell.max_violation:.3f} {cell.dropped_fraction_at_capacity_factor:7.2%}" for cell in cells)
        table.add_row(f"{step:,}", *shown)
    title = (
        f"{name}: MaxVio of a global batch (busiest expert / mean - 1), and share of the assignments\n"
        f"of one expert group's microbatch that a capacity factor of {rows[0].capacity_factor:g} drops"
    )
    return titled(title, table)


def _moved(base: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    parts = sorted(difference(base, values).items(), key=lambda item: -abs(item[1]))[:2]
    return ", ".join(
        f"{name} {'+' if value >= 0 else '-'}{number(abs(value), 's')}" for name, value in parts if abs(value) > 1e-9
    )
