"""The vocabulary of pipeline schedules: actions, the lists they form, and what those lists hold in flight.

A pipeline schedule is data. For every pipeline rank it says in which order the rank works, and says nothing about time:
durations, links and overlap gains belong to the rooms that play the lists. The letters are PyTorch's::

    F  forward of one stage for one microbatch            0F3   stage 0, microbatch 3
    I  backward for the input  (activation gradient)      4I0
    W  backward for the weight (parameter gradient)       4W0
    B  full backward, I and W together                    4B0
    (4F4;3B0)OVERLAP_F_B   a forward and a backward that run as one step, each hiding the other's communication

The zero-bubble papers write B for what is called I here.

Sources: the text form is that of ``torch.distributed.pipelining.schedules._Action``; the split of B into I and W is
from Qi et al., Zero Bubble Pipeline Parallelism (arXiv 2401.10241); the overlapped pair is from the DeepSeek-V3
technical report (arXiv 2412.19437), section 3.2.1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Kind: TypeAlias = Literal["F", "I", "W", "B"]


class Action(NamedTuple):
    """One piece of work of a rank: a pass of one stage over one microbatch.

    >>> str(Action(stage=0, kind="F", microbatch=3))
    '0F3'
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


class Overlapped(NamedTuple):
    """A forward and the backward of another microbatch, executed together as one step.

    >>> str(Overlapped(Action(4, "F", 4), Action(3, "B", 0)))
    '(4F4;3B0)OVERLAP_F_B'
    """

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


Step: TypeAlias = Action | Overlapped


def parts(step: Step) -> tuple[Action, ...]:
    """Return the actions of one step: itself, or the forward and the backward of an overlapped pair."""
    return (step.forward, step.backward) if isinstance(step, Overlapped) else (step,)


@dataclass(frozen=True)
class Schedule:
    """The order of work on every rank of one pipeline.

    ``steps[rank]`` is what the rank does, first to last. ``placement[rank]`` names the stages that the rank holds. A
    stage sits on one rank, except in bidirectional schedules (DualPipe), where rank r holds stages (r, P-1-r): the
    first entry serves microbatches 0 .. M/2-1, the second microbatches M/2 .. M-1, which travel the other way.
    """

    name: str
    ranks: int
    stages: int
    microbatches: int
    steps: tuple[tuple[Step, ...], ...]
    placement: tuple[tuple[int, ...], ...]

    def rank_of(self, stage: int, microbatch: int) -> int:
        """Return the rank on which a stage works on a microbatch."""
        holders = self.holders[stage]
        return holders[0] if microbatch < self.microbatches // 2 else holders[-1]

    @property
    def splits_backward(self) -> bool:
        """True when some backward is split into I and W."""
        return any(action.kind in "IW" for rank in range(self.ranks) for action in self.actions(rank))

    @cached_property
    def pairs(self) -> bool:
        """True when some forward and some backward run as one step."""
        return any(isinstance(step, Overlapped) for steps in self.steps for step in steps)

    @property
    def bidirectional(self) -> bool:
        """True when every stage is on two ranks, one for each direction of travel."""
        return len(self.holders[0]) == 2

    def actions(self, rank: int) -> Iterator[Action]:
        """Yield the rank's actions in order, overlapped pairs unpacked: forward, then backward."""
        for step in self.steps[rank]:
            yield from parts(step)

    @cached_property
    def holders(self) -> dict[int, tuple[int, ...]]:
        """Stage -> the ranks that hold it, in the order of the position at which they hold it."""
        found: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for rank, held in enumerate(self.placement):
            for position, stage in enumerate(held):
                found[stage].append((position, rank))
        return {stage: tuple(rank for _, rank in sorted(places)) for stage, places in found.items()}


def in_flight_by_stage(schedule: Schedule, rank: int) -> NDArray[np.int64]:
    """Return how many activations the rank holds while each of its steps runs: [steps, stages held].

    A forward adds one activation of its stage before its step, a release (W, or B unsplit) removes one after its step::

        held[n, s] = forwards of s in steps 0 .. n  -  releases of s in steps 0 .. n-1

    The columns follow ``placement[rank]``. Between I and W the activation counts as held, as the zero-bubble paper's
    memory limit does; what part of it is freed at I is the memory ledger's business.
    """
    column = {stage: index for index, stage in enumerate(schedule.placement[rank])}
    taken = np.zeros((len(schedule.steps[rank]), len(column)), dtype=np.int64)
    released = np.zeros_like(taken)
    for index, step in enumerate(schedule.steps[rank]):
        for action in parts(step):
            if action.kind == "F":
                taken[index, column[action.stage]] += 1
            elif action.kind in "WB":
                released[index, column[action.stage]] += 1
    return taken.cumsum(axis=0) - (released.cumsum(axis=0) - released)


def in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Return every rank's peak number of (stage, microbatch) activations held at one time.

    1F1B: P - r on rank r. ZB1P: P on every rank. DualPipe: P + 1 on every rank (arXiv 2412.19437, Table 2).
    """
    return tuple(int(in_flight_by_stage(schedule, rank).sum(axis=1).max()) for rank in range(schedule.ranks))
