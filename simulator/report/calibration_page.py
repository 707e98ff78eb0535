"""A calibrated machine as a page: measured against predicted times, errors by size, fitted curves over the points.

The page is drawn from plain numbers (``validation.calibration_figures`` makes them), so that it needs no measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from simulator.campaign.result import simulator_version
from simulator.report.page import details, figure, filled, save, section, table
from simulator.report.style import BLACK, BLUE, GREY, ORANGE, QUALITATIVE, VERMILLION, readable, styled

Data = Mapping[str, Any]
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star", "hexagon")


def write_calibration(machines: Sequence[Data], path: str | Path) -> None:
    """Write the page of one or several machines."""
    sections = [part for number, machine in enumerate(machines) for part in _sections(machine, number, len(machines))]
    title = machines[0]["title"] if len(machines) == 1 else f"Calibration of {len(machines)} machines"
    subtitle = escape(machines[0]["subtitle"]) if len(machines) == 1 else ""
    save(path, filled(title, subtitle, escape(f"moesim {simulator_version()}"), sections))


def _sections(machine: Data, number: int, count: int) -> list[str]:
    name = "" if count == 1 else f"{escape(machine['title'].removeprefix('Calibration: '))}: "
    return [
        section(
            f"{name}Errors on held-out shapes",
            "Shapes are divided in halves four times; profile and simple rules are fitted to one half and predict the "
            "other. Mean absolute relative error; noise is the difference between two passes of the measurement.",
            table(
                ("", "cases", "profile", "median", "bias", "one fixed rate", "rate and overhead", "noise"),
                "lrrrrrrr",
                [_error_row(row) for row in machine["errors"]],
            ),
        ),
        section(
            f"{name}Measured against predicted",
            "One point for each held-out case, predicted by a fit that has not seen its shape. Lines: equal, and 10 % "
            "more or less.",
            figure(predicted_figure(machine["held_out"]), f"predicted{number}"),
        ),
        section(
            f"{name}Errors by size",
            "The same cases: relative error over FLOPs, or bytes for exchanges and memory-bound ops.",
            figure(residual_figure(machine["held_out"]), f"residuals{number}"),
        ),
        section(
            f"{name}Fitted curves",
            "Achieved rate of every measured case (dots), and of the fit to all of them, with the bounds of 90 % of "
            "the fits to resampled shapes: a line where the time depends on bytes alone, else a bar for each case.",
            *(
                figure(curve_figure(curve), f"curve{number}-{index}") + _parameters(curve)
                for index, curve in enumerate(machine["curves"])
            ),
        ),
    ]


def _error_row(row: Data) -> tuple[str, ...]:
    shares = (row["profile"], row["median"], row["bias"], row["rate"], row["overhead"], row["noise"])
    signed = (False, False, True, False, False, False)
    texts = (
        "" if share is None else f"{share:+.1%}" if sign else f"{share:.1%}"
        for share, sign in zip(shares, signed, strict=True)
    )
    return (escape(readable(row["name"])), str(row["cases"]), *texts)


def _kinds(held_out: Sequence[Data]) -> list[str]:
    return list(dict.fromkeys(each["kind"] for each in sorted(held_out, key=lambda each: str(each["kind"]))))


def predicted_figure(held_out: Sequence[Data]) -> go.Figure:
    """Measured against predicted seconds, both logarithmic."""
    drawn = go.Figure()
    ends = [min(each["measured_s"] for each in held_out), max(each["measured_s"] for each in held_out)]
    for factor, dash in ((1.0, "solid"), (1.1, "dot"), (1 / 1.1, "dot")):
        drawn.add_scatter(
            x=ends,
            y=[end * factor for end in ends],
            mode="lines",
            line={"color": GREY, "width": 1, "dash": dash},
            hoverinfo="skip",
            showlegend=False,
        )
    _add_kinds(drawn, held_out, "measured_s", lambda each: each["predicted_s"])
    styled(drawn, "Seconds", height=560, margin={"l": 80, "r": 20, "t": 110, "b": 60})
    drawn.update_xaxes(type="log", title_text="measured, s", exponentformat="power", dtick=1)
    drawn.update_yaxes(type="log", title_text="predicted, s", exponentformat="power", dtick=1)
    return drawn


def residual_figure(held_out: Sequence[Data]) -> go.Figure:
    """Relative error over size."""
    drawn = go.Figure()
    drawn.add_hline(y=0, line={"color": GREY, "width": 1})
    _add_kinds(drawn, held_out, "work", lambda each: each["predicted_s"] / each["measured_s"] - 1.0)
    styled(drawn, "Predicted over measured, less 1", height=460, margin={"l": 80, "r": 20, "t": 110, "b": 60})
    drawn.update_xaxes(type="log", title_text="FLOPs or bytes", exponentformat="power", dtick=2)
    drawn.update_yaxes(title_text="relative error", tickformat="+.0%", range=_clipped(held_out))
    return drawn


def _clipped(held_out: Sequence[Data]) -> list[float]:
    """An axis that shows all but the worst fiftieth."""
    size = sorted(abs(each["predicted_s"] / each["measured_s"] - 1.0) for each in held_out)
    most = max(0.1, 1.15 * size[int(0.98 * (len(size) - 1))])
    return [-min(1.0, most), most]


def _add_kinds(drawn: go.Figure, held_out: Sequence[Data], x: str, y: Any) -> None:
    for index, kind in enumerate(_kinds(held_out)):
        members = [each for each in held_out if each["kind"] == kind]
        drawn.add_scatter(
            x=[each[x] for each in members],
            y=[y(each) for each in members],
            mode="markers",
            name=readable(kind),
            marker={
                "size": 7,
                "opacity": 0.7,
                "color": QUALITATIVE[index % len(QUALITATIVE)],
                "symbol": SYMBOLS[(index // len(QUALITATIVE)) % len(SYMBOLS)],
            },
            text=[each["label"] for each in members],
            hovertemplate="%{text}<br>%{x:.3g}, %{y:.3g}<extra></extra>",
        )


def curve_figure(curve: Data) -> go.Figure:
    """Achieved rate over size: measured dots, fitted line with its band, or a bar for each case."""
    drawn = go.Figure()
    if curve["lines"]:
        for line, colour in zip(curve["lines"], (BLUE, ORANGE, VERMILLION, BLACK), strict=False):
            _add_band(drawn, line, colour)
    else:
        fitted = curve["fitted"]
        rates = [_rate(fitted["work"], fitted[name]) for name in ("seconds", "high", "low")]
        drawn.add_scatter(
            x=fitted["work"],
            y=rates[0],
            mode="markers",
            name="fitted",
            marker={"symbol": "line-ew-open", "size": 9, "color": BLUE},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [most - middle for middle, most in zip(rates[0], rates[2], strict=True)],
                "arrayminus": [middle - least for middle, least in zip(rates[0], rates[1], strict=True)],
                "width": 0,
                "thickness": 3,
                "color": "rgba(0,114,178,0.35)",
            },
            hovertemplate="%{x:.3g}: %{y:.3g}<extra>fitted</extra>",
        )
    points = [each for each in curve["points"] if each["work"] > 1.0]
    drawn.add_scatter(
        x=[each["work"] for each in points],
        y=[each["work"] / each["seconds"] for each in points],
        mode="markers",
        name="measured",
        marker={"size": 6, "color": BLACK, "opacity": 0.6},
        text=[each["label"] for each in points],
        hovertemplate="%{text}<br>%{x:.3g}: %{y:.3g}<extra></extra>",
    )
    name = curve["name"].replace("grouped_gemm", "expert products").replace("gemm", "products")
    title = f"{readable(name.replace('.', ', '))}: form {curve['form']}"
    styled(drawn, title, height=420, margin={"l": 80, "r": 20, "t": 80, "b": 60})
    size = {"B": "bytes", "FLOP": "FLOPs"}.get(curve["unit"], curve["unit"])
    drawn.update_xaxes(type="log", title_text=size, exponentformat="power", dtick=1)
    drawn.update_yaxes(type="log", title_text=f"{curve['unit']}/s", exponentformat="SI")
    return drawn


def _add_band(drawn: go.Figure, line: Data, colour: str) -> None:
    rates = {name: _rate(line["work"], line[name]) for name in ("seconds", "low", "high")}
    drawn.add_scatter(
        x=[*line["work"], *reversed(line["work"])],
        y=[*rates["high"], *reversed(rates["low"])],
        fill="toself",
        fillcolor=colour,
        opacity=0.2,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )
    drawn.add_scatter(
        x=line["work"], y=rates["seconds"], mode="lines", name=line["name"], line={"color": colour, "width": 2}
    )


def _rate(work: Sequence[float], seconds: Sequence[float]) -> list[float]:
    return [amount / time for amount, time in zip(work, seconds, strict=True)]


def _parameters(curve: Data) -> str:
    rows = [
        (escape(each["path"]), f"{each['value']:.4g}", f"{each['low']:.3g} to {each['high']:.3g}")
        for each in curve["parameters"]
    ]
    errors = ", ".join(f"{escape(name)} {share:.1%}" for name, share in curve["left_out_error"].items() if share < 1e6)
    chosen = f"<p>Error of each form on left-out shapes: {errors}.</p>" if errors else ""
    return details(
        "Parameters with intervals", chosen + table(("parameter", "value", "90 % of resamples"), "lrr", rows)
    )


__all__ = ["curve_figure", "predicted_figure", "residual_figure", "write_calibration"]
