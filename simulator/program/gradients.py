"""The end of the step: gradient reduction, gradient norm, optimizer, parameter gather.

Dense gradients are reduced over every rank that holds the same dense weights (data x context), expert gradients over
the expert-data ranks. Where reduction and gather overlap compute, they are part of the last backward and of the first
forward of each stage, layer by layer; a gather after the optimizer of the previous step is then played at the start of
this one. What does not overlap stands here, after the last op of the rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from simulator.layout import Layout
from simulator.memory import shard_ranks, stage_parameters, state_bytes, table_copy
from simulator.program.pipeline import Placed
from simulator.program.sharding import Moves, replica_reductions, stage_gathers, stage_reductions, wire_bytes
from simulator.program.structure import COMPUTE, GRADIENT, PARAMETER, REPLICAS, Draft
from simulator.schedules import Schedule
from simulator.spec.scenario import Scenario
from simulator.timing.classes import Bulk, Fixed, Update


def finish_step(scenario: Scenario, layout: Layout, schedule: Schedule, draft: Draft, placed: Placed) -> None:
    """Add everything after the last backward that the chunks have not done beside their work."""
    zero = scenario.parallelism.zero_stage
    norm: list[int] = []
    for rank in range(schedule.ranks):
        ready = [_slowest_replica(scenario, layout, draft, rank, placed.last_compute[rank])]
        for stage in schedule.placement[rank]:
            if zero < 2 and "gradient_reduce" not in layout.overlap:
                ready += _bulks(draft, stage_reductions(scenario, layout, stage), "reduce", rank, GRADIENT, ready[:1])
            after = [placed.last_weights.get((rank, stage), ready[0])]
            ready += _bulks(draft, replica_reductions(scenario, layout, stage), "reduce", rank, GRADIENT, after)
        cls = Bulk("all_reduce", "gradient", 4.0)  # one number: its cost is the wait for the slowest rank
        norm.append(draft.op(rank=rank, stream=GRADIENT, cls=cls, label="gradient norm", after=ready))
    norm += _shared_table(scenario, layout, schedule, draft, placed)
    ends: list[int] = []
    for rank in range(schedule.ranks):
        held = schedule.placement[rank]
        cls_update = Update(_update_bytes(scenario, layout, held))
        ends.append(draft.op(rank=rank, stream=COMPUTE, cls=cls_update, label="optimizer", after=norm))
        if zero in (1, 2) and "parameter_gather" not in layout.overlap:
            for stage in held:
                ends += _bulks(draft, stage_gathers(scenario, layout, stage), "gather", rank, PARAMETER, ends[-1:])
    overhead = scenario.cluster.profile.stacks[scenario.cluster.stack_name].step_overhead
    for rank in range(schedule.ranks):
        if overhead is not None and overhead.value > 0:
            cls_stack = Fixed("stack", overhead.value)
            draft.op(rank=rank, stream=COMPUTE, cls=cls_stack, label="step overhead", after=ends)
        draft.op(rank=rank, stream=COMPUTE, cls=Fixed("barrier", 0.0), label="end of step", after=ends)


def _slowest_replica(scenario: Scenario, layout: Layout, draft: Draft, rank: int, last: int) -> int:
    """Where kernel times vary between replicas, every rank waits for the slowest; how long is a matter of prices."""
    jitter = scenario.cluster.profile.jitter
    if jitter is None or jitter.value == 0.0 or layout.expert_data == 1:
        return last
    return draft.op(rank=rank, stream=COMPUTE, cls=Fixed(REPLICAS, 0.0), label="wait for replicas", after=[last])


def _shared_table(scenario: Scenario, layout: Layout, schedule: Schedule, draft: Draft, placed: Placed) -> list[int]:
    """The gradients of a table that lives on the first and, as a copy, on the last pipeline rank are summed."""
    copies = {
        rank: table_copy(scenario, layout, [layout.stages[stage] for stage in held])
        for rank, held in enumerate(schedule.placement)
    }
    numbers = []
    for rank, count in copies.items():
        if count:
            bulk = Bulk("all_reduce", "embedding", count * wire_bytes(scenario))
            after = [placed.last_compute[rank], placed.last_compute[0]]
            numbers.append(draft.op(rank=rank, stream=GRADIENT, cls=bulk, label="reduce embedding table", after=after))
    return numbers


def _bulks(draft: Draft, moves: Moves, verb: str, rank: int, stream: int, after: Sequence[int]) -> list[int]:
    return [draft.op(rank=rank, stream=stream, cls=bulk, label=f"{verb} {group}", after=after) for group, bulk in moves]


def _update_bytes(scenario: Scenario, layout: Layout, stages: Sequence[int]) -> float:
    """Bytes the optimizer reads and writes on one rank: gradient, states twice, parameters, and what the software does.

    Megatron-Core zeroes and averages the whole buffer of gradients, takes the norm of its shard and clips it: three
    passes each, in kernels of their own (``gradient_passes`` of the stack).
    """
    zero = scenario.parallelism.zero_stage
    passes = scenario.cluster.profile.stacks[scenario.cluster.stack_name].gradient_passes
    beside = 0.0 if passes is None else passes.value
    held = [stage_parameters(scenario, layout, layout.stages[stage]) for stage in stages]
    dense = sum(each.dense for each in held) + table_copy(scenario, layout, [layout.stages[stage] for stage in stages])
    total = 0.0
    for group, count in (("dense", dense), ("expert", sum(each.expert for each in held))):
        size = state_bytes(scenario, group)
        shard = count / (shard_ranks(scenario, layout, group) if zero >= 1 else 1)
        total += shard * (size["gradients"] + 2.0 * size["optimizer"] + size["weights"])
        total += beside * size["gradients"] * (shard + (shard if zero >= 2 else count))
    return total
