"""What every rank of the pipeline holds while the schedule runs, and the worst rank at its worst moment.

What stays and what lives for a moment count once, the saved tensors of a stage once for each microbatch in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.layout import Layout
from simulator.memory.moments import moment_terms
from simulator.memory.saved import received_rows, saved_bytes
from simulator.memory.states import static_terms
from simulator.routing import ExpertLoad
from simulator.schedules import Schedule, in_flight_by_stage
from simulator.spec.scenario import Scenario
from simulator.workload.ledger import Ledger


@dataclass(frozen=True)
class MemoryUse:
    """Memory of the worst rank."""

    rank: int
    terms: Ledger
    in_flight: float

    @property
    def peak_bytes(self) -> float:
        """Allocated bytes at the worst moment."""
        return self.terms.total


@dataclass(frozen=True)
class Holding:
    """What one rank holds: ``static`` and ``buffers`` throughout, ``saved`` of each microbatch in flight.

    ``saved``: by held stage; ``counts``: microbatches in flight while each step of the schedule runs [steps, stages].
    """

    rank: int
    static: Ledger
    buffers: Ledger
    saved: tuple[Ledger, ...]
    counts: npt.NDArray[np.int64]

    @property
    def worst(self) -> MemoryUse:
        """The worst moment of the schedule."""
        moment = (self.counts * [ledger.total for ledger in self.saved]).sum(axis=1).argmax()
        counts = self.counts[int(moment)]
        terms = self.static
        for count, ledger in zip(counts, self.saved, strict=True):
            terms += Ledger({f"saved_{name}": value * float(count) for name, value in ledger.items()})
        return MemoryUse(self.rank, terms + self.buffers, float(counts.sum()))


def peak(scenario: Scenario, layout: Layout, schedule: Schedule, load: ExpertLoad | None) -> MemoryUse:
    """Memory of the worst rank of the pipeline at its worst moment."""
    return worst(holding(scenario, layout, schedule, load))


def worst(holdings: Sequence[Holding]) -> MemoryUse:
    """The worst rank at its worst moment; of equal ranks the first."""
    return max((each.worst for each in holdings), key=lambda use: use.peak_bytes)


def holding(scenario: Scenario, layout: Layout, schedule: Schedule, load: ExpertLoad | None) -> tuple[Holding, ...]:
    """What every rank of the pipeline holds."""
    return tuple(_holding(scenario, layout, rank, schedule, load) for rank in range(schedule.ranks))


def _holding(scenario: Scenario, layout: Layout, rank: int, schedule: Schedule, load: ExpertLoad | None) -> Holding:
    counts = in_flight_by_stage(schedule, rank)
    stages = [layout.stages[stage] for stage in schedule.placement[rank]]
    most = zip(stages, counts.max(axis=0).tolist(), strict=True)
    received = [received_rows(layout, load, stage, held) for stage, held in most]
    saved = [saved_bytes(scenario, layout, stage, rows) for stage, rows in zip(stages, received, strict=True)]
    buffers = moment_terms(scenario, layout, stages, {k: v for rows in received for k, v in rows.items()})
    return Holding(rank, static_terms(scenario, layout, stages), buffers, tuple(saved), counts)
