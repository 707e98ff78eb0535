"""Slots of the experts, and the one-hot masks that bring tokens into them.

Tokens that share one capacity are a capacity group of S tokens; an expert has C slots for it. Where a compiler wants
fixed shapes, tokens are not gathered by index. The router makes masks [S, E, C] over the E experts, one with ones and
one with the router's weights, and two products move the tokens (GShard, arXiv 2006.16668, algorithm 2):

    dispatch   [S, E C]^T x [S, M] -> slots [E C, M]         combine   [S, E C] x [E C, M] -> tokens [S, M]

of 2 S E C M FLOPs each. C grows with S, so the work of a token grows with its group: 2 M x factor x S a product. That
is why these systems cut the tokens of a rank into groups: ``group_size`` in Mesh-TensorFlow (tensorflow/mesh,
mesh_tensorflow/transformer/moe.py: 1024 unless told otherwise), ``max_group_size`` in google/flaxformer, a sequence in
MaxText, the whole microbatch of a rank in DeepSpeed-MoE (deepspeed/moe/sharded_moe.py). A group is as large as it may
be and lies on one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from simulator.spec.scenario import Scenario


@dataclass(frozen=True)
class Mask:
    """One-hot mask of a capacity group: [tokens, slots], slots those of all experts, E C."""

    tokens: int
    slots: int


def slots(
    capacity_factor: float, tokens: int, top_k: int, experts: int, *, counts_top_k: bool = True, least: int = 1
) -> int:
    """Capacity of one expert for a group of tokens, not below ``least``; with the number of devices that of one device.

    C = ceil(capacity_factor x T x top_k / experts)        (Switch, arXiv 2101.03961, equation 3, times top_k)

    >>> slots(1.25, 4096, 1, 64)
    80
    >>> slots(1.25, 128, 1, 64, least=4)
    4
    """
    return max(least, math.ceil(round(capacity_factor * tokens * (top_k if counts_top_k else 1) / experts, 9)))


def capacity_factor(scenario: Scenario) -> float | None:
    """The capacity factor in force; None when no token is dropped."""
    moe, routing = scenario.model.moe, scenario.routing
    if routing.capacity_factor == "model":
        assert moe is not None  # a law of the scenario
        return moe.capacity_factor
    return routing.capacity_factor


def tokens_per_rank(scenario: Scenario, stack: str = "decoder") -> float:
    """Distinct tokens of one microbatch on one rank in the expert part."""
    split, training = scenario.parallelism, scenario.training
    return training.micro_batch_sequences * training.length(stack) / (split.context * split.tensor)


def one_hot_mask(scenario: Scenario, stack: str) -> Mask | None:
    """The mask of one capacity group of a stack; None where tokens are gathered by index.

    The tokens of a rank are cut into as few equal groups as ``routing.capacity_group_tokens`` allows.
    """
    moe, routing, factor = scenario.model.moe, scenario.routing, capacity_factor(scenario)
    if moe is None or factor is None or routing.dispatch != "one_hot":
        return None
    held, most = tokens_per_rank(scenario, stack), routing.capacity_group_tokens
    largest = moe.capacity_group_tokens if most == "model" else None if most == "auto" else most
    groups = 1 if largest is None else math.ceil(held / largest)
    tokens = max(1, round(held / groups))
    each = slots(
        factor,
        tokens,
        moe.top_k,
        moe.experts,
        counts_top_k=routing.capacity_counts_top_k,
        least=routing.min_expert_capacity,
    )
    return Mask(tokens, moe.experts * each)


__all__ = ["Mask", "capacity_factor", "one_hot_mask", "slots", "tokens_per_rank"]
