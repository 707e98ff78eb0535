"""How evenly the experts are loaded: the load within a layer, whether the same experts are always hot, who is dropped.

Loads are relative to the mean over the experts of a layer in a microbatch; with perfect balance all are 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from simulator.report.style import BLUE, PALE, SKY, VERMILLION, colorbar, styled
from simulator.routing import ExpertLoad

FloatArray = npt.NDArray[np.float64]
MOST_COLUMNS = 512
"""Experts that a figure tells apart; beyond, neighbours are averaged."""


def load_figure(load: ExpertLoad) -> go.Figure:
    """Expert load over its mean: sorted within every layer and microbatch, and as a map of layers and experts."""
    mean = np.maximum(load.assigned.mean(-1, keepdims=True), 1e-12)
    relative = load.assigned / mean  # [microbatches, layers, experts]
    figure = make_subplots(
        cols=2,
        column_widths=[0.42, 0.58],
        horizontal_spacing=0.09,
        subplot_titles=["Experts sorted by load", "Mean over microbatches, by layer"],
    )
    _sorted_bands(figure, relative)
    if load.processed.sum() < load.assigned.sum():
        curve = np.median(_falling(load.processed / mean), axis=0)
        line = {"color": VERMILLION, "dash": "dash", "width": 2}
        figure.add_scatter(x=_ranks(curve), y=curve, name="after capacity, median", line=line, row=1, col=1)
    _add_map(figure, relative.mean(0))
    busiest = f"the busiest expert has {load.max_over_mean:.2f} times the mean"
    title = f"Expert load: {busiest}, the busiest rank {load.rank_max_over_mean:.2f} times"
    styled(
        figure,
        title,
        height=430,
        margin={"l": 60, "r": 20, "t": 76, "b": 92},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    )
    figure.update_xaxes(title_text="share of experts, most loaded first (%)", range=[0, 100], row=1, col=1)
    figure.update_yaxes(
        title_text="load / mean", rangemode="tozero" if relative.min() < 0.5 else "normal", row=1, col=1
    )
    figure.update_xaxes(title_text="expert", showgrid=False, row=1, col=2)
    figure.update_yaxes(title_text="MoE layer", autorange="reversed", showgrid=False, row=1, col=2)
    return figure


def position_figure(load: ExpertLoad) -> go.Figure:
    """Dropped share of the assignments by position in the capacity group, with the mean as a line."""
    width = 100.0 / len(load.drop_profile)
    starts = np.arange(len(load.drop_profile)) * width
    mean = 100.0 * load.dropped_fraction
    figure = go.Figure()
    figure.add_bar(
        x=starts + width / 2,
        y=100.0 * load.drop_profile,
        width=0.9 * width,
        marker={"color": BLUE},
        customdata=[f"{start:g} to {start + width:g} %" for start in starts],
        hovertemplate="%{customdata}: %{y:.3g} % dropped<extra></extra>",
    )
    figure.add_hline(y=mean, line={"color": VERMILLION, "dash": "dash", "width": 1.5})
    title = f"Dropped share by position in the capacity group: {mean:.2f} % of all assignments"
    styled(figure, title, height=270, margin={"l": 60, "r": 20, "t": 50, "b": 50}, showlegend=False)
    figure.update_xaxes(title_text="position in order of arrival (%)", range=[0, 100], dtick=width, showgrid=False)
    figure.update_yaxes(title_text="dropped (%)", rangemode="tozero")
    return figure


def _add_map(figure: go.Figure, loads: FloatArray) -> None:
    """Heat map of layers and experts [layers, experts]; white is the mean, whatever the range."""
    shown = _narrow(loads)
    reach = max(0.02, float(np.quantile(np.abs(shown - 1), 0.995)))
    low, high = max(0.0, 1 - reach), 1 + reach
    figure.add_heatmap(
        z=shown,
        x=np.linspace(0, loads.shape[-1] - 1, shown.shape[1]).round(),
        zmin=low,
        zmax=high,
        colorscale=[[0, BLUE], [(1 - low) / (high - low), "#FFFFFF"], [1, VERMILLION]],
        colorbar=colorbar("load / mean"),
        hovertemplate="layer %{y}, expert %{x}: %{z:.3f}<extra></extra>",
        row=1,
        col=2,
    )


def _sorted_bands(figure: go.Figure, relative: FloatArray) -> None:
    """Median curve with the bands that hold 90 % and all of the (layer, microbatch) pairs."""
    curves = _falling(relative)
    low, q05, median, q95, high = np.quantile(curves, [0.0, 0.05, 0.5, 0.95, 1.0], axis=0)
    x = _ranks(median)
    for name, bottom, top, color in (("all layers and microbatches", low, high, PALE), ("90 % of them", q05, q95, SKY)):
        figure.add_scatter(
            x=np.concatenate([x, x[::-1]]),
            y=np.concatenate([top, bottom[::-1]]),
            name=name,
            fill="toself",
            fillcolor=color,
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            row=1,
            col=1,
        )
    figure.add_scatter(
        x=x,
        y=median,
        name="median",
        line={"color": BLUE, "width": 2},
        hovertemplate="%{y:.3f}<extra></extra>",
        row=1,
        col=1,
    )


def _falling(relative: FloatArray) -> FloatArray:
    """Every (microbatch, layer) sorted in falling order [pairs, experts], narrowed."""
    return _narrow(-np.sort(-relative.reshape(-1, relative.shape[-1]), axis=-1))


def _narrow(values: FloatArray) -> FloatArray:
    """At most :data:`MOST_COLUMNS` columns, each the mean of its neighbours."""
    if values.shape[-1] <= MOST_COLUMNS:
        return values
    edges = np.linspace(0, values.shape[-1], MOST_COLUMNS + 1).astype(int)
    return np.asarray(np.add.reduceat(values, edges[:-1], axis=-1) / np.diff(edges))


def _ranks(curve: FloatArray) -> FloatArray:
    """Positions of sorted experts in percent."""
    return (np.arange(len(curve)) + 0.5) * 100.0 / len(curve)
