"""What a page about a calibration shows, as plain numbers.

Measured against predicted times and relative errors by size come from the held-out shapes. Curves come from the fit to
all shapes, with the bounds of 90 % of the resampled fits: as a line over the bytes for what depends on bytes alone, and
case by case for products and attention, which depend on every side of their shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from validation.baselines import case_work
from validation.calibrate import Calibration
from validation.fitted import Curve
from validation.holdout import category

POINTS = 60
"""Points of a drawn line."""


def figure_data(calibration: Calibration) -> dict[str, Any]:
    """Title, facts, errors by category, held-out cases and curves."""
    environment = calibration.recording.environment
    threads = f"{environment.threads} thread" + ("" if environment.threads == 1 else "s")
    cores = [threads] if environment.kind == "cpu" else []
    facts = [environment.device, *cores, f"PyTorch {environment.torch}", environment.date[:10]]
    return {
        "title": f"Calibration: {environment.device}",
        "subtitle": " · ".join([*facts, f"{len(calibration.samples)} cases"]),
        "errors": [row.as_dict() for row in calibration.rows()],
        "held_out": _held_out(calibration),
        "curves": [_curve(calibration, curve) for curve in calibration.fitted.curves],
    }


def _held_out(calibration: Calibration) -> list[dict[str, Any]]:
    """Every held-out case of the first division that holds it."""
    seen, found = set[str](), list[dict[str, Any]]()
    for each in calibration.held:
        if each.sample.key in seen or not np.isfinite(each.predicted):
            continue
        seen.add(each.sample.key)
        found.append(
            {
                "kind": category(each.sample)[0],
                "label": each.sample.key[:100],
                "measured_s": each.sample.seconds,
                "predicted_s": each.predicted,
                "work": case_work(each.sample.kind, each.sample.case),
            }
        )
    return found


def _curve(calibration: Calibration, curve: Curve) -> dict[str, Any]:
    kind = curve.samples[0].kind
    amounts = np.array([case_work(kind, each.case) for each in curve.samples])
    points = [
        {"work": float(amount), "seconds": each.seconds, "label": each.key[:100]}
        for amount, each in zip(amounts, curve.samples, strict=True)
    ]
    cases = [each.case for each in curve.samples]
    lines = []
    if kind == "memory":
        sizes = _grid(amounts)
        for name, op in (("elementwise", "norm"), ("gather and scatter", "permute")):
            band = calibration.fitted.band(curve, [{"op": op, "bytes": size} for size in sizes])
            lines.append(_line(name, sizes, band))
    elif kind == "all_to_all":
        sizes = _grid(amounts[amounts > 1.0])
        for ranks in sorted({int(case["ranks"]) for case in cases}):
            sent = [[[size / ranks / (ranks - 1)] * ranks for _ in range(ranks)] for size in sizes]
            band = calibration.fitted.band(curve, [{"ranks": ranks, "sent": each} for each in sent])
            lines.append(_line(f"{ranks} ranks, equal", sizes, band))
    band = calibration.fitted.band(curve, cases)
    return {
        "name": curve.name,
        "kind": kind,
        "form": curve.form.name,
        "unit": {"memory": "B", "all_to_all": "B", "routing": "tokens"}.get(kind, "FLOP"),
        "points": points,
        "lines": lines,
        "fitted": _line("fitted", amounts, band),
        "left_out_error": dict(curve.errors),
        "parameters": [
            {"path": path, "value": value, "low": low, "high": high}
            for path, (value, low, high) in curve.intervals().items()
        ],
    }


def _grid(amounts: Any) -> list[float]:
    return [float(size) for size in np.geomspace(max(1.0, float(amounts.min())), float(amounts.max()), POINTS)]


def _line(name: str, work: Any, band: Any) -> dict[str, Any]:
    seconds, low, high = ([float(value) for value in row] for row in band)
    return {"name": name, "work": [float(size) for size in work], "seconds": seconds, "low": low, "high": high}


__all__ = ["figure_data"]
