"""What runs beside what: the chains of a chunk on their streams, alone or as an overlapped pair.

The forward and the backward are written as generators that pause wherever the other may take the compute stream;
:func:`interleave` deals the turns. With the backward first this is the order of DualPipe's training trace and of
Megatron-Core's combined 1F1B::

    compute  ... I,W(S')      F(S_0)     I,W(E')        F(E_0)      I,W(S')  ...
    expert       combine'(B)  dispatch(F)  dispatch'(B)  combine(F)

The last W of the backward waits until the forward has ended: it runs while both chains' messages travel.

Streams are in-order and only data dependencies hold, so exposed communication is an outcome, not an assumption. When
``expert_all_to_all`` is not among the overlaps, the exchange blocks the compute stream on both sides.

``expert_chunks`` is the overlap inside one microbatch (Tutel, arXiv 2206.03382): the rows of an expert phase in n equal
parts, all dispatches issued at once, each part's experts as soon as it is there, each part's combine as soon as it is
computed. Every part pays the latency of an exchange and computes smaller products::

    expert   D_1  D_2  D_3        C_1  C_2  C_3
    compute       E_1  E_2  E_3
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simulator.layout import Layout
from simulator.program.layer import Entry, Phase, StageWork, collective_of, has_work, runs
from simulator.program.segments import Segments
from simulator.program.structure import Draft
from simulator.program.template import BACKWARD_INPUT, FORWARD_INPUT, Shape
from simulator.spec.scenario import Scenario
from simulator.timing.classes import Beside, Compute, Exchange
from simulator.timing.kernels import Pass

_SHAPES: tuple[Shape, Shape] = ("dispatch", "combine")
Parts = list[list[int]]
"""For each part of an expert phase the ops that end it."""


class Chunk(Segments):
    """Writes the chains of one chunk into a template."""

    def __init__(
        self, scenario: Scenario, layout: Layout, draft: Draft, *, paired: bool, gathers: bool, reduces: bool
    ) -> None:
        super().__init__(scenario, layout, draft, paired=paired, gathers=gathers, reduces=reduces)
        self.parts = layout.expert_chunks if self.exchanges else 1

    # --- chains -------------------------------------------------------------------------------------------------------

    def forward(self, work: StageWork) -> Iterator[None]:
        """The forward chain; pauses after every exchange it has issued."""
        after = [FORWARD_INPUT]
        for segment, phase in zip(work.segments[:-1], work.phases, strict=True):
            after = self.dense(segment, "F", after, 0)
            sent = self.dispatch(phase, after, 0)
            shared = self.beside(phase, "F", after, 0)
            if self.parts == 1:
                yield
            back = self.routed(phase, "F", sent, 0)
            yield
            after = [*shared, *back]
        after = self.dense(work.segments[-1], "F", after, 0)
        self.close(0, after)

    def backward(self, work: StageWork, *, inputs: bool = True, weights: bool = True) -> Iterator[None]:
        """The backward chain: I and W together (B), I alone, or W alone."""
        after = [BACKWARD_INPUT]
        full, segment = False, work.segments[-1]
        for before, phase in zip(reversed(work.segments[:-1]), reversed(work.phases), strict=True):
            after = self.dense_backward(segment, after, inputs, weights, repeated=full)
            segment, full = before, phase.full_repeat
            if inputs:
                again = self.repeat(segment, phase, after) if full else [[]] * self.parts
                sent = self.dispatch(phase, self.ready(after), 1)
                shared = self.beside(phase, "I", after, 1)
                if self.parts == 1:
                    yield
                ready = [[*there, *repeated] for there, repeated in zip(sent, again, strict=True)]
                back = self.routed(phase, "I", ready, 1, weights=weights)
                yield
                after = [*shared, *back]
            elif weights:
                self.weigh(phase.entries, phase.layer)
                self.weigh(phase.beside, None)
        yield from self.last_backward(segment, after, inputs, weights, repeated=full)

    def ready(self, after: list[int]) -> list[int]:
        """What a message of a backward waits for: its data, and in a pair that does not delay them the W before it."""
        return self.done(after) if self.paired and not self.delays else after

    # --- pieces -------------------------------------------------------------------------------------------------------

    def dispatch(self, phase: Phase, after: list[int], side: int, *, again: bool = False) -> Parts:
        """Rows on their way to the experts, in one exchange or in parts. The first part finds no compute beside it."""
        return [
            self.exchange(phase, "dispatch", after, side, again=again, parts=self.parts, beside=index > 0)
            for index in range(self.parts)
        ]

    def routed(self, phase: Phase, which: Pass, sent: Parts, side: int, *, weights: bool = False) -> list[int]:
        """Experts and the exchange back, whole or part by part.

        Part n computes while part n+1 arrives, and while part n-1 leaves unless a W covers that. A whole exchange that
        may not be hidden leaves after the W.
        """
        if self.parts == 1:
            after = self.experts(phase, which, sent[0], side)
            if weights:
                self.weigh(phase.entries, phase.layer)
                self.weigh(phase.beside, None)
            return self.exchange(phase, "combine", self.ready(after) if weights else after, side)
        result: list[int] = []
        coming, leaving = (self.part_of(phase, shape) for shape in _SHAPES)
        for index, there in enumerate(sent):
            last = index == self.parts - 1
            beside = (*(() if last else coming), *(leaving if index and not weights else ()))
            after = self.experts(phase, which, there, side, beside)
            covered = weights or not last
            result += self.exchange(phase, "combine", after, side, parts=self.parts, beside=covered)
            if weights:
                self.weigh(phase.entries, phase.layer, self.parts, leaving)
        if weights:
            self.reduce(phase.entries)
        self.blocks_next.append(result[-1])  # hidden under its own microbatch only
        if weights:
            self.weigh(phase.beside, None)
        return result

    def part_of(self, phase: Phase, shape: Shape) -> tuple[Beside, ...]:
        """One part of an exchange, as compute meets it."""
        op = phase.dispatch if shape == "dispatch" else phase.combine
        return () if op is None else (Beside(Exchange(shape, op, phase.stack, phase.layer, True, self.parts)),)

    def experts(
        self, phase: Phase, which: Pass, after: list[int], side: int, beside: tuple[Beside, ...] = ()
    ) -> list[int]:
        """The expert part of a layer, with the collectives of expert-tensor parallelism around it."""
        if which == "I":
            after = self.repeat_regions(phase.entries, after, side, phase.layer, self.parts)
        parts = runs(phase.entries)
        for part in parts if which == "F" else reversed(parts):
            moving = collective_of(part)
            if moving is not None:
                backward = which == "I"
                after = self.region(moving, after, side, backward=backward, layer=phase.layer, parts=self.parts)
                continue
            again = tuple(entry.item for entry in part if entry.repeat) if which == "I" else ()
            items = tuple(entry.item for entry in part)
            cls = Compute(which, items, again, phase.layer, self.reserved, self.parts, beside)
            after = [self.compute(cls, after, side, f"{which} experts", part, block=part[0].block)]
        return after

    def beside(self, phase: Phase, which: Pass, source: list[int], side: int) -> list[int]:
        """Shared experts under the exchange that has just been issued, with their tensor-parallel collectives."""
        after: list[int] = []
        met = () if self.paired or not self.exchanges else self.part_of(phase, "dispatch")
        waiting, self.blocks_next = self.blocks_next, []
        parts = runs(phase.beside)
        if which == "I":
            for entry in (part[0] for part in parts if collective_of(part) is not None and part[0].repeat):
                after = self.region(entry, after or source, side, backward=False, blocks=False)
        for part in parts if which == "F" else reversed(parts):
            moving = collective_of(part)
            if moving is not None:
                after = self.region(moving, after or source, side, backward=which == "I", blocks=False)
            elif has_work(part):
                again = tuple(entry.item for entry in part if entry.repeat) if which == "I" else ()
                items = tuple(entry.item for entry in part)
                cls = Compute(which, items, again, None, self.reserved, 1, met)
                after = [self.compute(cls, after, side, f"{which} shared experts", part, block=part[0].block)]
        self.blocks_next = waiting
        return after

    def repeat(self, segment: Sequence[Entry], phase: Phase, after: list[int]) -> Parts:
        """Full recomputation: the segment's forward again, its collectives, and the dispatch."""
        after = self.repeat_regions(segment, after, 1)
        again = self.repeated_alone(segment)
        if again:
            cls = Compute("F", (), tuple(entry.item for entry in again), None, self.reserved)
            needed = [entry for entry in segment if entry in again or not entry.repeat]
            after = [self.compute(cls, after, 1, "recompute dense", needed, block=again[0].block)]
        return self.dispatch(phase, after, 1, again=True)


def interleave(*chains: Iterator[None]) -> None:
    """Run chains in turns, each to its next pause, until all are done."""
    waiting = list(chains)
    while waiting:
        for chain in list(waiting):
            if next(chain, _DONE) is _DONE:
                waiting.remove(chain)


_DONE = object()
