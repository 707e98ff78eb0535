"""A played step: when every op started and ended, and what that time was spent on.

The time of a rank is what its compute stream does: kernels, by family, and gaps between them. Each gap is explained
by walking back along what the next kernel waited for: communication in flight is *exposed*, waiting for slower
members of a collective is *waiting*, and time in which a rank has nothing to do because other stages work is
*bubble*. The terms of every rank sum to the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from simulator.program import COMPUTE, EXPOSED, Program
from simulator.timing import Prices
from simulator.workload import Ledger

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

WAITING, BUBBLE = "waiting", "bubble"
REASONS = (*EXPOSED.values(), WAITING, BUBBLE)
"""Why a compute stream pauses."""
EXPLAINED_LANES = 8
"""Lanes of a group whose gaps are explained; the terms of each of them sum to the step."""


def rows_of(program: Program, prices: Prices) -> IntArray:
    """Price row of every op: its class's row for its microbatch [ops]."""
    return np.asarray(prices.row[program.cls] + program.microbatch % prices.rows[program.cls])


@dataclass(frozen=True)
class Gaps:
    """Pauses of the compute streams: the op that ends each, its explained lane, and seconds [gaps, reasons]."""

    op: IntArray
    lane: IntArray
    seconds: FloatArray


@dataclass(frozen=True)
class Timeline:
    """Start and end of every op in every lane [ops, lanes], in seconds."""

    program: Program
    prices: Prices
    start: FloatArray
    end: FloatArray

    @property
    def step_s(self) -> float:
        """Makespan of the step."""
        return float(self.end.max())

    @cached_property
    def lanes(self) -> IntArray:
        """Lanes that are explained."""
        count = self.start.shape[1]
        return np.unique(np.linspace(0, count - 1, min(count, EXPLAINED_LANES)).round().astype(np.int64))

    @cached_property
    def by_rank(self) -> dict[str, FloatArray]:
        """Every term by rank and explained lane [ranks, lanes]; the terms sum to :attr:`step_s`."""
        terms = self._busy()
        for name, values in self._gaps().items():
            terms[name] = terms.get(name, 0.0) + values
        return {name: np.asarray(values) for name, values in terms.items() if np.any(values)}

    @property
    def breakdown(self) -> Ledger:
        """Mean over ranks (of each expert group: over the explained lanes) of every term; sums to :attr:`step_s`."""
        return Ledger({name: float(values.mean()) for name, values in self.by_rank.items()})

    def _busy(self) -> dict[str, FloatArray]:
        """Time of compute kernels by family."""
        program, prices = self.program, self.prices
        compute = np.flatnonzero(program.stream == COMPUTE)
        pick = np.ix_(compute, self.lanes)
        durations = self.end[pick] - self.start[pick]
        classes = len(program.classes)
        keys = program.rank[compute] * classes + program.cls[compute]
        sums = np.zeros((program.ranks * classes, len(self.lanes)))
        np.add.at(sums, keys, durations)
        by_class = sums.reshape(program.ranks, classes, -1)
        by_family = np.einsum("rcl,cf->frl", by_class, prices.share)
        return {name: by_family[index] for index, name in enumerate(prices.families) if name != "barrier"}

    @cached_property
    def compute_order(self) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Compute ops rank by rank in the order of their streams, and which of them are the first of their rank."""
        program = self.program
        compute = np.flatnonzero(program.stream == COMPUTE)
        order = compute[np.lexsort((compute, program.rank[compute]))]
        return order, np.concatenate([[True], program.rank[order][1:] != program.rank[order][:-1]])

    @cached_property
    def gaps(self) -> Gaps:
        """Every pause of the compute streams in the explained lanes, by reason."""
        order, first = self.compute_order
        begin = self.start[np.ix_(order, self.lanes)]
        before = np.where(
            first[:, None],
            0.0,
            np.concatenate([np.zeros((1, len(self.lanes))), self.end[np.ix_(order[:-1], self.lanes)]]),
        )
        gap, lane = np.nonzero(begin - before > 1e-12)
        sums = np.zeros((len(gap), len(REASONS)))
        walk = _Walk(self, order[gap], lane, before[gap, lane])
        for reason, gaps, seconds in walk.steps():
            np.add.at(sums, (gaps, reason), seconds)
        return Gaps(order[gap], lane, sums)

    def _gaps(self) -> dict[str, FloatArray]:
        """Idle time of the compute streams by reason, rank and explained lane."""
        sums = np.zeros((self.program.ranks, len(self.lanes), len(REASONS)))
        np.add.at(sums, (self.program.rank[self.gaps.op], self.gaps.lane), self.gaps.seconds)
        return {name: sums[:, :, index] for index, name in enumerate(REASONS)}


class _Walk:
    """Explains gaps from their ends backwards, all at once."""

    def __init__(self, timeline: Timeline, op: IntArray, lane: IntArray, floor: FloatArray) -> None:
        self.timeline, self.program = timeline, timeline.program
        self.gap = np.arange(len(op))
        self.op, self.lane, self.floor = op, lane, floor
        self.top = timeline.start[op, timeline.lanes[lane]]
        self.streams = {stream: index for index, stream in enumerate(EXPOSED)}
        self.waiting, self.bubble = len(EXPOSED), len(EXPOSED) + 1

    def steps(self) -> Iterator[tuple[IntArray, IntArray, FloatArray]]:
        """Yield (reason, gap, seconds) arrays until every gap is explained to its floor."""
        timeline, program = self.timeline, self.program
        for _ in range(64):
            if len(self.gap) == 0:
                return
            binding, arrival = self._binding()
            reached = np.maximum(arrival, self.floor)
            yield self._charge(np.full(len(self.gap), self.waiting), self.top - reached)
            self.top = np.minimum(self.top, reached)
            stream = np.where(binding >= 0, program.stream[binding], COMPUTE)
            moving = stream != COMPUTE
            started = np.where(moving, timeline.start[binding, timeline.lanes[self.lane]], self.floor)
            reached = np.maximum(started, self.floor)
            term = np.array([self.streams.get(int(s), self.bubble) for s in range(8)])[stream]
            yield self._charge(term, self.top - reached)
            self.top = reached
            self._keep(moving & (self.top > self.floor + 1e-15), binding)
        yield self._charge(np.full(len(self.gap), self.bubble), self.top - self.floor)

    def _binding(self) -> tuple[IntArray, FloatArray]:
        """For each open gap the need that ended last in its lane, and when."""
        program, timeline = self.program, self.timeline
        begin, count = program.start[self.op], np.diff(program.start)[self.op]
        offsets = np.concatenate([[0], np.cumsum(count)])
        flat = np.repeat(begin - offsets[:-1], count) + np.arange(offsets[-1])
        needs = program.needs[flat]
        ends = timeline.end[needs, timeline.lanes[np.repeat(self.lane, count)]]
        binding = np.full(len(self.op), -1)
        arrival = np.zeros(len(self.op))
        some = count > 0
        if some.any():
            arrival[some] = np.maximum.reduceat(ends, offsets[:-1][some])
            owner = np.repeat(np.arange(len(self.op)), count)
            best = np.flatnonzero(ends >= arrival[owner])
            binding[owner[best][::-1]] = needs[best][::-1]
        return binding, arrival

    def _charge(self, reason: IntArray, seconds: FloatArray) -> tuple[IntArray, IntArray, FloatArray]:
        return reason, self.gap, np.maximum(seconds, 0.0)

    def _keep(self, still: npt.NDArray[np.bool_], binding: IntArray) -> None:
        self.gap, self.lane, self.floor, self.top = (
            self.gap[still],
            self.lane[still],
            self.floor[still],
            self.top[still],
        )
        self.op = binding[still]
