"""What a step rests on, without time: FLOPs per token, nodes that a token reaches, and sharded states."""

from __future__ import annotations

from collections.abc import Iterator

from simulator import memory
from simulator.layout import resolve
from simulator.routing.traffic import copies, distinct_groups
from simulator.spec import Scenario, load_scenario
from simulator.workload import flops
from validation.checks import Check, near, within

GROUP = "static"
GIB = 2.0**30
TOKENS_PER_DAY, RANKS = 272.80e9, 2048

ZHANG_SU = "Zhang and Su, arXiv 2502.07846, Tables 6 and 8: PP16 TP2 EP8 DP32, BF16 moments"
THEIR_PARAMETERS = 6_250_364_928
THEIR_STATES = {0: 81.5, 1: 40.45, 2: 19.92, 3: 9.66}
"""GiB of parameters, gradients and optimizer states of a stage of four MoE layers, by ZeRO stage."""

QUERY_COPY, SHARED_COPY = 4 * 1536 * 128 * 64 // 2, 4 * 44_040_192 // 2
"""What they keep whole on both tensor-parallel ranks and we split: rotary query projection, shared experts."""
SELECTION_BIAS = 4 * 256
"""What they leave out of the router."""


def checks() -> Iterator[Check]:
    """Checks of FLOPs, traffic and states."""
    yield from _flops()
    yield from _nodes()
    yield from _states()


def _flops() -> Iterator[Check]:
    found = flops.count(load_scenario("deepseek-v3"))
    causal, whole = found.model_flop_per_token, found.model_flop_per_token_noncausal
    source = "DeepSeek-V3 at 4096 tokens, head counted, without router and MTP: 3 x 2 x parameters met + attention"
    yield within(GROUP, "model FLOPs per token, causal", 249.81e9, causal, "FLOP", 1e-4, source)
    yield within(GROUP, "model FLOPs per token, non-causal", 280.51e9, whole, "FLOP", 1e-4, source)
    source = "arXiv 2505.09343, Table 4: at 272.80 B tokens per day on 2048 GPUs"
    rate = TOKENS_PER_DAY / 86400 / RANKS
    yield within(GROUP, "FLOP/s per GPU, causal", 385e12, causal * rate, "FLOP/s", 0.003, source)
    yield within(GROUP, "FLOP/s per GPU, non-causal", 432e12, whole * rate, "FLOP/s", 0.003, source)


def _nodes() -> Iterator[Check]:
    moe = load_scenario("deepseek-v3").model.moe
    assert moe is not None
    uniform = distinct_groups(moe.experts, 8, moe.top_k)
    yield near(
        GROUP,
        "nodes that a token reaches, uniform choice",
        5.2947,
        uniform,
        "nodes",
        5e-5,
        "D (1 - C(E - E/D, k)/C(E, k))",
    )
    source = "arXiv 2412.19437, section 2.1.2: at most 4 nodes, by the sum of their two best scores"
    yield near(GROUP, "nodes that a token reaches, limited to 4", 3.95, copies(moe, 8), "nodes", 0.02, source)


def _states() -> Iterator[Check]:
    for zero, gib in THEIR_STATES.items():
        scenario = zhang_su(zero)
        layout = resolve(scenario)
        if zero == 0:
            held = memory.stage_parameters(scenario, layout, layout.stages[1])
            theirs = held.dense + held.expert + QUERY_COPY + SHARED_COPY - SELECTION_BIAS
            name = "parameters of a stage, with what they keep whole on both tensor ranks"
            yield near(GROUP, name, THEIR_PARAMETERS, theirs, "", 0.0, ZHANG_SU)
        ours = memory.static_terms(scenario, layout, [layout.stages[1]]).total / GIB
        yield within(GROUP, f"states of a stage under ZeRO {zero}", gib, ours, "GiB", 0.03, ZHANG_SU)


def zhang_su(zero_stage: int) -> Scenario:
    """Their job of 1024 ranks: experts are replicated 8 times, everything else 32 times; moments in BF16."""
    return load_scenario(
        {
            "name": "arXiv 2502.07846",
            "model": {"preset": "deepseek-v3", "set": {"mtp_depth": 0}},
            "cluster": {"profile": "h100-sxm", "accelerators": 1024},
            "parallelism": {
                "pipeline": 16,
                "tensor": 2,
                "sequence_parallel": True,
                "expert": 8,
                "zero_stage": zero_stage,
                "layers_per_stage": [*[4] * 15, 1],
            },
            "training": {
                "tokens": "1T",
                "sequence_length": 4096,
                "global_batch_sequences": 512,
                "optimizer": {"moments": "bf16", "master": "fp32", "gradients": "fp32"},
            },
        }
    )


__all__ = ["QUERY_COPY", "SELECTION_BIAS", "SHARED_COPY", "THEIR_PARAMETERS", "THEIR_STATES", "checks", "zhang_su"]
