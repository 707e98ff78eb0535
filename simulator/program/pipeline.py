"""Chunks in schedule order on every pipeline rank, joined by sends.

The forward of stage s on a microbatch waits for the message from stage s-1, the backward for that from stage s+1; the
last stage's backward waits for its own forward. A pair starts when both messages are there, as DualPipe's step does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from simulator.layout import Layout
from simulator.program.layer import StageWork, stage_work
from simulator.program.overlap import Chunk, interleave
from simulator.program.structure import COMPUTE, PIPELINE, Draft, IntArray, Program
from simulator.program.template import BACKWARD_INPUT, FORWARD_INPUT, Template
from simulator.schedules import Action, Overlapped, Schedule, Step, parts
from simulator.spec.scenario import Scenario
from simulator.timing.classes import Send

TemplateKey = tuple[tuple[str, int], ...]
Marks = tuple[bool, bool]


@dataclass
class Placed:
    """What later parts of the step need to know about the placed chunks.

    ``last_weights[(rank, stage)]``: last op that adds to the stage's weight gradients; ``last_compute[rank]``: the
    rank's last compute op.
    """

    last_weights: dict[tuple[int, int], int] = field(default_factory=dict)
    last_compute: dict[int, int] = field(default_factory=dict)


def place(scenario: Scenario, layout: Layout, schedule: Schedule, draft: Draft) -> Placed:
    """Write every chunk of the schedule into the draft."""
    works = [stage_work(scenario, layout, stage) for stage in layout.stages]
    templates: dict[tuple[TemplateKey, Marks], Template] = {}
    uses: dict[tuple[TemplateKey, Marks], list[tuple[int, int, int, int, int, int]]] = defaultdict(list)
    placed, arrivals = Placed(), _Arrivals(scenario, layout, schedule, draft, works)
    for rank in range(schedule.ranks):
        before: int | None = None
        for step, marks in zip(schedule.steps[rank], _marks(scenario, layout, schedule.steps[rank]), strict=True):
            key = (_key(step), marks)
            if key not in templates:
                templates[key] = _template(scenario, layout, draft, works, step, marks)
            template = templates[key]
            base = draft.reserve(len(template.streams))
            forward, backward = _sides(step)
            uses[key].append((base, rank, forward.microbatch, forward.stage, backward.microbatch, backward.stage))
            arrivals.step(step, template, base, rank)
            if 1 in template.weights:
                placed.last_weights[rank, backward.stage] = base + template.weights[1]
            if before is not None and "pipeline" not in layout.overlap:
                arrivals.block(before, base)
            before = base
            placed.last_compute[rank] = base + max(i for i, stream in enumerate(template.streams) if stream == COMPUTE)
    for key, places in uses.items():
        _stamp(draft, templates[key], np.array(places, dtype=np.int64))
    arrivals.join()
    return placed


def alone(scenario: Scenario, layout: Layout, step: Step) -> Program:
    """One chunk, or pair of chunks, by itself: its messages are there at the start, nothing is reduced or gathered."""
    draft = Draft(1)
    works = [stage_work(scenario, layout, stage) for stage in layout.stages]
    template = _template(scenario, layout, draft, works, step, (False, False))
    forward, backward = _sides(step)
    place = (
        draft.reserve(len(template.streams)),
        0,
        forward.microbatch,
        forward.stage,
        backward.microbatch,
        backward.stage,
    )
    _stamp(draft, template, np.array([place], dtype=np.int64))
    return draft.finish()


def _key(step: Step) -> TemplateKey:
    if isinstance(step, Overlapped):
        return ((step.forward.kind, step.forward.stage), (step.backward.kind, step.backward.stage))
    return ((step.kind, step.stage),)


def _sides(step: Step) -> tuple[Action, Action]:
    return (step.forward, step.backward) if isinstance(step, Overlapped) else (step, step)


def _marks(scenario: Scenario, layout: Layout, steps: Sequence[Step]) -> list[Marks]:
    """For each step of a rank: whether parameters are gathered in it, and whether gradients are reduced in it.

    Under ZeRO 3 (gather) and ZeRO 2 and 3 (reduce) always; otherwise, where that may overlap, in the first forward and
    the last backward of each stage.
    """
    zero = scenario.parallelism.zero_stage
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        for action in parts(step):
            if action.kind == "F":
                first.setdefault(action.stage, index)
            elif action.kind in "BW":
                last[action.stage] = index
    early = set(first.values()) if zero in (1, 2) and "parameter_gather" in layout.overlap else set()
    late = set(last.values()) if zero < 2 and "gradient_reduce" in layout.overlap else set()
    return [(zero == 3 or index in early, zero >= 2 or index in late) for index in range(len(steps))]


def _template(
    scenario: Scenario, layout: Layout, draft: Draft, works: list[StageWork], step: Step, marks: Marks
) -> Template:
    gathers, reduces = marks
    chunk = Chunk(scenario, layout, draft, paired=isinstance(step, Overlapped), gathers=gathers, reduces=reduces)
    if isinstance(step, Overlapped):
        interleave(_backward(chunk, works, step.backward), chunk.forward(works[step.forward.stage]))
        # Both messages are awaited before the pair starts.
        first = chunk.template.streams.index(COMPUTE)
        for entry in chunk.template.entries.values():
            entry.append(first)
    elif step.kind == "F":
        interleave(chunk.forward(works[step.stage]))
    else:
        interleave(_backward(chunk, works, step))
    if not chunk.template.streams:  # a stage whose W is empty
        chunk.close(1, [BACKWARD_INPUT])
        chunk.template.entries[BACKWARD_INPUT].clear()
    return chunk.finish()


def _backward(chunk: Chunk, works: list[StageWork], action: Action) -> Iterator[None]:
    return chunk.backward(works[action.stage], inputs=action.kind in "IB", weights=action.kind in "WB")


def _stamp(draft: Draft, template: Template, places: IntArray) -> None:
    """Write all uses of a template at once; ``places`` [uses, (base, rank, mb F, stage F, mb B, stage B)]."""
    count = len(template.streams)
    number = (places[:, :1] + np.arange(count)).ravel()
    side = np.array(template.sides)
    shape = (len(places), count)
    microbatch = np.where(side == 0, places[:, 2:3], places[:, 4:5])
    stage = np.where(side == 0, places[:, 3:4], places[:, 5:6])
    columns = (np.broadcast_to(np.array(values), shape).ravel() for values in (template.streams, template.classes))
    streams, classes = columns
    labels = np.broadcast_to(np.array(template.labels), shape).ravel()
    rank = np.broadcast_to(places[:, 1:2], shape).ravel()
    draft.rows(number, rank, streams, classes, microbatch.ravel(), stage.ravel(), labels)
    pairs = template.local_pairs
    if len(pairs):
        draft.depend((places[:, :1] + pairs[:, 0]).ravel(), (places[:, :1] + pairs[:, 1]).ravel())


class _Arrivals:
    """Collects who produces and who awaits the message of each (stage, microbatch), then joins them by sends."""

    def __init__(
        self, scenario: Scenario, layout: Layout, schedule: Schedule, draft: Draft, works: list[StageWork]
    ) -> None:
        self.layout, self.schedule, self.draft, self.works = layout, schedule, draft, works
        self.exits: dict[tuple[str, int, int], int] = {}
        self.waits: dict[tuple[str, int, int], list[int]] = defaultdict(list)
        self.blocked: list[tuple[int, int]] = []
        self.sent_from: dict[int, int] = {}

    def step(self, step: Step, template: Template, base: int, rank: int) -> None:
        """Note the exits and entries of one placed chunk."""
        for action in (step.forward, step.backward) if isinstance(step, Overlapped) else (step,):
            if action.kind == "W":
                continue
            side, entry, name = (0, FORWARD_INPUT, "F") if action.kind == "F" else (1, BACKWARD_INPUT, "B")
            place = (name, action.stage, action.microbatch)
            self.exits[place] = base + template.exits[side]
            self.sent_from[base + template.exits[side]] = base
            self.waits[place] += [base + local for local in template.entries[entry]]

    def block(self, before: int, base: int) -> None:
        """Without pipeline overlap, the next chunk waits for what the previous one sends."""
        self.blocked.append((before, base))

    def join(self) -> None:
        """Add the sends and all dependencies across chunks."""
        schedule, last = self.schedule, self.schedule.stages - 1
        messages: dict[int, list[int]] = defaultdict(list)
        joins = []
        for (name, stage, microbatch), ops in self.waits.items():
            source = self._source(name, stage, last)
            if source is not None:
                joins.append((self.exits[*source, microbatch], source[1], name, stage, microbatch, ops))
        for produced, origin, name, stage, microbatch, ops in sorted(joins):  # sends leave in the order of their chunks
            need = produced
            sender, receiver = schedule.rank_of(origin, microbatch), schedule.rank_of(stage, microbatch)
            if sender != receiver:
                need = self.draft.op(
                    rank=sender,
                    stream=PIPELINE,
                    cls=Send(self.works[min(origin, stage)].stack),
                    label=f"send {name}",
                    after=[produced],
                    microbatch=microbatch,
                    stage=origin,
                )
                messages[self.sent_from[produced]].append(need)
            for op in ops:
                self.draft.wait(op, need)
        for before, base in self.blocked:
            for message in messages[before]:
                self.draft.wait(base, message)

    @staticmethod
    def _source(name: str, stage: int, last: int) -> tuple[str, int] | None:
        """Whose exit an action awaits: F the previous stage's, B the next stage's, the last stage's B its own F."""
        if name == "F":
            return ("F", stage - 1) if stage > 0 else None
        return ("B", stage + 1) if stage < last else ("F", stage)
