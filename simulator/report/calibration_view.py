"""A calibration and an imported trace in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from simulator.report.style import readable
from simulator.report.tables import number, pairs_table, stacked


def calibration_view(found: Mapping[str, Any]) -> RenderableType:
    """Errors by category beside the simple rules, then every fitted number with its interval."""
    rows = [
        (
            readable(row["name"]),
            str(row["cases"]),
            *(_share(row[name]) for name in ("profile", "median", "bias", "rate", "overhead", "noise")),
        )
        for row in found["errors"]
    ]
    heads = ("", "cases", "profile", "median", "bias", "one fixed rate", "rate and overhead", "noise")
    parts = [pairs_table("Mean absolute error on held-out shapes", rows, *heads)]
    parts.append(pairs_table("Fitted numbers", _parameters(found), "path", "form", "value", "90 % of resamples"))
    return stacked(parts)


def trace_view(found: Mapping[str, Any]) -> RenderableType:
    """Kernel time by piece, busy time by stream, and kernels that no pattern knows."""
    total = sum(piece["seconds"] for piece in found["pieces"].values())
    rows = [
        (readable(name), number(piece["seconds"], "s"), f"{piece['seconds'] / total:.1%}", str(piece["kernels"]))
        for name, piece in found["pieces"].items()
    ]
    what = "kernels" if found["device"] == "gpu" else "operators"
    parts = [pairs_table(f"Time of {what} by piece", rows, "", "time", "share", what)]
    streams = [(name, number(seconds, "s")) for name, seconds in found["streams"].items()]
    streams.append(("any of them", number(found["busy_union_s"], "s")))
    streams.append(("from first to last", number(found["span_s"], "s")))
    parts.append(pairs_table("Busy time", streams, "", "time"))
    if found["unknown"]:
        unknown = [(name[:110], number(seconds, "s")) for name, seconds in found["unknown"].items()]
        parts.append(pairs_table(f"Unknown {what}", unknown, "name", "time"))
    return Group(*parts)


def _parameters(found: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    rows = [
        (path, str(curve["form"]), *_numbers(each))
        for curve in found["curves"]
        for path, each in curve["parameters"].items()
    ]
    factors = found["factors"].items()
    return [
        *rows,
        *((name, "factor", *_numbers(each)) for name, each in factors),
    ]


def _numbers(each: Mapping[str, float]) -> tuple[str, str]:
    """Value and interval, in SI units."""
    return f"{each['value']:.4g}", f"{each['low']:.3g} to {each['high']:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


__all__ = ["calibration_view", "trace_view"]
