"""Expert load over training steps: a curve for each balancing strategy."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from simulator.report.style import QUALITATIVE, styled
from simulator.study import LoadRow


def over_steps_figure(rows: Sequence[LoadRow]) -> go.Figure:
    """MaxVio of a global batch and dropped share of a microbatch against the training step."""
    factor = rows[0].capacity_factor
    panels: tuple[tuple[str, Callable[[LoadRow], float]], ...] = (
        ("MaxVio of a global batch", lambda row: row.max_violation),
        (
            f"Dropped at capacity factor {factor:g} (%)",
            lambda row: 100.0 * row.dropped_fraction_at_capacity_factor,
        ),
    )
    figure = make_subplots(cols=2, subplot_titles=[title for title, _ in panels], horizontal_spacing=0.09)
    strategies: dict[str, list[LoadRow]] = {}
    for row in rows:
        strategies.setdefault(row.strategy, []).append(row)
    for column, (_, value) in enumerate(panels, start=1):
        for index, (name, members) in enumerate(strategies.items()):
            ordered = sorted(members, key=lambda row: row.step)
            figure.add_scatter(
                x=[row.step for row in ordered],
                y=[value(row) for row in ordered],
                name=html.escape(name),
                mode="lines+markers",
                line={"color": QUALITATIVE[index % len(QUALITATIVE)], "width": 2},
                marker={"size": 6},
                legendgroup=name,
                showlegend=column == 1,
                hovertemplate=f"{html.escape(name)}: %{{y:.4g}} at step %{{x}}<extra></extra>",
                row=1,
                col=column,
            )
    styled(
        figure,
        "Expert load over the training steps, by balancing strategy",
        height=400,
        margin={"l": 60, "r": 20, "t": 76, "b": 92},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    )
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(rangemode="tozero")
    violations = [row.max_violation for row in rows]
    if min(violations) > 0.0 and max(violations) > 20.0 * min(violations):
        figure.update_yaxes(type="log", rangemode="normal", dtick=1, row=1, col=1)
    return figure
