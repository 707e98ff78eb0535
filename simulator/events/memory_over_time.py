"""Memory of every rank over a played step.

The rule is the ledger's: what a microbatch saves is held from the start of the step of the schedule that runs its
forward to the end of the step that releases it (W, or B unsplit). States and buffers are there throughout. So the peak
of the curve is the ledger's peak, whatever the times are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simulator.events.actions import spans
from simulator.events.timeline import FloatArray, Timeline
from simulator.memory import Holding
from simulator.schedules import Schedule, parts


@dataclass(frozen=True)
class MemoryCurve:
    """Bytes of one rank: ``saved`` [points] from each of ``time`` [points] to the next; the rest is constant."""

    rank: int
    time: FloatArray
    saved: FloatArray
    static_bytes: float
    buffer_bytes: float

    @property
    def bytes(self) -> FloatArray:
        """All bytes from each point in time on."""
        return np.asarray(self.static_bytes + self.buffer_bytes + self.saved)

    @property
    def peak_bytes(self) -> float:
        """Highest point."""
        return float(self.bytes.max())


def memory_over_time(
    timeline: Timeline, schedule: Schedule, holdings: Sequence[Holding], lane: int = 0
) -> tuple[MemoryCurve, ...]:
    """The curve of every rank, timed in one lane."""
    return tuple(
        _curve(timeline, schedule, holding, span)
        for holding, span in zip(holdings, spans(timeline, schedule, lane), strict=True)
    )


def _curve(timeline: Timeline, schedule: Schedule, holding: Holding, span: FloatArray) -> MemoryCurve:
    """While a step runs its count holds; between two steps, what the next one holds without what it adds."""
    size = np.array([ledger.total for ledger in holding.saved])
    column = {stage: index for index, stage in enumerate(schedule.placement[holding.rank])}
    taken = np.zeros_like(holding.counts)
    for index, step in enumerate(schedule.steps[holding.rank]):
        for action in parts(step):
            if action.kind == "F":
                taken[index, column[action.stage]] += 1
    between = np.concatenate([(holding.counts - taken)[1:], np.zeros((1, len(size)), dtype=np.int64)])
    levels = np.stack([holding.counts @ size, between @ size], axis=1)
    return MemoryCurve(
        holding.rank,
        np.concatenate([[0.0], span.ravel(), [timeline.step_s]]),
        np.concatenate([[0.0], levels.ravel(), [0.0]]),
        holding.static.total,
        holding.buffers.total,
    )


__all__ = ["MemoryCurve", "memory_over_time"]
