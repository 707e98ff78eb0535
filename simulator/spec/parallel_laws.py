"""Laws of the parallel layout: what the ranks divide into, and what a schedule asks of stages and microbatches.

data        = ranks / (pipeline x tensor x context)
expert_data = ranks / (pipeline x expert x expert_tensor)

Both are whole, and so is every share of heads, experts and sequences that a rank gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from simulator import errors
from simulator.errors import Problem
from simulator.spec.parallelism import Parallelism, ScheduleFile
from simulator.spec.scenario import Scenario
from simulator.spec.training import BatchRamp


def broken(scenario: Scenario) -> Iterator[Problem]:
    """Every law of the parallel layout that the scenario breaks."""
    yield from _grid(scenario)
    yield from _experts(scenario)
    yield from _sharding(scenario)
    yield from _stages(scenario)
    yield from _batch(scenario)


def _grid(scenario: Scenario) -> Iterator[Problem]:
    split, ranks = scenario.parallelism, scenario.cluster.ranks
    dense = split.pipeline * split.tensor * split.context
    if ranks % dense:
        yield Problem(
            "parallelism",
            f"{ranks} ranks do not divide into pipeline {split.pipeline} x tensor {split.tensor} x context "
            f"{split.context} = {dense}; data = ranks / (pipeline x tensor x context) must be whole",
        )
    expert = split.pipeline * split.expert * split.expert_tensor
    if ranks % expert:
        yield Problem(
            "parallelism.expert",
            f"{ranks} ranks do not divide into pipeline {split.pipeline} x expert {split.expert} x expert_tensor "
            f"{split.expert_tensor} = {expert}; expert_data = ranks / (pipeline x expert x expert_tensor) must be "
            "whole",
        )
    mixer = scenario.model.mixer
    if mixer.heads and mixer.heads % split.tensor:
        yield Problem("parallelism.tensor", f"{mixer.heads} attention heads do not divide over tensor {split.tensor}")
    elif mixer.kind != "mla" and mixer.heads and mixer.key_value_heads % split.tensor:
        yield Problem(
            "parallelism.tensor",
            f"{mixer.key_value_heads} key and value heads do not divide over tensor {split.tensor}; copies of them are "
            "not simulated",
        )
    if sorted(split.rank_order) != ["context", "data", "expert", "pipeline", "tensor"]:
        yield Problem("parallelism.rank_order", "must name tensor, context, expert, data and pipeline once each")
    if split.expert_rank_order is not None and sorted(split.expert_rank_order) != [
        "expert",
        "expert_data",
        "expert_tensor",
        "pipeline",
    ]:
        yield Problem(
            "parallelism.expert_rank_order", "must name expert_tensor, expert, expert_data and pipeline once each"
        )


def _experts(scenario: Scenario) -> Iterator[Problem]:
    split, ranks, moe = scenario.parallelism, scenario.cluster.ranks, scenario.model.moe
    if moe is None:
        if split.expert > 1:
            yield Problem(
                "parallelism.expert", f"expert parallelism {split.expert}, but the model has no experts; use expert: 1"
            )
        return
    if moe.experts % split.expert:
        ways = [n for n in _divisors(moe.experts) if ranks % (split.pipeline * n * split.expert_tensor) == 0]
        possible = f"; possible: {', '.join(map(str, ways[:20]))}" if ways else ""
        yield Problem("parallelism.expert", f"{moe.experts} experts do not divide over {split.expert} ranks{possible}")
    if moe.expert_ffn_size % split.expert_tensor:
        yield Problem(
            "parallelism.expert_tensor",
            f"experts of width {moe.expert_ffn_size} do not divide over {split.expert_tensor} ranks",
        )
    if split.tensor > 1 and not split.sequence_parallel:
        yield Problem(
            "parallelism.sequence_parallel",
            "tensor parallelism of a MoE model needs sequence_parallel: true, so that its ranks route different tokens",
        )


def _sharding(scenario: Scenario) -> Iterator[Problem]:
    split, ranks, tiers = scenario.parallelism, scenario.cluster.ranks, scenario.cluster.profile.tiers
    sharded = split.fully_sharded
    if sharded is not None:
        if split.zero_stage != 3:
            yield Problem(
                "parallelism.fully_sharded", f"has no effect at zero_stage {split.zero_stage}; use zero_stage: 3"
            )
        data = ranks // (split.pipeline * split.tensor)  # context-parallel ranks hold the same weights
        expert_data = ranks // (split.pipeline * split.expert * split.expert_tensor)
        for path, size, whole in (("ranks", sharded.ranks, data), ("experts", sharded.experts, expert_data)):
            if size is not None and whole % size:
                yield Problem(
                    f"parallelism.fully_sharded.{path}",
                    f"{size} ranks do not divide the {whole} ranks that hold the same weights",
                )
    if split.axes is not None:
        names = "xyz"[: len(tiers[0].dims)] if tiers[0].dims else ""
        if not names:
            yield Problem("parallelism.axes", f"tier {tiers[0].name} is no torus; leave axes out")
        for group, axes in split.axes.items():
            for axis in axes if names else ():
                if axis not in names:
                    yield Problem(f"parallelism.axes.{group}", errors.one_of(axis, names, "axis"))


def _stages(scenario: Scenario) -> Iterator[Problem]:
    split, model = scenario.parallelism, scenario.model
    depth = model.layers + (model.encoder.layers if model.encoder else 0)
    stages = split.pipeline * split.virtual_stages
    if stages > depth + 2:
        yield Problem("parallelism.pipeline", f"{stages} stages, but the model has only {depth} layers")
    named = split.schedule if isinstance(split.schedule, str) else None
    if split.virtual_stages > 1 and named and named not in ("interleaved", "zbv", "dualpipev"):
        yield Problem(
            "parallelism.virtual_stages", f"schedule {split.schedule} has one stage per rank; use interleaved"
        )
    if split.virtual_stages == 1 and split.schedule == "interleaved":
        yield Problem("parallelism.virtual_stages", "interleaved needs at least 2; with 1 use schedule 1f1b")
    if split.schedule in ("zbv", "dualpipev") and split.virtual_stages != 2:
        yield Problem("parallelism.virtual_stages", f"schedule {split.schedule} needs exactly 2")
    if split.layers_per_stage == "auto":
        return
    counts = [item if isinstance(item, int) else item.layers for item in split.layers_per_stage]
    if len(counts) != stages:
        yield Problem(
            "parallelism.layers_per_stage", f"{len(counts)} items for {stages} stages (pipeline x virtual_stages)"
        )
    if sum(counts) != depth:
        yield Problem(
            "parallelism.layers_per_stage", f"the stages hold {sum(counts)} layers, but the model has {depth}"
        )


def _batch(scenario: Scenario) -> Iterator[Problem]:
    split, training = scenario.parallelism, scenario.training
    dense = split.pipeline * split.tensor * split.context
    if scenario.cluster.ranks % dense:
        return
    data = scenario.cluster.ranks // dense
    batch = training.global_batch_sequences
    sizes = (
        {"training.global_batch_sequences": batch}
        if isinstance(batch, int)
        else {
            "training.global_batch_sequences.from": batch.from_,
            "training.global_batch_sequences.to": batch.to,
        }
    )
    unit = data * training.micro_batch_sequences
    for path, sequences in sizes.items():
        if sequences % unit:
            below, above = sequences // unit * unit, (sequences // unit + 1) * unit
            near = f"{below} or {above}" if below else f"{above}"
            yield Problem(
                path,
                f"{sequences} sequences do not divide over {data} data-parallel ranks x "
                f"{training.micro_batch_sequences} sequences per microbatch; nearest: {near}",
            )
            continue
        yield from _schedule_domain(split, sequences // unit, path, unit)
    if isinstance(batch, BatchRamp) and isinstance(split.schedule, ScheduleFile):
        yield Problem(
            "parallelism.schedule.file",
            "a schedule file holds one number of microbatches, but the batch grows; use a named schedule",
        )
    if isinstance(batch, BatchRamp) and batch.from_ > batch.to:
        yield Problem("training.global_batch_sequences.from", f"the ramp falls from {batch.from_} to {batch.to}")
    if isinstance(batch, BatchRamp) and batch.until_tokens > training.tokens:
        yield Problem("training.global_batch_sequences.until_tokens", "the ramp is longer than the training")
    if not isinstance(training.sequence_length, int) and scenario.model.encoder is None:
        yield Problem("training.sequence_length", "a decoder-only model has one sequence length")
    lengths = [training.length(stack) for stack in ("encoder", "decoder")]
    if any(length % split.context for length in lengths):
        yield Problem(
            "parallelism.context", f"sequence {training.sequence_length} does not divide over context {split.context}"
        )


def _schedule_domain(split: Parallelism, microbatches: int, path: str, unit: int) -> Iterator[Problem]:
    ranks, name = split.pipeline, split.schedule
    if name in ("dualpipe", "dualpipev"):
        least = 2 * ranks
        if name == "dualpipe" and ranks % 2:
            yield Problem("parallelism.pipeline", f"DualPipe needs an even number of pipeline ranks, not {ranks}")
        if microbatches < least:
            yield Problem(
                path,
                f"{microbatches} microbatches per pipeline, but {name} needs at least 2 x {ranks} = {least}; "
                f"use a batch of at least {least * unit} sequences, fewer data-parallel ranks, or schedule 1f1b",
            )
        elif name == "dualpipe" and microbatches % 2:
            yield Problem(path, f"DualPipe needs an even number of microbatches, not {microbatches}")
    if name == "interleaved" and microbatches % ranks:
        yield Problem(
            path, f"interleaved needs microbatches ({microbatches}) that are a multiple of the pipeline ranks ({ranks})"
        )


def _divisors(number: int) -> list[int]:
    """Every divisor, ascending.

    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
