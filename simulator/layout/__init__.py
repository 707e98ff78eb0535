"""Who sits where: every ``auto`` of the parallelism section resolved once, into a frozen :class:`Layout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simulator import errors, schedules
from simulator.layout.grid import Grid, Span, check_folding, dense_grid, expert_grid, span
from simulator.layout.stages import assign, balance
from simulator.schedules import SCHEDULES, Schedule, check
from simulator.schedules.pairing import pair_neighbours
from simulator.spec.parallelism import ExpertChunks
from simulator.spec.scenario import Scenario
from simulator.workload.blocks import blocks as list_blocks
from simulator.workload.ops import Block


@dataclass(frozen=True)
class Layout:
    """The resolved placement of one scenario.

    ``spans`` maps a group name (tensor, context, data, gradient, expert, expert_tensor, expert_data, pipeline, and the
    shard and replica groups of dense and expert states, embedding: first and last stage) to its place in the network;
    ``stages`` maps each pipeline stage to the indices of its ``blocks``; ``expert_chunks``: parts in which a MoE layer
    exchanges and computes its rows.
    """

    dense: Grid
    expert: Grid
    spans: Mapping[str, Span]
    blocks: tuple[Block, ...]
    stages: tuple[tuple[int, ...], ...]
    microbatches: int
    overlap: frozenset[str]
    stage_replicas: int
    expert_chunks: int = 1

    @property
    def data(self) -> int:
        """Data-parallel ranks of the dense layers."""
        return self.dense.sizes["data"]

    @property
    def expert_data(self) -> int:
        """Data-parallel ranks of the expert layers."""
        return self.expert.sizes["expert_data"]

    @property
    def gradient_ranks(self) -> int:
        """Ranks that hold the same dense weights: data x context, twice under bidirectional pipelines."""
        return self.data * self.dense.sizes["context"] * self.stage_replicas

    @property
    def expert_gradient_ranks(self) -> int:
        """Ranks that hold the same expert weights."""
        return self.expert_data * self.stage_replicas


def resolve(scenario: Scenario) -> Layout:
    """Place the scenario on its ranks.

    Raises:
        InvalidInput: the two grids disagree, or the stages cannot be formed.
        NotSimulated: an overlap that no room models yet.
    """
    split, profile = scenario.parallelism, scenario.cluster.profile
    dense, expert = dense_grid(scenario), expert_grid(scenario)
    check_folding(dense, expert)
    groups = {
        "tensor": (dense, ["tensor"], "tensor"),
        "context": (dense, ["context"], "context"),
        "data": (dense, ["data"], "data"),
        "gradient": (dense, ["data", "context"], "data"),
        "pipeline": (dense, ["pipeline"], "pipeline"),
        "expert": (expert, ["expert"], "expert"),
        "expert_tensor": (expert, ["expert_tensor"], "tensor"),
        "expert_data": (expert, ["expert_data"], "data"),
    }
    axes: Mapping[str, tuple[str, ...]] = split.axes or {}  # type: ignore[assignment]
    spans = {
        name: span(grid.group(members), profile.tiers, profile.accelerator.ranks_per_accelerator, axes.get(torus))
        for name, (grid, members, torus) in groups.items()
    }
    microbatches = scenario.training.steady_batch_sequences // (
        dense.sizes["data"] * scenario.training.micro_batch_sequences
    )
    schedule = schedules.of(split, microbatches)
    sharded = split.fully_sharded
    for name, grid, members, ranks in (
        ("dense", dense, ["data", "context"], sharded.ranks if sharded else None),
        ("expert", expert, ["expert_data"], sharded.experts if sharded else None),
    ):
        group = grid.group(members)
        if schedule.bidirectional:  # the first stage lives on the last pipeline rank too
            mirror = (split.pipeline - 1) * grid.strides["pipeline"]
            group = np.concatenate([group, group + mirror])
        inside = ranks or len(group)
        shards = {"shard": group[:inside], "replica": group[::inside]}
        for kind, part in shards.items():
            spans[f"{name}_{kind}"] = span(
                part, profile.tiers, profile.accelerator.ranks_per_accelerator, axes.get("data")
            )
    ends = np.array([0, (split.pipeline - 1) * dense.strides["pipeline"]])
    spans["embedding"] = span(np.unique(ends), profile.tiers, profile.accelerator.ranks_per_accelerator, None)
    blocks = list_blocks(scenario)
    return Layout(
        dense=dense,
        expert=expert,
        spans=spans,
        blocks=blocks,
        stages=assign(scenario, blocks),
        microbatches=microbatches,
        overlap=_overlap(scenario, schedule),
        stage_replicas=2 if schedule.bidirectional else 1,
        expert_chunks=_expert_chunks(scenario),
    )


def _overlap(scenario: Scenario, schedule: Schedule) -> frozenset[str]:
    """Resolve ``overlap: auto`` and refuse what would silently have no effect."""
    split = scenario.parallelism
    if split.overlap == "auto":
        chosen = {"gradient_reduce", "parameter_gather", "pipeline", "tensor_backward"}
        names = chosen | ({"expert_all_to_all"} if schedule.pairs else set())
    else:
        names = _stated_overlap(scenario, split.overlap, schedule)
    if not split.delay_weight_gradients and not ("expert_all_to_all" in names and split.expert > 1):
        raise errors.NotSimulated(
            "parallelism.delay_weight_gradients: no forward runs beside a backward here, so there is nothing to delay; "
            "leave it out, or add expert_all_to_all to parallelism.overlap"
        )
    return frozenset(names)


def _stated_overlap(scenario: Scenario, items: Sequence[str | ExpertChunks], schedule: Schedule) -> set[str]:
    split = scenario.parallelism
    names: set[str] = {item for item in items if not isinstance(item, ExpertChunks)}
    for name, size in (("tensor", split.tensor), ("context", split.context)):
        if name in names and size == 1:
            raise errors.NotSimulated(
                f"parallelism.overlap: {name} has nothing to hide where parallelism.{name} is 1; leave it out"
            )
    if "expert_all_to_all" in names:
        _check_pairs(schedule)
        if _expert_chunks(scenario) > 1:
            raise errors.NotSimulated(
                "parallelism.overlap: expert_chunks hides an exchange under the experts of its own microbatch, "
                "expert_all_to_all under another microbatch; both at once are not simulated: choose one"
            )
    return names


def _check_pairs(schedule: Schedule) -> None:
    """Whether the schedule has pairs of a forward and a backward, or neighbours that can become such pairs."""
    if schedule.pairs:
        return
    hides = "parallelism.overlap: expert_all_to_all hides an exchange under another microbatch"
    if schedule.name == "1f1b" and schedule.ranks > 1:
        raise errors.NotSimulated(
            f"{hides}; in 1f1b each rank is one forward ahead of the next, so the pairs of two neighbours would take "
            "turns and the step twice as long; use schedule interleaved"
        )
    paired = pair_neighbours(schedule)
    if not paired.pairs:
        raise errors.NotSimulated(
            f"{hides}; in {schedule.name} with {schedule.microbatches} microbatches no full backward is followed by a "
            "forward; use interleaved, dualpipe or dualpipev, or 1f1b without a pipeline"
        )
    if schedule.name not in SCHEDULES:
        try:
            check(paired)
        except ValueError as why:
            raise errors.NotSimulated(f"{hides}; pairs of neighbours block each other: {why}") from None


def _expert_chunks(scenario: Scenario) -> int:
    """Parts of an expert phase; the largest wish counts."""
    wishes = scenario.parallelism.overlap
    return max((wish.expert_chunks for wish in wishes if isinstance(wish, ExpertChunks)), default=1)


__all__ = ["Grid", "Layout", "Span", "balance", "resolve"]
