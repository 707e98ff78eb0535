"""Schedules replayed with fixed durations: what an order of execution is worth, free of models, kernels and networks.

A schedule becomes a Program: one op per step on the rank's compute stream, and one on its pipeline stream where a
message crosses ranks. F, I and W are the times of one stage; an overlapped pair takes its own time, starts when both
its parts can, and ends both at once. A message leaves when its producer ends and takes a latency; the messages of a
rank follow one another, and what a pair hands to one rank is one message.

Two bubbles are told apart. That of the makespan is idle time between the global start and the global end: what a step
pays that ends with a barrier. That of a rank's own span is idle time between its first and its last op: the notion of
the zero-bubble papers (arXiv 2401.10241), whose optimizer step needs no barrier.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from simulator import schedules
from simulator.events import Timeline, evaluate
from simulator.program import COMPUTE, PIPELINE, Draft, Program
from simulator.schedules import Overlapped, Schedule, Step
from simulator.timing import Fixed, Prices

Engine = Callable[[Program, Prices], Timeline]
Output = tuple[str, int, int]
"""What a step hands on: F or I, stage, microbatch."""


@dataclass(frozen=True)
class Times:
    """Durations of a stage: forward, input gradient, weight gradient, overlapped pair, and a message between ranks."""

    f: float = 10
    i: float = 10
    w: float = 10
    pair: float = 30
    message: float = 0

    def of(self, step: Step) -> float:
        """Return the duration of one step.

        >>> Times(10, 13, 8).of(schedules.Action(0, "B", 0))
        21
        """
        if isinstance(step, Overlapped):
            return self.pair
        return {"F": self.f, "I": self.i, "W": self.w, "B": self.i + self.w}[step.kind]


@dataclass(frozen=True)
class Replayed:
    """Makespan, idle time of every rank in both notions, and the activations that every rank holds at most."""

    makespan: float
    makespan_bubble: list[float]
    span_bubble: list[float]
    in_flight: list[int]


def replay(schedule: Schedule, times: Times | None = None, engine: Engine = evaluate) -> Replayed:
    """Play a schedule and measure it.

    >>> replay(schedules.build("zb1p", 4, 8)).span_bubble
    [30.0, 20.0, 10.0, 0.0]
    """
    timeline = played(schedule, times, engine)
    program = timeline.program
    whole, own = [], []
    for rank in range(program.ranks):
        ops = np.flatnonzero((program.rank == rank) & (program.stream == COMPUTE))
        start, end = timeline.start[ops, 0], timeline.end[ops, 0]
        busy = float((end - start).sum())
        whole.append(timeline.step_s - busy)
        own.append(float(end.max() - start.min()) - busy)
    return Replayed(timeline.step_s, whole, own, list(schedules.in_flight(schedule)))


def played(schedule: Schedule, times: Times | None = None, engine: Engine = evaluate) -> Timeline:
    """Play a schedule."""
    program = program_of(schedule, times or Times())
    return engine(program, price(program))


def price(program: Program) -> Prices:
    """Fixed classes cost what they say, in one lane and without links."""
    seconds = np.array([[each.seconds] for each in program.classes if isinstance(each, Fixed)])
    count, none = len(seconds), np.zeros((len(seconds), 1))
    return Prices(
        row=np.arange(count),
        rows=np.ones(count, dtype=np.int64),
        seconds=seconds,
        latency=none[:, 0],
        flow_seconds=none,
        flow_demand=none + 1.0,
        share=none + 1.0,
        families=("work",),
    )


def program_of(schedule: Schedule, times: Times) -> Program:
    """The action lists as ops; dependencies come last, since outputs of other ranks are known only then."""
    draft = Draft(schedule.ranks)
    made: dict[Output, tuple[int, int]] = {}
    awaited: list[tuple[int, int, Output]] = []
    for rank, steps in enumerate(schedule.steps):
        for step in steps:
            op = draft.op(rank=rank, stream=COMPUTE, cls=Fixed("work", times.of(step)), label=str(step), after=())
            awaited += [(op, rank, need) for need in _needs(step, schedule.stages - 1)]
            made |= {
                ("F" if kind == "F" else "I", stage, microbatch): (op, rank)
                for stage, kind, microbatch in schedules.parts(step)
                if kind != "W"
            }
    sends: defaultdict[tuple[int, int], int] = defaultdict(int)
    sender_of = dict(made.values())
    for maker, receiver in sorted({(made[need][0], rank) for _, rank, need in awaited if made[need][1] != rank}):
        message = Fixed("message", times.message)
        sends[maker, receiver] = draft.op(
            rank=sender_of[maker], stream=PIPELINE, cls=message, label="send", after=[maker]
        )
    for op, rank, need in awaited:
        maker, sender = made[need]
        draft.depend(np.array([op]), np.array([maker if sender == rank else sends[maker, rank]]))
    return draft.finish()


def _needs(step: Step, last: int) -> Iterator[Output]:
    """The outputs that a step awaits; the order on its own rank is the stream's business."""
    for stage, kind, microbatch in schedules.parts(step):
        if kind == "F" and stage > 0:
            yield "F", stage - 1, microbatch
        elif kind in "IB":
            yield ("I", stage + 1, microbatch) if stage < last else ("F", stage, microbatch)
