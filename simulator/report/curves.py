"""Curves of a sweep: step time, waiting, drops, padding, memory, cost and parameters against the first axis.

Rows are mappings with ``changes`` (dotted path to value) and keys of an estimate. With several axes the first is the
abscissa and every combination of the others is a curve; an axis ``model`` gives every model a figure of its own. Rows
that do not share their axes, such as named variants, are drawn as bars. What is 0 in every row has no panel.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from simulator.events import WAITING
from simulator.report.families import MODEL_AXIS, Row, last_name, row_labels, shared_axes, shown
from simulator.report.style import BLUE, GIB, GREY, QUALITATIVE, styled
from simulator.study import brief


class Panel(NamedTuple):
    """One panel: estimate key (or ``waiting``, a term of the step), title with unit, factor to that unit."""

    key: str
    title: str
    factor: float = 1.0


PANELS = (
    Panel("step_time_s", "Step time (s)"),
    Panel(WAITING, "Waiting for other ranks (s)"),
    Panel("dropped_token_fraction", "Dropped tokens (%)", 100.0),
    Panel("padding_fraction", "Padding (%)", 100.0),
    Panel("memory_peak_bytes", "Peak memory (GiB)", 1 / GIB),
    Panel("gpu_hours", "Accelerator-hours"),
)
PARAMETERS = Panel("parameters_total", "Parameters (B), dotted: active", 1e-9)
"""Shown only where parameters differ between rows."""
_COLUMNS, _PANEL_HEIGHT = 3, 275
_SHORT, _UPRIGHT = 9, 5
"""Letters of a name that fits under every panel, and names that fit side by side without being tilted."""


def sweep_figure(rows: Sequence[Row]) -> go.Figure:
    """Curves of a sweep against its first axis, or bars of variants; a row without changes is the base."""
    varied = [row for row in rows if row["changes"]]
    named = any(row.get("kind") == "variant" for row in varied)
    axes = shared_axes(varied) if len(varied) > 1 and not named else None
    fixed = [axis for axis in axes or () if _constant(varied, axis)] if len(axes or ()) > 1 else []
    axes = [axis for axis in axes if axis not in fixed] if axes else axes
    if fixed and not axes:
        axes, fixed = fixed[:1], fixed[1:]
    labels = row_labels(rows) if axes is None else _categories(varied, axes[0])
    panels = [panel for panel in PANELS if any(_value(row, panel) for row in rows)]
    panels += [PARAMETERS] if len({_value(row, PARAMETERS) for row in rows}) > 1 else []
    lines = -(-len(panels) // _COLUMNS)
    figure = make_subplots(
        rows=lines,
        cols=_COLUMNS,
        subplot_titles=[panel.title for panel in panels],
        horizontal_spacing=0.08,
        vertical_spacing=0.34 / lines,
        specs=[[{} if _COLUMNS * line + at < len(panels) else None for at in range(_COLUMNS)] for line in range(lines)],
    )
    for index, panel in enumerate(panels):
        where = {"row": index // _COLUMNS + 1, "col": index % _COLUMNS + 1}
        if axes is None:
            _add_bars(figure, rows, panel, where)
        else:
            _add_curves(figure, varied, axes, panel, where, legend=index == 0)
            for base in [each for each in rows if not each["changes"]][:1]:
                value = _value(base, panel)
                if value is not None:
                    figure.add_hline(y=value, line={"color": GREY, "dash": "dot", "width": 1.5}, **where)
        if panel.key == "memory_peak_bytes":
            _add_limit(figure, rows, where)
        figure.update_yaxes(rangemode="tozero", **where)
        bottom = index + _COLUMNS >= len(panels)
        lowest = _add_names(figure, labels, where, bottom=bottom) if labels else 0.0
        if axes and bottom:
            figure.update_xaxes(title_text=html.escape(axes[0]), **where)
    title = "Variants" if axes is None else "Sweep of " + ", ".join(html.escape(axis) for axis in axes)
    below = lowest + (90.0 if axes else 30.0)
    stated = ", ".join(_stated(axis, varied[0]) for axis in fixed)
    return styled(
        figure,
        f"{stated}: {title[0].lower()}{title[1:]}" if stated else title,
        height=round(_PANEL_HEIGHT * lines + below),
        margin={"l": 60, "r": 20, "t": 76, "b": round(below)},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    )


def _constant(rows: Sequence[Row], axis: str) -> bool:
    return len({brief(row["changes"][axis]) for row in rows}) == 1


def _stated(axis: str, row: Row) -> str:
    """An axis that all rows share: a model by its name alone."""
    value = shown(row["changes"][axis], axis)
    return value if axis == MODEL_AXIS else f"{html.escape(axis)} = {value}"


def _add_limit(figure: go.Figure, rows: Sequence[Row], where: dict[str, int]) -> None:
    """Usable memory as a thin dashed line, one for each limit."""
    limits = sorted({float(row["memory_limit_bytes"]) / GIB for row in rows if row.get("memory_limit_bytes")})
    for limit in limits:
        figure.add_hline(y=limit, line={"color": GREY, "dash": "dash", "width": 1}, **where)
        figure.add_annotation(
            text=f"usable {limit:.1f} GiB",
            x=1,
            xref="x domain",
            xanchor="right",
            y=limit,
            yanchor="top",
            showarrow=False,
            font={"size": 11, "color": GREY},
            **where,
        )


def _add_bars(figure: go.Figure, rows: Sequence[Row], panel: Panel, where: dict[str, int]) -> None:
    """One bar per row; a row without the key leaves a gap."""
    figure.add_bar(
        x=row_labels(rows),
        y=[_value(row, panel) for row in rows],
        marker={"color": BLUE},
        showlegend=False,
        hovertemplate="%{x}: %{y:.4g}<extra></extra>",
        **where,
    )


def _add_curves(
    figure: go.Figure, rows: Sequence[Row], axes: list[str], panel: Panel, where: dict[str, int], *, legend: bool
) -> None:
    """One curve for every combination of the axes after the first; numbers in order, then what is no number.

    Curves that differ in the last axis also differ in dashes and markers: where they coincide both are seen.
    """
    axis, others = axes[0], axes[1:]
    rows, numeric = _in_order(rows, axis), not _categories(rows, axis)
    at = [row["changes"][axis] if numeric else shown(row["changes"][axis], axis) for row in rows]
    series: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        name = ", ".join(f"{last_name(path, others)} = {shown(row['changes'][path], path)}" for path in others)
        series.setdefault(name, []).append(index)
    last = list(dict.fromkeys(brief(row["changes"][others[-1]]) for row in rows)) if len(others) > 1 else []
    active = PARAMETERS._replace(key="parameters_active")
    drawn = [("solid", panel), ("dot", active)] if panel is PARAMETERS else [("solid", panel)]
    for number, (name, members) in enumerate(series.items()):
        again = bool(last) and brief(rows[members[0]]["changes"][others[-1]]) != last[0]
        for dash, each in drawn:
            figure.add_scatter(
                x=[at[index] for index in members],
                y=[_value(rows[index], each) for index in members],
                name=name,
                mode="lines+markers",
                line={
                    "color": QUALITATIVE[number % len(QUALITATIVE)],
                    "width": 2,
                    "dash": "dash" if again and dash == "solid" else dash,
                },
                marker={"size": 8 if again else 7, "symbol": "circle-open" if again else "circle"},
                cliponaxis=False,
                legendgroup=name,
                showlegend=bool(others) and legend,
                hovertemplate=f"{name or 'value'}: %{{y:.4g}} at %{{x}}"
                f"{' (active)' if each is active else ''}<extra></extra>",
                **where,
            )


def _in_order(rows: Sequence[Row], axis: str) -> Sequence[Row]:
    """Rows along an axis: numbers rise and null comes last; anything else stays in the order given."""
    if not all(_is_number(row["changes"][axis]) or row["changes"][axis] is None for row in rows):
        return rows
    return sorted(rows, key=lambda row: float("inf") if row["changes"][axis] is None else row["changes"][axis])


def _categories(rows: Sequence[Row], axis: str) -> list[str]:
    """Names along an axis that has not only numbers, in order; none along an axis of numbers."""
    if all(_is_number(row["changes"][axis]) for row in rows):
        return []
    return list(dict.fromkeys(shown(row["changes"][axis], axis) for row in _in_order(rows, axis)))


def _add_names(figure: go.Figure, names: Sequence[str], where: dict[str, int], *, bottom: bool) -> float:
    """Name the places of a category axis; long names only under the lowest panel. Gives the height that they need."""
    longest = max(len(name) for name in names)
    tilted = len(names) > _UPRIGHT and longest > 4
    lines = list(names) if tilted else ["<br>".join(textwrap.wrap(name, 44 // len(names))) for name in names]
    figure.update_xaxes(
        type="category",
        categoryorder="array",
        categoryarray=list(names),
        tickvals=list(names),
        ticktext=lines,
        tickangle=-35 if tilted else 0,
        showticklabels=bottom or longest <= _SHORT,
        **where,
    )
    return 4.2 * min(longest, 40) if tilted else 16.0 * max(line.count("<br>") for line in lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(row: Row, panel: Panel) -> float | None:
    """Number of a row for a panel; a step without a waiting term waits 0 s."""
    step = row.get("step_breakdown_s")
    value = (None if step is None else step.get(WAITING, 0.0)) if panel.key == WAITING else row.get(panel.key)
    return None if value is None else float(value) * panel.factor
