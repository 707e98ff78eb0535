"""Memory of the worst rank over the step: what stays, and what the schedule takes and releases."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from simulator.campaign import TrainingEstimate
from simulator.events import MemoryCurve
from simulator.report.style import BLACK, BLUE, GIB, ORANGE, SKY, VERMILLION, styled

MOST_POINTS = 4000
"""Points of a drawn curve; beyond, stretches are drawn by their highest level."""


def memory_over_time_figure(estimate: TrainingEstimate) -> go.Figure:
    """Stacked areas of states, buffers and saved tensors of the worst rank in GiB, with the usable memory as a line."""
    curve = estimate.step.memory_curves[estimate.step.memory.rank]
    limit = estimate.memory_limit_bytes / GIB
    time, saved = _drawn(curve)
    figure = go.Figure()
    layers = (
        ("states", BLUE, np.full(len(time), curve.static_bytes)),
        ("buffers", ORANGE, np.full(len(time), curve.buffer_bytes)),
        ("saved activations", SKY, saved),
    )
    for name, color, size in layers:
        figure.add_scatter(
            x=time,
            y=size / GIB,
            name=name,
            mode="lines",
            line={"width": 0, "shape": "hv", "color": color},
            fillcolor=color,
            stackgroup="memory",
            hovertemplate=f"{name}: %{{y:.2f}} GiB at %{{x:.3f}} s<extra></extra>",
        )
    peak = curve.peak_bytes / GIB
    figure.add_hline(y=limit, line={"color": VERMILLION if peak > limit else BLACK, "width": 2, "dash": "dash"})
    figure.add_annotation(
        x=1,
        xref="paper",
        y=limit,
        text=f"usable {limit:.1f} GiB",
        showarrow=False,
        xanchor="right",
        yanchor="bottom",
        font={"size": 12},
    )
    title = f"Memory of the worst pipeline rank ({curve.rank}) over the step: peak {peak:.1f} GiB"
    styled(figure, title, height=360, margin={"l": 60, "r": 20, "t": 70, "b": 50})
    figure.update_xaxes(title_text="time in the step (s)", range=[0, estimate.step_time_s])
    figure.update_yaxes(title_text="GiB", range=[0, 1.08 * max(limit, peak)])
    return figure


def _drawn(curve: MemoryCurve) -> tuple[np.ndarray, np.ndarray]:
    """Points of the curve; of very many, the highest level of each stretch."""
    width = -(-len(curve.time) // MOST_POINTS)
    starts = np.arange(0, len(curve.time), width)
    levels = np.maximum.reduceat(curve.saved, starts)
    return np.append(curve.time[starts], curve.time[-1]), np.append(levels, curve.saved[-1])
