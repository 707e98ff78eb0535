"""The laws that tie fields together. Each has its own message that says what is wrong and the way out.

data        = ranks / (pipeline x tensor x context)
expert_data = ranks / (pipeline x expert x expert_tensor)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from simulator import errors
from simulator.errors import Problem
from simulator.spec import faults
from simulator.spec.hardware import HardwareProfile
from simulator.spec.parallelism import Parallelism, ScheduleFile
from simulator.spec.scenario import Scenario
from simulator.spec.training import BatchRamp

MAX_RANKS = 1_000_000
"""Ranks of the largest job that is placed: groups are lists of ranks."""


def broken(scenario: Scenario) -> Iterator[Problem]:
    """Every law that the scenario breaks."""
    yield from _model(scenario)
    yield from _grid(scenario)
    yield from _sharding(scenario)
    yield from _stages(scenario)
    yield from _batch(scenario)
    yield from _routing(scenario)
    yield from _hot_experts(scenario)
    yield from _cluster(scenario)
    yield from faults.broken(scenario.cluster)


def _model(scenario: Scenario) -> Iterator[Problem]:
    model, moe = scenario.model, scenario.model.moe
    kinds = {layer.ffn for layer in (*model.decoder_layers(), *model.encoder_layers())}
    if moe is not None:
        if moe.top_k > moe.experts:
            yield Problem("model.moe.top_k", f"top_k {moe.top_k} exceeds the {moe.experts} experts")
        if moe.first_dense_layers > model.layers:
            yield Problem(
                "model.moe.first_dense_layers",
                f"{moe.first_dense_layers} dense layers, but the model has {model.layers} layers",
            )
        elif "moe" not in kinds and model.pattern is None:
            yield Problem(
                "model.moe.stride",
                f"stride {moe.stride} after {moe.first_dense_layers} dense layers leaves no MoE layer in "
                f"{model.layers} layers",
            )
        if moe.router.group_limit and moe.router.group_limit > moe.router.groups:
            yield Problem(
                "model.moe.router.group_limit",
                f"{moe.router.group_limit} groups, but there are only {moe.router.groups}",
            )
        yield from _router(scenario)
        if moe.experts % moe.router.groups:
            yield Problem(
                "model.moe.router.groups", f"{moe.experts} experts do not divide into {moe.router.groups} groups"
            )
    elif "moe" in kinds:
        yield Problem("model.pattern", "the pattern has MoE layers, but model.moe is missing")
    if model.ffn is not None and model.ffn.size == "match_active" and moe is None:
        yield Problem("model.ffn.size", "match_active needs model.moe")
    if "dense" in kinds and model.ffn is None:
        yield Problem(
            "model.ffn", "the stack has dense layers, but model.ffn is missing; set model.ffn.size, or match_active"
        )
    if "moe" in kinds and moe is not None and moe.dense_residual and model.ffn is None:
        yield Problem("model.ffn", "dense_residual needs model.ffn.size")


def _router(scenario: Scenario) -> Iterator[Problem]:
    moe = scenario.model.moe
    assert moe is not None
    router = moe.router
    if router.branching is not None:
        root = round(moe.top_k**0.5)
        if moe.experts % router.branching:
            yield Problem(
                "model.moe.router.branching", f"{moe.experts} experts do not divide into {router.branching} groups"
            )
        if root * root != moe.top_k:
            yield Problem(
                "model.moe.router.branching", f"two levels choose a square number of experts, not top_k {moe.top_k}"
            )
    if router.group_limit and router.group_limit * (moe.experts // router.groups) < moe.top_k:
        reach = router.group_limit * (moe.experts // router.groups)
        yield Problem(
            "model.moe.router.group_limit",
            f"{router.group_limit} groups hold {reach} experts, fewer than top_k {moe.top_k}",
        )
    if moe.expert_ffn_size % scenario.parallelism.expert_tensor:
        yield Problem(
            "parallelism.expert_tensor",
            f"experts of width {moe.expert_ffn_size} do not divide over {scenario.parallelism.expert_tensor} ranks",
        )
    if scenario.parallelism.tensor > 1 and not scenario.parallelism.sequence_parallel:
        yield Problem(
            "parallelism.sequence_parallel",
            "tensor parallelism of a MoE model needs sequence_parallel: true, so that its ranks route different tokens",
        )


def _grid(scenario: Scenario) -> Iterator[Problem]:
    split, ranks, moe = scenario.parallelism, scenario.cluster.ranks, scenario.model.moe
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
    if split.expert > 1 and moe is None:
        yield Problem(
            "parallelism.expert", f"expert parallelism {split.expert}, but the model has no experts; use expert: 1"
        )
    if moe is not None and moe.experts % split.expert:
        ways = [n for n in _divisors(moe.experts) if ranks % (split.pipeline * n * split.expert_tensor) == 0]
        possible = f"; possible: {', '.join(map(str, ways[:20]))}" if ways else ""
        yield Problem("parallelism.expert", f"{moe.experts} experts do not divide over {split.expert} ranks{possible}")
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


def _routing(scenario: Scenario) -> Iterator[Problem]:
    routing, moe = scenario.routing, scenario.model.moe
    if routing.pad_to_capacity and routing.capacity_factor is None:
        yield Problem("routing.pad_to_capacity", "padding needs routing.capacity_factor")
    if routing.capacity_factor == "model" and (moe is None or moe.capacity_factor is None):
        yield Problem("routing.capacity_factor", "the model preset states no capacity factor; give a number or null")
    if routing.capacity_factor_evaluation == "model" and (moe is None or moe.capacity_factor_evaluation is None):
        yield Problem(
            "routing.capacity_factor_evaluation", "the model preset states no evaluation factor; give a number or null"
        )
    if routing.capacity_group_tokens == "model" and (moe is None or moe.capacity_group_tokens is None):
        yield Problem("routing.capacity_group_tokens", "the model preset states no group size; give a number or auto")
    placement, ranks = routing.placement, scenario.parallelism.expert
    if placement.redundant_experts and placement.kind != "balanced":
        yield Problem("routing.placement.redundant_experts", "copies of experts need placement kind balanced")
    if moe is not None and placement.redundant_experts and (moe.experts + placement.redundant_experts) % ranks:
        slots = moe.experts + placement.redundant_experts
        yield Problem(
            "routing.placement.redundant_experts",
            f"{moe.experts} experts and {placement.redundant_experts} copies make {slots} slots, which do not divide "
            f"over {ranks} expert ranks; nearest: {-(-slots // ranks) * ranks - moe.experts}",
        )
    kinds = [remedy.kind for remedy in routing.balance]
    for kind in dict.fromkeys(kind for kind in kinds if kinds.count(kind) > 1):
        yield Problem("routing.balance", f"{kind} is there {kinds.count(kind)} times; a mechanism acts once")
    for index, remedy in enumerate(routing.balance):
        if remedy.kind == "bias" and remedy.weight is not None:
            yield Problem(f"routing.balance.{index}.weight", "the bias has no weight; its step is gamma")
        if remedy.kind != "bias" and remedy.gamma is not None:
            yield Problem(f"routing.balance.{index}.gamma", f"a loss has no step; {remedy.kind} has a weight")


def _hot_experts(scenario: Scenario) -> Iterator[Problem]:
    load, moe = scenario.routing.load, scenario.model.moe
    hot = load.hot_experts if load.kind == "logits" else None
    if hot is None or moe is None:
        return
    most = moe.experts / max(moe.top_k, hot.count)  # a token chooses an expert once, and there are so many tokens
    if hot.count >= moe.experts:
        yield Problem("routing.load.hot_experts.count", f"{hot.count} hot experts, but there are {moe.experts}")
    elif hot.load > most:
        yield Problem(
            "routing.load.hot_experts.load", f"{hot.load:g} times the mean; {hot.count} experts can have {most:.4g}"
        )


def _cluster(scenario: Scenario) -> Iterator[Problem]:
    cluster = scenario.cluster
    profile = cluster.profile
    if cluster.stack is not None and cluster.stack not in profile.stacks:
        yield Problem("cluster.stack", errors.one_of(cluster.stack, profile.stacks, "stack"))
    if scenario.cost.price_per_accelerator_hour is None and profile.price is None:
        yield Problem(
            "cost.price_per_accelerator_hour", "the hardware profile has no price; give one, for example 2 USD"
        )
    if cluster.ranks > MAX_RANKS:
        yield Problem("cluster.accelerators", f"{cluster.ranks} ranks; at most {MAX_RANKS:,} are placed")
    last = profile.tiers[-1]
    if last.size is not None and cluster.accelerators > last.size:
        yield Problem(
            "cluster.accelerators",
            f"{cluster.accelerators} chips, but the outermost tier {last.name} joins {last.size}",
        )
    precision = scenario.training.precision
    dense = {"gemm": precision.gemm, "lm_head": precision.lm_head, "router": precision.router}
    unknown = list(_measured(profile, dense, profile.kernels.gemm, "matrix products"))
    yield from unknown
    if scenario.model.moe is not None and not unknown:
        yield from _measured(profile, {"gemm": precision.gemm}, profile.kernels.grouped_gemm, "expert products")
    if scenario.training.precision.attention not in ("bf16", "fp16", "fp32"):
        yield Problem("training.precision.attention", "the attention core is measured in bf16; use bf16, fp16 or fp32")
    if "bf16" not in profile.accelerator.peak:
        yield Problem("cluster.profile.accelerator.peak", "bf16 is required: MFU is stated over it")


def _divisors(number: int) -> list[int]:
    """Every divisor, ascending.

    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _measured(
    profile: HardwareProfile, formats: Mapping[str, str], curves: Collection[str], what: str
) -> Iterator[Problem]:
    """Refuse formats without a curve; FP16 runs on the same units at the same rate as BF16."""
    known = {*curves, *({"fp16"} if "bf16" in curves and "fp16" in profile.accelerator.peak else set())}
    for role, name in formats.items():
        if name not in known:
            yield Problem(f"training.precision.{role}", f"the profile has no {name} {what}; it has {', '.join(curves)}")
