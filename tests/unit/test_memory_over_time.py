"""Memory over a played step: whatever the times are, the highest point of the curve is the ledger's peak."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from simulator import load_scenario, memory, simulate_step
from tests.scenarios import SCHEDULES, played

FOUR_STAGES = [
    *SCHEDULES,
    {"schedule": "1f1b", "layers_per_stage": [8, {"layers": 0}, {"layers": 0}, {"layers": 0}]},
]


@pytest.mark.parametrize("engine", ["events", "max-plus"])
@pytest.mark.parametrize("schedule", FOUR_STAGES, ids=str)
@pytest.mark.parametrize("changes", [{}, {"training.recompute": "full"}, {"parallelism.zero_stage": 3}], ids=str)
def test_the_peak_of_the_curve_is_the_peak_of_the_ledger(schedule: Any, engine: Any, changes: dict[str, Any]) -> None:
    step = played(schedule, engine, **changes)
    ledger = memory.peak(step.scenario, step.layout, step.schedule, step.load)
    assert step.memory == ledger
    for curve, held in zip(step.memory_curves, step.holdings, strict=True):
        assert curve.peak_bytes == pytest.approx(held.worst.peak_bytes, rel=1e-12)
    peaks = [curve.peak_bytes for curve in step.memory_curves]
    assert max(peaks) == pytest.approx(ledger.peak_bytes, rel=1e-12)


@pytest.mark.parametrize("schedule", FOUR_STAGES, ids=str)
def test_the_curve_runs_through_the_step_and_ends_where_it_began(schedule: Any) -> None:
    step = played(schedule, "events")
    for curve in step.memory_curves:
        assert (np.diff(curve.time) >= 0.0).all()
        assert (curve.time[0], curve.time[-1]) == (0.0, step.seconds)
        assert curve.saved[0] == curve.saved[-1] == 0.0
        assert (curve.saved >= 0.0).all()
        states = {"weights", "gradients", "optimizer"}
        static = sum(v for k, v in step.holdings[curve.rank].worst.terms.items() if k.split("_")[0] in states)
        assert curve.static_bytes == pytest.approx(static)


def test_every_forward_adds_and_every_release_takes_away() -> None:
    """1F1B on the last rank: one microbatch at a time; on the first four, and two turns per microbatch."""
    step = played({"schedule": "1f1b"})
    for curve, held in zip(step.memory_curves, step.holdings, strict=True):
        (size,) = (ledger.total for ledger in held.saved)
        counts = curve.saved / size
        assert counts == pytest.approx(np.round(counts))
        assert counts.max() == pytest.approx(4 - curve.rank)
        assert np.abs(np.diff(counts)).max() == pytest.approx(1.0)
        assert (np.diff(counts) > 0.5).sum() == (np.diff(counts) < -0.5).sum() == step.layout.microbatches


def test_deepseek_v3_holds_17_microbatches_on_its_worst_rank() -> None:
    step = simulate_step(load_scenario("deepseek-v3"), "max-plus")
    curve = step.memory_curves[step.memory.rank]
    assert curve.peak_bytes == pytest.approx(step.memory.peak_bytes, rel=1e-12)
    flat = curve.time[curve.saved > 0.9 * curve.saved.max()]
    assert flat.min() < 0.2 * step.seconds < 0.8 * step.seconds < flat.max()  # full through the steady state
