"""Figures of an estimate's ledgers: where the time, the memory and the money go.

Every ledger is drawn twice in one figure: a bar of its groups, whose length is the total, and one bar per term in
falling order. Timelines are in :mod:`simulator.report.gantt`, expert loads in :mod:`simulator.report.experts`, sweeps
in :mod:`simulator.report.curves`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from simulator.campaign import TrainingEstimate
from simulator.report.curves import sweep_figure
from simulator.report.experts import load_figure, position_figure
from simulator.report.gantt import steady_window, step_figure, timeline_figure
from simulator.report.style import (
    BLACK,
    GIB,
    MEMORY_GROUPS,
    SKY,
    STEP_GROUPS,
    VERMILLION,
    gibibytes,
    memory_group,
    readable,
    seconds,
    short,
    step_group,
    styled,
)


def breakdown_figure(estimate: TrainingEstimate) -> go.Figure:
    """Step time by term, mean over pipeline ranks, in seconds; the terms sum to the step."""
    title = f"Step time by term: {seconds(estimate.step_time_s)}"
    figure = _ledger_figure(estimate.breakdown, step_group, STEP_GROUPS, title, "seconds", seconds)
    figure.update_xaxes(range=[0, estimate.step_time_s * 1.02], row=1, col=1)
    return figure


def memory_figure(estimate: TrainingEstimate) -> go.Figure:
    """Memory of the worst rank by term, in GiB, with the usable memory as a line."""
    use, limit = estimate.step.memory, estimate.memory_limit_bytes / GIB
    peak = use.peak_bytes / GIB
    title = f"Memory of the worst pipeline rank ({use.rank}): {peak:.1f} of {limit:.1f} GiB usable"
    figure = _ledger_figure(use.terms.scaled(1 / GIB), memory_group, MEMORY_GROUPS, title, "GiB", gibibytes)
    figure.add_vline(
        x=limit, line={"color": VERMILLION if peak > limit else BLACK, "width": 2, "dash": "dash"}, row=1, col=1
    )
    figure.add_annotation(
        x=limit,
        y=1,
        xref="x",
        yref="y domain",
        text=f"usable {limit:.1f} GiB",
        showarrow=False,
        xanchor="right",
        yanchor="bottom",
        font={"size": 12},
    )
    figure.update_xaxes(range=[0, 1.04 * max(limit, peak)], row=1, col=1)
    return figure


def cost_figure(estimate: TrainingEstimate) -> go.Figure:
    """Accelerator-hours by phase; those of the main phase divided as the time of its steady step."""
    phases, step = estimate.phase_gpu_hours, estimate.breakdown
    unit, name = (1e6, "million ") if estimate.gpu_hours >= 1e6 else (1.0, "")
    first = next(iter(phases))
    figure = go.Figure()
    price = estimate.price_usd_per_hour
    for group, color in STEP_GROUPS.items():
        hours = phases[first] * sum(value for term, value in step.items() if step_group(term) == group) / step.total
        if hours:
            _bar(figure, group, color, [html.escape(first)], [hours / unit], [hours * price], name, estimate.cost_usd)
    others = [phase for phase in phases if phase != first]
    if others:
        texts = [html.escape(each) for each in others]
        _bar(
            figure,
            "later phases",
            SKY,
            texts,
            [phases[each] / unit for each in others],
            [phases[each] * price for each in others],
            name,
            estimate.cost_usd,
        )
    title = f"{short(estimate.gpu_hours)} accelerator-hours, {short(estimate.cost_usd)} USD at {price:g} USD/h"
    styled(figure, title, height=140 + 36 * len(phases), barmode="stack", margin={"l": 60, "r": 20, "t": 70, "b": 50})
    figure.update_xaxes(title_text="accelerator-hours" + (f" ({name.strip()})" if name else ""), rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _ledger_figure(
    terms: Mapping[str, float],
    group_of: Callable[[str], str],
    groups: Mapping[str, str],
    title: str,
    axis: str,
    write: Callable[[float], str],
) -> go.Figure:
    """A bar of groups above one bar per term, with value and share written beside each."""
    total, size = sum(terms.values()), 22 * len(terms)
    figure = make_subplots(rows=2, row_heights=[46, size + 12], vertical_spacing=50 / (108 + size))
    ordered = sorted(terms, key=lambda term: -terms[term])
    for group, color in groups.items():
        members = [term for term in ordered if group_of(term) == group]
        if not members:
            continue
        values = [terms[term] for term in members]
        whole = sum(values)
        look: dict[str, Any] = {"orientation": "h", "name": group, "legendgroup": group}
        look["hovertemplate"] = "%{y}: %{customdata}"
        look["marker"] = {"color": color, "line": {"color": "white", "width": 1}}
        inside = {"textposition": "inside", "insidetextanchor": "middle", "textangle": 0}
        share = [f"{whole / total:.0%}" if whole > 0.03 * total else ""]
        font = {"color": _ink(color)}
        figure.add_bar(
            y=["total"], x=[whole], text=share, customdata=[write(whole)], textfont=font, row=1, col=1, **look, **inside
        )
        figure.add_bar(
            y=[readable(term) for term in members],
            x=values,
            text=[f"{write(value)}  ({value / total:.1%})" for value in values],
            customdata=[write(value) for value in values],
            textposition="outside",
            cliponaxis=False,
            showlegend=False,
            row=2,
            col=1,
            **look,
        )
    margin = {"l": 190, "r": 20, "t": 70, "b": 46}
    styled(figure, title, height=176 + size, barmode="stack", bargap=0.25, margin=margin)
    names = [readable(term) for term in reversed(ordered)]
    figure.update_yaxes(showgrid=False, tickfont={"size": 12.5})
    figure.update_yaxes(categoryorder="array", categoryarray=names, row=2, col=1)
    figure.update_xaxes(title_text=axis, range=[0, 1.22 * max(terms.values(), default=1.0)], row=2, col=1)
    return figure


def _ink(color: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 130 else BLACK


def _bar(
    figure: go.Figure, name: str, color: str, y: list[str], x: list[float], usd: list[float], unit: str, whole: float
) -> None:
    """Horizontal bars of hours with their dollars written inside where there is room."""
    figure.add_bar(
        orientation="h",
        y=y,
        x=x,
        name=name,
        marker={"color": color, "line": {"color": "white", "width": 1}},
        customdata=[short(each) for each in usd],
        text=[f"{short(each, 3)} USD" if each > 0.09 * whole else "" for each in usd],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        textfont={"color": _ink(color)},
        hovertemplate=f"%{{y}}, {name}: %{{x:.4g}} {unit}h, %{{customdata}} USD<extra></extra>",
    )


__all__ = [
    "breakdown_figure",
    "cost_figure",
    "load_figure",
    "memory_figure",
    "position_figure",
    "steady_window",
    "step_figure",
    "sweep_figure",
    "timeline_figure",
]
