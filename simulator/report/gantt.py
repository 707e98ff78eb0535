"""What runs when: the whole step at a glance, and a window of its steady state op by op.

In the window every pipeline rank has a compute row and, below it, rows for its communication. An exchange that lies
under compute costs nothing; a gap in the compute row is exposed communication, waiting or bubble.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from simulator.events import Timeline
from simulator.program import COMPUTE, EXPERT, PIPELINE, STREAMS
from simulator.report import style
from simulator.report.style import seconds, styled
from simulator.report.trace import op_names
from simulator.timing.prices import RECOMPUTE

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

KINDS = {
    "forward (F)": style.BLUE,
    "backward for the input (I)": style.GREEN,
    "backward for the weight (W)": style.YELLOW,
    "recompute": style.PURPLE,
    "dispatch": style.SKY,
    "combine": style.VERMILLION,
    "send": style.BLACK,
    "other communication": style.ORANGE,
    "other": style.GREY,
}
"""What an op of the window does, in the order of the legend."""
FORWARD, INPUT, WEIGHT, AGAIN, DISPATCH, COMBINE, SEND, OTHER_COMMUNICATION, OTHER = KINDS

PAIRS, MOST_OPS, MOST_RANKS, MOST_BINS = 2.2, 60, 12, 500
"""Chunk pairs, compute ops per rank and ranks that a window shows; bins of the overview."""

_HEIGHT = {COMPUTE: 1.0, EXPERT: 0.75}
_THIN, _SPACE = 0.45, 0.55
_ROW_NAMES = {EXPERT: "all-to-all", PIPELINE: "send"}


def steady_window(timeline: Timeline, pairs: float = PAIRS) -> tuple[float, float]:
    """Begin and end of a window in the middle of the step that covers a few chunks in both directions, in seconds.

    It starts with a chunk of the middle rank, and is shorter where a chunk has very many ops.
    """
    program, step = timeline.program, timeline.step_s
    rank = program.ranks // 2
    ops = np.flatnonzero((program.rank == rank) & (program.stream == COMPUTE))
    ops = ops[np.argsort(timeline.start[ops, 0], kind="stable")]
    begin = timeline.start[ops, 0]
    chunk = np.unique(program.stage[ops] * (program.microbatch.max() + 1) + program.microbatch[ops])
    span = float(timeline.end[ops, 0].max() - begin.min())
    length = min(pairs * span / max(1, len(chunk)), MOST_OPS * span / max(1, len(ops)), step)
    middle = max(0.0, step / 2 - length / 2)
    changes = 1 + np.flatnonzero(
        (np.diff(program.microbatch[ops]) != 0)
        & np.array([program.labels[i].startswith("F ") for i in program.label[ops][1:]])
    )
    if len(changes):
        near = begin[changes][np.argmin(np.abs(begin[changes] - middle))]
        middle = float(near) if abs(near - middle) < length else middle
    middle = min(middle, step - length)
    return middle, middle + length


def timeline_figure(timeline: Timeline, window: tuple[float, float] | None = None) -> go.Figure:
    """Gantt chart of a window: a compute row and its communication rows for up to twelve pipeline ranks."""
    begin, end = window or steady_window(timeline)
    program = timeline.program
    ranks = np.unique([*range(0, program.ranks, -(-program.ranks // MOST_RANKS)), program.ranks - 1])
    start, stop = timeline.start[:, 0], timeline.end[:, 0]
    inside = np.flatnonzero((stop > begin) & (start < end) & (stop - start > 1e-9) & np.isin(program.rank, ranks))
    rows, ticks, height = _rows(timeline, inside, ranks)
    figure = go.Figure()
    for kind, bars in _bars(timeline, inside, begin, end).items():
        place = [rows[key] for key in bars["row"]]
        figure.add_bar(
            orientation="h",
            name=kind,
            base=[1e3 * (at - begin) for at in bars["start"]],
            x=[1e3 * duration for duration in bars["duration"]],
            y=[center for center, _ in place],
            width=[size for _, size in place],
            marker={"color": KINDS[kind], "line": {"color": "white", "width": 0.4}},
            text=bars["text"],
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )
    title = f"Steady state: {seconds(end - begin)} in the middle of the step ({begin:.3f} s to {end:.3f} s)"
    styled(
        figure, title, height=int(120 + 25 * height), barmode="overlay", margin={"l": 120, "r": 20, "t": 70, "b": 50}
    )
    figure.update_layout(legend_itemsizing="constant", hovermode="closest", bargap=0)
    figure.update_xaxes(title_text="time since the beginning of the window (ms)", range=[0, 1e3 * (end - begin)])
    figure.update_yaxes(
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
        range=[height, -_SPACE],
        showgrid=False,
        tickfont={"size": 10},
    )
    return figure


def step_figure(timeline: Timeline) -> go.Figure:
    """The whole step: share of time in which each pipeline rank computes, with the steady-state window marked."""
    program, step = timeline.program, timeline.step_s
    bins = int(min(MOST_BINS, max(50, len(program) // program.ranks)))
    busy = occupancy(timeline, bins)
    width = step / bins
    figure = go.Figure(
        go.Heatmap(
            z=100 * busy,
            x=(np.arange(bins) + 0.5) * width,
            y=np.arange(program.ranks),
            zmin=0,
            zmax=100,
            colorscale=[[0, "#F4F5F6"], [0.5, "#9CC9E6"], [1, style.BLUE]],
            colorbar=style.colorbar("computing (%)"),
            ygap=1,
            hovertemplate="rank %{y}, %{x:.3f} s: computes %{z:.0f} % of the time<extra></extra>",
        )
    )
    begin, end = steady_window(timeline)
    figure.add_vrect(x0=begin, x1=end, line={"color": style.VERMILLION, "width": 2}, layer="above")
    title = f"The whole step: when each pipeline rank computes ({seconds(step)})"
    styled(
        figure,
        title,
        height=int(130 + 16 * min(max(program.ranks, 7), 32)),
        margin={"l": 60, "r": 20, "t": 52, "b": 50},
    )
    figure.update_xaxes(title_text="time in the step (s)", range=[0, step], showgrid=False)
    figure.update_yaxes(
        title_text="pipeline rank", autorange="reversed", showgrid=False, dtick=max(1, program.ranks // 8)
    )
    return figure


def occupancy(timeline: Timeline, bins: int) -> FloatArray:
    """Share of every time bin in which the compute stream of lane 0 is busy [ranks, bins]."""
    program = timeline.program
    edges = np.linspace(0.0, timeline.step_s, bins + 1)
    busy = np.zeros((program.ranks, bins))
    for rank in range(program.ranks):
        ops = np.flatnonzero((program.rank == rank) & (program.stream == COMPUTE))
        start, end = timeline.start[ops, 0], timeline.end[ops, 0]
        order = np.argsort(start, kind="stable")
        start, end = start[order], end[order]
        points = np.stack([start, end], axis=1).ravel()
        done = np.repeat(np.concatenate([[0.0], np.cumsum(end - start)]), 2)[1:-1]
        busy[rank] = np.diff(np.interp(edges, points, done)) / np.diff(edges)
    return np.clip(busy, 0.0, 1.0)


def _rows(
    timeline: Timeline, inside: IntArray, ranks: IntArray
) -> tuple[dict[tuple[int, int], tuple[float, float]], dict[float, str], float]:
    """Center and height of the row of each (rank, stream) in use, the tick texts by center, and the total height."""
    streams = np.unique(timeline.program.stream[inside]).tolist()
    rows: dict[tuple[int, int], tuple[float, float]] = {}
    ticks: dict[float, str] = {}
    top = 0.0
    for rank in ranks.tolist():
        for stream in sorted({COMPUTE, *streams}):
            size = _HEIGHT.get(stream, _THIN)
            rows[rank, stream] = (top + size / 2, size)
            if stream == COMPUTE:
                ticks[top + size / 2] = f"<b>rank {rank}</b>  compute"
            else:
                ticks[top + size / 2] = _ROW_NAMES.get(stream, STREAMS[stream])
            top += size + 0.06
        top += _SPACE
    return rows, ticks, top


def _bars(timeline: Timeline, inside: IntArray, begin: float, end: float) -> dict[str, dict[str, list[Any]]]:
    """Bars by kind, in legend order; recomputation is cut off the front of the op that contains it."""
    program, prices = timeline.program, timeline.prices
    again = (
        prices.share[:, prices.families.index(RECOMPUTE)]
        if RECOMPUTE in prices.families
        else np.zeros(len(program.classes))
    )
    names = op_names(program, inside)
    bars: dict[str, dict[str, list[Any]]] = {
        kind: {"row": [], "start": [], "duration": [], "text": []} for kind in KINDS
    }
    for name, op in zip(names, inside.tolist(), strict=True):
        start, stop = float(timeline.start[op, 0]), float(timeline.end[op, 0])
        stream, label = int(program.stream[op]), program.labels[program.label[op]]
        share = float(again[program.cls[op]]) if stream == COMPUTE else 0.0
        cut = start + share * (stop - start)
        for kind, left, right in ((AGAIN, start, cut), (op_kind(label, stream), cut, stop)):
            seen = min(right, end) - max(left, begin)
            if seen > 0:
                entry = bars[kind]
                entry["row"].append((int(program.rank[op]), stream))
                entry["start"].append(max(left, begin))
                entry["duration"].append(seen)
                entry["text"].append(
                    f"{name}{' (recompute)' if kind == AGAIN else ''}<br>{seconds(stop - start)} on {STREAMS[stream]}"
                )
    return {kind: entry for kind, entry in bars.items() if entry["row"]}


def op_kind(label: str, stream: int) -> str:
    """Kind of an op by its program label and stream.

    >>> op_kind("dispatch B", EXPERT), op_kind("I experts", COMPUTE)
    ('dispatch', 'backward for the input (I)')
    """
    if stream == EXPERT:
        return DISPATCH if label.startswith("dispatch") else COMBINE
    if stream != COMPUTE:
        return SEND if stream == PIPELINE else OTHER_COMMUNICATION
    return {"F": FORWARD, "I": INPUT, "W": WEIGHT, "recompute": AGAIN}.get(label.split()[0], OTHER)
