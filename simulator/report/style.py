"""How numbers and figures look: one palette, one layout, one way to write a number.

The colours are those of Okabe and Ito (2008), which remain distinct under the common forms of colour blindness. A
colour means the same thing in every figure: blue is compute, vermillion is communication that nothing hides, grey is
time in which a rank has nothing to do.
"""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from simulator.events import BUBBLE, WAITING
from simulator.program import REPLICAS
from simulator.timing.prices import RECOMPUTE, STACK

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILLION, PURPLE, GREY, BLACK = "#E69F00", "#D55E00", "#CC79A7", "#A0A4A8", "#222222"
PALE = "#D8DADD"
QUALITATIVE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY)

FONT = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
GIB = 2.0**30

STEP_GROUPS = {
    "compute": BLUE,
    "recomputation": PURPLE,
    "software stack": ORANGE,
    "exposed communication": VERMILLION,
    "waiting for slower ranks": YELLOW,
    "bubble": GREY,
}
"""What a rank's time is spent on, in the order in which it is drawn."""

MEMORY_GROUPS = {
    "weights": BLUE,
    "gradients": GREEN,
    "optimizer states": PURPLE,
    "saved activations": SKY,
    "buffers": ORANGE,
}
"""What a rank's memory holds, in the order in which it is drawn."""


def step_group(term: str) -> str:
    """Group of a step-time term.

    >>> step_group("exposed_tensor"), step_group("attention")
    ('exposed communication', 'compute')
    """
    if term.startswith("exposed_"):
        return "exposed communication"
    names = {
        WAITING: "waiting for slower ranks",
        REPLICAS: "waiting for slower ranks",
        BUBBLE: "bubble",
        RECOMPUTE: "recomputation",
        STACK: "software stack",
    }
    return names.get(term, "compute")


def memory_group(term: str) -> str:
    """Group of a memory term.

    >>> memory_group("saved_norm"), memory_group("logits")
    ('saved activations', 'buffers')
    """
    starts = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer states",
        "saved": "saved activations",
    }
    return starts.get(term.split("_")[0], "buffers")


def readable(term: str) -> str:
    """A term's name as a reader would write it.

    >>> readable("exposed_expert_all_to_all"), readable("lm_head")
    ('exposed expert all-to-all', 'LM head')
    """
    words = term.replace("all_to_all", "all-to-all").replace("_", " ")
    return {"lm head": "LM head", "mtp": "MTP", "dense ffn": "dense FFN"}.get(words, words)


def short(value: float, digits: int = 4) -> str:
    """A number with few digits; millions and more with the field's prefixes M, B and T.

    >>> short(2266213.8), short(16.934), short(671.03e9, 3), short(15360), short(0.0012)
    ('2.266 M', '16.93', '671 B', '15,360', '0.0012')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for factor, prefix in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if abs(value) >= factor:
            return short(value / factor, digits) + prefix
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(decimals, 12)}f}"
    return text.rstrip("0").rstrip(".") if abs(value) < 0.1 else text


def seconds(value: float) -> str:
    """A time in the unit that suits it.

    >>> seconds(16.934), seconds(0.0081), seconds(3.2e-5)
    ('16.93 s', '8.100 ms', '32.00 µs')
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= factor:
            return f"{short(value / factor)} {unit}"
    return f"{value * 1e6:g} µs"


def gibibytes(value: float) -> str:
    """A memory size given in GiB, in the unit that suits it.

    >>> gibibytes(24.41), gibibytes(0.05425)
    ('24.41 GiB', '55.55 MiB')
    """
    return f"{short(value)} GiB" if value >= 1 else f"{short(value * 1024)} MiB"


def duration(days: float) -> str:
    """A duration of a run.

    >>> duration(46.1062), duration(0.784)
    ('46.1 days', '18.8 hours')
    """
    return f"{short(days, 3)} days" if days >= 2 else f"{short(24 * days, 3)} hours"


def colorbar(title: str) -> dict[str, Any]:
    """A thin colour bar with its title along it."""
    return {"title": {"text": title, "side": "right", "font": {"size": 13}}, "thickness": 12, "outlinewidth": 0}


def styled(figure: go.Figure, title: str, *, height: int, **layout: Any) -> go.Figure:
    """Give a figure the common look: white ground, thin grid, no ornament, the title above the plot."""
    figure.update_layout(
        template="none",
        title={
            "text": title,
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 8},
            "font": {"size": 16},
        },
        font={"family": FONT, "size": 13, "color": BLACK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=height,
        hoverlabel={"font": {"family": FONT, "size": 12}, "bgcolor": "white"},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "traceorder": "normal"},
    )
    axis = {
        "gridcolor": "#ECEEF0",
        "zeroline": False,
        "linecolor": "#C8CCD0",
        "ticks": "",
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(**layout)
    return figure
