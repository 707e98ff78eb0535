"""The laws that tie fields together. Each has its own message that says what is wrong and the way out.

Here are those of the model and of the cluster; the layout and routing have theirs in ``parallel_laws`` and
``routing_laws``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from simulator import errors
from simulator.errors import Problem
from simulator.spec import faults, parallel_laws, routing_laws
from simulator.spec.hardware import HardwareProfile
from simulator.spec.scenario import Scenario

MAX_RANKS = 1_000_000
"""Ranks of the largest job that is placed: groups are lists of ranks."""


def broken(scenario: Scenario) -> Iterator[Problem]:
    """Every law that the scenario breaks."""
    yield from _model(scenario)
    yield from parallel_laws.broken(scenario)
    yield from routing_laws.broken(scenario)
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


def _measured(
    profile: HardwareProfile, formats: Mapping[str, str], curves: Collection[str], what: str
) -> Iterator[Problem]:
    """Refuse formats without a curve; FP16 runs on the same units at the same rate as BF16."""
    known = {*curves, *({"fp16"} if "bf16" in curves and "fp16" in profile.accelerator.peak else set())}
    for role, name in formats.items():
        if name not in known:
            yield Problem(f"training.precision.{role}", f"the profile has no {name} {what}; it has {', '.join(curves)}")
