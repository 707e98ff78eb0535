"""The ops of one chunk with local numbers, and how each kind of op joins them.

A chunk (one action of the pipeline schedule, or an overlapped pair) is a template that every microbatch repeats. Ops
are added with the data that they wait for; what blocks what beyond that is decided here: a collective that may not
overlap waits for the last compute op and is waited for by the next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from simulator import schedules
from simulator.layout import Layout
from simulator.program import sharding
from simulator.program.layer import Entry, Phase
from simulator.program.structure import COMPUTE, CONTEXT, EXPERT, PARAMETER, TENSOR, Draft, IntArray
from simulator.spec.scenario import Scenario
from simulator.timing.classes import Beside, Compute, Exchange, Fixed, OpClass, Region
from simulator.workload.ops import Collective

Shape = Literal["dispatch", "combine"]
FORWARD_INPUT, BACKWARD_INPUT = -1, -2
"""Stand-ins for what arrives from the neighbouring stages."""


@dataclass
class Template:
    """The ops of one chunk with local numbers."""

    streams: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)  # 0: the forward's microbatch and stage, 1: the backward's
    labels: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    entries: dict[int, list[int]] = field(default_factory=lambda: {FORWARD_INPUT: [], BACKWARD_INPUT: []})
    exits: dict[int, int] = field(default_factory=dict)  # side -> last op of its data chain
    weights: dict[int, int] = field(default_factory=dict)  # side -> last op that touches weight gradients

    @property
    def local_pairs(self) -> IntArray:
        """Dependencies between local numbers [pairs, 2]."""
        return np.array(self.pairs, dtype=np.int64).reshape(-1, 2)


class Writer:
    """Adds ops to a template.

    ``paired``: this chunk runs a forward beside a backward. ``gathers``: parameters arrive stretch by stretch, always
    under ZeRO 3, in the first forward after the optimizer under ZeRO 1 and 2. ``reduces``: gradients leave as soon as
    they are complete, always under ZeRO 2 and 3, in the last backward otherwise.
    """

    def __init__(
        self, scenario: Scenario, layout: Layout, draft: Draft, *, paired: bool, gathers: bool, reduces: bool
    ) -> None:
        self.scenario, self.layout, self.draft = scenario, layout, draft
        self.template = Template()
        self.exchanges = scenario.parallelism.expert > 1
        self.hidden = "expert_all_to_all" in layout.overlap
        self.paired = paired and self.hidden and self.exchanges
        # DualPipe's kernels leave the exchanges' multiprocessors free throughout a pair: all products of the trace
        # have grids of 112. Elsewhere an exchange takes them when it runs.
        self.delays = self.paired and scenario.parallelism.delay_weight_gradients
        self.reserved = self.paired and schedules.of(scenario.parallelism, layout.microbatches).pairs
        self.classes: list[OpClass] = []
        self.under_way: dict[int, list[int]] = {}  # exchanges that no op has needed yet, and the compute since
        self.during: dict[int, list[int]] = {}  # the same, complete
        self.zero = scenario.parallelism.zero_stage
        self.gathers, self.reduces = gathers, reduces
        self.by_block = gathers or reduces
        self.last_compute: int | None = None
        self.blocks_next: list[int] = []
        self.block: int | None = None
        self.before_block: list[int | None] = []  # for each block so far, the op before its first

    def compute(
        self, cls: Compute, after: list[int], side: int, label: str, needed: Sequence[Entry], *, block: int
    ) -> int:
        """One op on the compute stream; it waits for the parameters of ``needed`` where they are gathered."""
        if block != self.block:
            self.before_block.append(self.last_compute)
            self.block = block
        needs = [*after, *self.blocks_next]
        self.blocks_next = []
        if self.gathers and needed and (self.zero == 3 or side == 0):
            needs += self.gather(needed, side)
        number = self.add(COMPUTE, cls, needs, side, label)
        for compute in self.under_way.values():
            compute.append(number)
        self.last_compute = number
        return number

    def gather(self, needed: Sequence[Entry], side: int) -> list[int]:
        """Parameters of a stretch: under ZeRO 3 a few layers ahead of use, after the optimizer as early as possible."""
        held: int | None = None
        if self.zero == 3:
            sharded = self.scenario.parallelism.fully_sharded
            ahead = sharded.prefetch if sharded else 1
            if "parameter_gather" not in self.layout.overlap:
                held = self.last_compute
            elif len(self.before_block) > ahead:
                held = self.before_block[-1 - ahead]
        after = [] if held is None else [held]
        moves = sharding.gathers(self.scenario, self.layout, needed)
        return [self.add(PARAMETER, bulk, after, side, f"gather {group}") for group, bulk in moves]

    def exchange(
        self,
        phase: Phase,
        shape: Shape,
        after: list[int],
        side: int,
        *,
        again: bool = False,
        parts: int = 1,
        beside: bool = False,
    ) -> list[int]:
        """One expert all-to-all, or one of its parts; a whole one blocks the compute stream unless it may be hidden.

        ``beside``: compute is planned to run meanwhile.
        """
        op = phase.dispatch if shape == "dispatch" else phase.combine
        if not self.exchanges or op is None:
            return after
        cls = Exchange(shape, op, phase.stack, phase.layer, self.paired or beside, parts)
        blocks = not self.hidden and parts == 1
        held = [self.last_compute] if blocks and self.last_compute is not None else []
        kind = "again" if again else ("F", "B")[side]
        number = self.add(EXPERT, cls, [*after, *held], side, f"{shape} {kind}")
        if self.paired and not self.reserved:
            self.under_way[number] = self.during[number] = []
        if blocks:
            self.blocks_next.append(number)
        return [number]

    def region(
        self,
        entry: Entry,
        after: list[int],
        side: int,
        *,
        backward: bool,
        layer: int | None = None,
        parts: int = 1,
        blocks: bool = True,
    ) -> list[int]:
        """A collective of a tensor-, expert-tensor- or context-parallel group, or one of its parts.

        It blocks the compute stream unless it may run beside it.
        """
        op = entry.item.op
        assert isinstance(op, Collective)
        cls = Region(op, backward, entry.item.stack, layer, parts)
        held = [self.last_compute] if blocks and self.last_compute is not None else []
        number = self.add(CONTEXT if op.group == "context" else TENSOR, cls, [*after, *held], side, op.name)
        if blocks:
            self.blocks_next.append(number)
        return [number]

    def finish(self) -> Template:
        """Classes of all ops, now that it is known which communication is under way beside which of them."""
        met: dict[int, list[Beside]] = defaultdict(list)
        for number, compute in self.during.items():
            moving = self.classes[number]
            assert isinstance(moving, Exchange)
            beside = Beside(moving, tuple(cls for each in compute if isinstance(cls := self.classes[each], Compute)))
            for each in compute:
                met[each].append(beside)
        for number, cls in enumerate(self.classes):
            final = replace(cls, beside=tuple(met[number])) if number in met and isinstance(cls, Compute) else cls
            self.template.classes.append(self.draft.class_id(final))
        return self.template

    def done(self, after: list[int]) -> list[int]:
        """Ops after which all compute so far has ended, too."""
        if self.last_compute is None:
            return after
        return [*(each for each in after if each < 0 or self.template.streams[each] != COMPUTE), self.last_compute]

    def close(self, side: int, after: list[int]) -> None:
        """Mark the end of a data chain; a chunk without work still passes its input on."""
        if after[0] < 0 or len(after) > 1:
            after = [self.add(COMPUTE, Fixed("elementwise", 0.0), after, side, "pass on")]
        self.template.exits[side] = after[-1]

    def add(self, stream: int, cls: OpClass, after: list[int], side: int, label: str) -> int:
        """Append one op to the template."""
        template = self.template
        number = len(template.streams)
        template.streams.append(stream)
        self.classes.append(cls)
        template.sides.append(side)
        template.labels.append(self.draft.label_id(label))
        for need in after:
            self.under_way.pop(need, None)
            if need < 0:
                template.entries[need].append(number)
            else:
                template.pairs.append((number, need))
        return number
