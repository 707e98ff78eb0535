"""What stays for the whole step: weights, gradients and optimizer states of the stages that a rank holds.

Dense and expert parameters are apart because they are replicated over different groups. ZeRO divides optimizer states
(1), gradients (2) and weights (3) by the number of ranks that hold the same parameters (arXiv 1910.02054); a
bidirectional pipeline holds two stages per rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulator.layout import Layout
from simulator.spec.fields import ELEMENT_BYTES
from simulator.spec.scenario import Scenario
from simulator.workload.ledger import Ledger
from simulator.workload.ops import Embedding, Gemm, GroupedGemm, Op

_STATES = {"adamw": 2.0, "muon": 1.0, "sgd": 1.0, "adafactor": 0.0}
"""Full-size moments of each optimizer; Adafactor's row and column sums are small enough to leave out."""


@dataclass(frozen=True)
class Parameters:
    """Parameters that one rank holds for one stage, before ZeRO."""

    dense: float
    expert: float


def stage_parameters(scenario: Scenario, layout: Layout, stage: Sequence[int]) -> Parameters:
    """Dense and expert parameters of a stage on one rank, after tensor, expert and expert-tensor parallelism."""
    held = [op_parameters(scenario, op) for index in stage for op in layout.blocks[index].ops]
    return Parameters(sum(each.dense for each in held), sum(each.expert for each in held))


def table_copy(scenario: Scenario, layout: Layout, stages: Sequence[Sequence[int]]) -> float:
    """Parameters of a copy of the embedding table on a rank that does not hold the table itself.

    A tied head needs one, and so does an MTP module.
    """
    kinds = {layout.blocks[index].kind for stage in stages for index in stage}
    needed = "mtp" in kinds or ("lm_head" in kinds and scenario.model.tied_embeddings)
    if not needed or "embedding" in kinds:
        return 0.0
    return scenario.model.vocabulary_size * scenario.model.hidden_size / scenario.parallelism.tensor


def op_parameters(scenario: Scenario, op: Op) -> Parameters:
    """Parameters of one op on one rank, after tensor, expert and expert-tensor parallelism; copies of experts count."""
    split, moe = scenario.parallelism, scenario.model.moe
    if isinstance(op, GroupedGemm):
        assert moe is not None  # only MoE layers have experts
        copies = 1.0 + scenario.routing.placement.redundant_experts / moe.experts
        return Parameters(0.0, op.parameters * copies / (split.expert * split.expert_tensor))
    shared_out = isinstance(op, Embedding) or (isinstance(op, Gemm) and op.split != "none")
    return Parameters(op.parameters / (split.tensor if shared_out else 1), 0.0)


def state_bytes(scenario: Scenario, group: str) -> Mapping[str, float]:
    """Bytes per parameter of weights, gradients and optimizer states ("dense" or "expert").

    BF16 weights with FP32 gradients, master and moments: 2 + 4 + 12 = 18 (Megatron-LM); with BF16 moments 14
    (DeepSeek-V3, section 3.3.3).
    """
    optimizer = scenario.training.optimizer
    special = optimizer.groups.get(group)  # type: ignore[call-overload]
    kind = (special and special.kind) or optimizer.kind
    moments = (special and special.moments) or optimizer.moments
    master = (special and special.master) or optimizer.master
    return {
        "weights": ELEMENT_BYTES[scenario.training.precision.weights],
        "gradients": ELEMENT_BYTES[optimizer.gradients],
        "optimizer": _STATES[kind] * ELEMENT_BYTES[moments] + (0.0 if master == "none" else ELEMENT_BYTES[master]),
    }


def shard_ranks(scenario: Scenario, layout: Layout, group: str) -> int:
    """Ranks over which ZeRO divides the states of a parameter group."""
    sharded = scenario.parallelism.fully_sharded
    if sharded is not None and scenario.parallelism.zero_stage == 3:
        if group == "dense":
            return sharded.ranks
        if sharded.experts is not None:
            return sharded.experts
    return layout.gradient_ranks if group == "dense" else layout.expert_gradient_ranks


def static_terms(scenario: Scenario, layout: Layout, stages: Sequence[Sequence[int]]) -> Ledger:
    """Weights, gradients and optimizer states of the stages that one rank holds, under ZeRO."""
    zero = scenario.parallelism.zero_stage
    divides = {"optimizer": 1, "gradients": 2, "weights": 3}
    terms: list[tuple[str, float]] = []
    held = [stage_parameters(scenario, layout, stage) for stage in stages]
    dense = sum(each.dense for each in held) + table_copy(scenario, layout, stages)
    for group, count in (("dense", dense), ("expert", sum(each.expert for each in held))):
        ranks = shard_ranks(scenario, layout, group)
        for name, size in state_bytes(scenario, group).items():
            terms.append((f"{name}_{group}", count * size / (ranks if zero >= divides[name] else 1)))
    return Ledger([(name, value) for name, value in terms if value])
