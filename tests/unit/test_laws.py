"""The laws between fields: each has one message that says what is wrong, in numbers, and the way out."""

from __future__ import annotations

from typing import Any

import pytest

from simulator import schedules
from simulator.errors import InvalidInput
from simulator.spec import load_scenario

DENSE: dict[str, Any] = {
    "name": "dense",
    "layers": 16,
    "hidden_size": 64,
    "vocabulary_size": 128,
    "context": 512,
    "mixer": {"kind": "mha", "heads": 8, "head_dim": 8},
    "ffn": {"size": 256},
}
MOE: dict[str, Any] = {**DENSE, "name": "moe", "moe": {"experts": 8, "top_k": 2, "expert_ffn_size": 32}}


def problems(changes: dict[str, Any], model: dict[str, Any] | None = None) -> list[str]:
    """Messages about 32 ranks with 64 sequences per step, after some changes."""
    scenario = {
        "name": "laws",
        "model": model or MOE,
        "cluster": {"profile": "h100-sxm", "accelerators": 32},
        "training": {"tokens": "1B", "sequence_length": 512, "global_batch_sequences": 64},
    }
    try:
        load_scenario(scenario, changes)
    except InvalidInput as error:
        return [f"{problem.path}: {problem.message}" for problem in error.problems]
    return []


def test_the_base_breaks_no_law() -> None:
    assert problems({}) == []
    assert problems({}, DENSE) == []


MODEL_LAWS = [
    ({"model.moe.top_k": 9}, "model.moe.top_k: top_k 9 exceeds the 8 experts"),
    (
        {"model.moe.first_dense_layers": 17},
        "model.moe.first_dense_layers: 17 dense layers, but the model has 16 layers",
    ),
    (
        {"model.moe.stride": 4, "model.moe.first_dense_layers": 13},
        "model.moe.stride: stride 4 after 13 dense layers leaves no MoE layer in 16 layers",
    ),
    (
        {"model.moe.router.groups": 4, "model.moe.router.group_limit": 5},
        "model.moe.router.group_limit: 5 groups, but there are only 4",
    ),
    ({"model.moe.router.groups": 3}, "model.moe.router.groups: 8 experts do not divide into 3 groups"),
    (
        {"model.ffn": None, "model.moe.stride": 2},
        "model.ffn: the stack has dense layers, but model.ffn is missing; set model.ffn.size, or match_active",
    ),
    ({"model.ffn": None, "model.moe.dense_residual": True}, "model.ffn: dense_residual needs model.ffn.size"),
]
DENSE_MODEL_LAWS = [
    ({"model.pattern": [{"ffn": "moe"}]}, "model.pattern: the pattern has MoE layers, but model.moe is missing"),
    ({"model.ffn.size": "match_active"}, "model.ffn.size: match_active needs model.moe"),
    (
        {"parallelism.expert": 8},
        "parallelism.expert: expert parallelism 8, but the model has no experts; use expert: 1",
    ),
]
GRID_LAWS = [
    (
        {"parallelism.pipeline": 3, "parallelism.tensor": 2, "parallelism.sequence_parallel": True},
        "parallelism: 32 ranks do not divide into pipeline 3 x tensor 2 x context 1 = 6; "
        "data = ranks / (pipeline x tensor x context) must be whole",
        "parallelism.expert: 32 ranks do not divide into pipeline 3 x expert 1 x expert_tensor 1 = 3; "
        "expert_data = ranks / (pipeline x expert x expert_tensor) must be whole",
    ),
    (
        {"parallelism.expert": 8, "parallelism.expert_tensor": 8},
        "parallelism.expert: 32 ranks do not divide into pipeline 1 x expert 8 x expert_tensor 8 = 64; "
        "expert_data = ranks / (pipeline x expert x expert_tensor) must be whole",
    ),
    (
        {"parallelism.expert": 16},
        "parallelism.expert: 8 experts do not divide over 16 ranks; possible: 1, 2, 4, 8",
    ),
    (
        {"parallelism.pipeline": 8, "parallelism.expert": 32, "cluster.accelerators": 256, "model.moe.experts": 9},
        "parallelism.expert: 9 experts do not divide over 32 ranks; possible: 1",
    ),
    (
        {"parallelism.tensor": 16, "parallelism.sequence_parallel": True},
        "parallelism.tensor: 8 attention heads do not divide over tensor 16",
    ),
    (
        {"parallelism.rank_order": ["tensor", "data"]},
        "parallelism.rank_order: must name tensor, context, expert, data and pipeline once each",
    ),
    (
        {"parallelism.expert_rank_order": ["expert", "expert", "expert_data", "pipeline"]},
        "parallelism.expert_rank_order: must name expert_tensor, expert, expert_data and pipeline once each",
    ),
]
STAGE_LAWS = [
    (
        {"parallelism.pipeline": 32, "training.global_batch_sequences": 32},
        "parallelism.pipeline: 32 stages, but the model has only 16 layers",
    ),
    (
        {"parallelism.virtual_stages": 2},
        "parallelism.virtual_stages: schedule 1f1b has one stage per rank; use interleaved",
    ),
    (
        {"parallelism.pipeline": 2, "parallelism.schedule": "zbv"},
        "parallelism.virtual_stages: schedule zbv needs exactly 2",
    ),
    (
        {"parallelism.pipeline": 2, "parallelism.layers_per_stage": [4, 4, 8]},
        "parallelism.layers_per_stage: 3 items for 2 stages (pipeline x virtual_stages)",
    ),
    (
        {"parallelism.pipeline": 2, "parallelism.layers_per_stage": [8, {"layers": 7, "with": ["lm_head"]}]},
        "parallelism.layers_per_stage: the stages hold 15 layers, but the model has 16",
    ),
]
BATCH_LAWS = [
    (
        {"training.global_batch_sequences": 100, "training.micro_batch_sequences": 2},
        "training.global_batch_sequences: 100 sequences do not divide over 32 data-parallel ranks x 2 sequences per "
        "microbatch; nearest: 64 or 128",
    ),
    (
        {"training.global_batch_sequences": 8},
        "training.global_batch_sequences: 8 sequences do not divide over 32 data-parallel ranks x 1 sequences per "
        "microbatch; nearest: 32",
    ),
    (
        {"training.global_batch_sequences": {"from": 64, "to": 32, "until_tokens": "1M"}},
        "training.global_batch_sequences.from: the ramp falls from 64 to 32",
    ),
    (
        {"training.global_batch_sequences": {"from": 32, "to": 64, "until_tokens": "2B"}},
        "training.global_batch_sequences.until_tokens: the ramp is longer than the training",
    ),
    (
        {"training.sequence_length": {"encoder": 512, "decoder": 114}},
        "training.sequence_length: a decoder-only model has one sequence length",
    ),
    (
        {"parallelism.context": 2, "training.sequence_length": 511},
        "parallelism.context: sequence 511 does not divide over context 2",
    ),
]
SCHEDULE_LAWS = [
    (
        {"parallelism.schedule": "dualpipe", "parallelism.pipeline": 1},
        "parallelism.pipeline: DualPipe needs an even number of pipeline ranks, not 1",
    ),
    (
        {"parallelism.schedule": "dualpipe", "parallelism.pipeline": 4, "training.global_batch_sequences": 56},
        "training.global_batch_sequences: 7 microbatches per pipeline, but dualpipe needs at least 2 x 4 = 8; use a "
        "batch of at least 64 sequences, fewer data-parallel ranks, or schedule 1f1b",
    ),
    (
        {"parallelism.schedule": "dualpipe", "parallelism.pipeline": 4, "training.global_batch_sequences": 72},
        "training.global_batch_sequences: DualPipe needs an even number of microbatches, not 9",
    ),
    (
        {
            "parallelism.schedule": "interleaved",
            "parallelism.virtual_stages": 2,
            "parallelism.pipeline": 4,
            "training.global_batch_sequences": 48,
        },
        "training.global_batch_sequences: interleaved needs microbatches (6) that are a multiple of the pipeline "
        "ranks (4)",
    ),
]
ROUTING_LAWS = [
    ({"routing.pad_to_capacity": True}, "routing.pad_to_capacity: padding needs routing.capacity_factor"),
    (
        {"routing.capacity_factor": "model"},
        "routing.capacity_factor: the model preset states no capacity factor; give a number or null",
    ),
    (
        {"routing.capacity_group_tokens": "model"},
        "routing.capacity_group_tokens: the model preset states no group size; give a number or auto",
    ),
]
CLUSTER_LAWS = [
    (
        {"cluster.profile.stacks": {}},
        "cluster.profile.stacks: must have at least one item",
    ),
    (
        {"cluster.profile.price": None},
        "cost.price_per_accelerator_hour: the hardware profile has no price; give one, for example 2 USD",
    ),
    (
        {"cluster.profile.tiers.infiniband.size": 16},
        "cluster.accelerators: 32 chips, but the outermost tier infiniband joins 16",
    ),
    (
        {"training.precision": "fp16", "cluster.profile.kernels.gemm.fp16": None},
        "cluster.profile.kernels.gemm.fp16: must be a mapping (got null)",
    ),
    (
        {"training.precision.gemm": "int8"},
        "training.precision.gemm: the profile has no int8 matrix products; it has bf16, fp8, fp32",
    ),
    (
        {"cluster.profile.accelerator.peak": {}},
        "cluster.profile.accelerator.peak: bf16 is required: MFU is stated over it",
    ),
]


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (changes, messages)
        for changes, *messages in (
            *MODEL_LAWS,
            *GRID_LAWS,
            *STAGE_LAWS,
            *BATCH_LAWS,
            *SCHEDULE_LAWS,
            *ROUTING_LAWS,
            *CLUSTER_LAWS,
        )
    ],
)
def test_a_broken_law_says_what_is_wrong_and_the_way_out(changes: dict[str, Any], messages: list[str]) -> None:
    assert problems(changes) == messages


@pytest.mark.parametrize(("changes", "message"), DENSE_MODEL_LAWS)
def test_laws_of_a_model_without_experts(changes: dict[str, Any], message: str) -> None:
    assert problems(changes, DENSE) == [message]


def test_an_unknown_stack_is_named_with_those_of_the_profile() -> None:
    (message,) = problems({"cluster.stack": "megatron"})

    assert message.startswith("cluster.stack: unknown stack 'megatron'; did you mean 'megatron-core'? Allowed: ")


def test_every_broken_law_is_reported_at_once() -> None:
    assert problems(
        {
            "model.moe.top_k": 9,
            "parallelism.tensor": 16,
            "parallelism.sequence_parallel": True,
            "routing.pad_to_capacity": True,
        }
    ) == [
        "model.moe.top_k: top_k 9 exceeds the 8 experts",
        "parallelism.tensor: 8 attention heads do not divide over tensor 16",
        "routing.pad_to_capacity: padding needs routing.capacity_factor",
    ]


def test_the_published_batch_ramp_of_deepseek_v3_cannot_run_dualpipe() -> None:
    """The report ramps from 3072 sequences; 24 microbatches per pipeline are fewer than DualPipe's 32."""
    ramp = {"training.global_batch_sequences": {"from": 3072, "to": 15360, "until_tokens": "469B"}}

    with pytest.raises(InvalidInput) as caught:
        load_scenario("deepseek-v3", ramp)

    assert str(caught.value) == (
        "override training.global_batch_sequences: training.global_batch_sequences.from: 24 microbatches per pipeline, "
        "but dualpipe needs at least 2 x 16 = 32; use a batch of at least 4096 sequences, fewer data-parallel ranks, "
        "or schedule 1f1b"
    )
    assert (
        load_scenario("deepseek-v3", {**ramp, "parallelism.schedule": "1f1b"}).training.steady_batch_sequences == 15360
    )


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_the_laws_of_a_schedule_are_the_domain_of_its_generator(name: str) -> None:
    for ranks in (1, 2, 3, 4, 8):
        virtual_stages = 2 if name in ("interleaved", "zbv", "dualpipev") else 1
        for microbatches in range(1, 20):
            changes = {
                "cluster.accelerators": ranks,
                "parallelism.pipeline": ranks,
                "parallelism.schedule": name,
                "parallelism.virtual_stages": virtual_stages,
                "training.global_batch_sequences": microbatches,
            }
            try:
                schedules.build(name, ranks, microbatches, virtual_stages)
            except InvalidInput:
                assert problems(changes), changes
            else:
                assert problems(changes) == [], changes


def test_a_law_points_at_the_line_that_breaks_it() -> None:
    with pytest.raises(InvalidInput) as caught:
        load_scenario("deepseek-v3", {"parallelism.layers_per_stage.3": 5})

    (problem,) = caught.value.problems
    assert problem.origin is not None
    assert problem.origin.file.endswith("deepseek-v3.yaml")
    assert str(problem).endswith(": parallelism.layers_per_stage: the stages hold 62 layers, but the model has 61")


def test_a_billion_experts_are_refused_at_once() -> None:
    assert problems({"model.moe.experts": 10**9, "parallelism.expert": 3 * 10**8}) == [
        "parallelism.expert: 32 ranks do not divide into pipeline 1 x expert 300000000 x expert_tensor 1 = 300000000; "
        "expert_data = ranks / (pipeline x expert x expert_tensor) must be whole",
        "parallelism.expert: 1000000000 experts do not divide over 300000000 ranks; possible: 1, 2, 4, 8, 16, 32",
    ]
    assert problems({"model.layers": 10**9}) == ["model.layers: must be at most 10000 (got 1000000000)"]


SHARDING_LAWS = [
    (
        {"parallelism.fully_sharded": {"ranks": 8}},
        "parallelism.fully_sharded: has no effect at zero_stage 1; use zero_stage: 3",
    ),
    (
        {"parallelism.zero_stage": 3, "parallelism.fully_sharded": {"ranks": 5}},
        "parallelism.fully_sharded.ranks: 5 ranks do not divide the 32 ranks that hold the same weights",
    ),
    (
        {"parallelism.zero_stage": 3, "parallelism.expert": 8, "parallelism.fully_sharded": {"ranks": 8, "experts": 8}},
        "parallelism.fully_sharded.experts: 8 ranks do not divide the 4 ranks that hold the same weights",
    ),
    ({"parallelism.axes": {"expert": ["x"]}}, "parallelism.axes: tier nvlink is no torus; leave axes out"),
    (
        {
            "cluster.profile": "tpu-v4",
            "parallelism.axes": {"expert": ["w"]},
            "cost.price_per_accelerator_hour": "1 USD",
        },
        "parallelism.axes.expert: unknown axis 'w'; allowed: x, y, z",
    ),
    (
        {"parallelism.schedule": "interleaved", "parallelism.pipeline": 2},
        "parallelism.virtual_stages: interleaved needs at least 2; with 1 use schedule 1f1b",
    ),
    (
        {"routing.load": {"kind": "logits", "hot_experts": {"count": 8, "load": 2}}},
        "routing.load.hot_experts.count: 8 hot experts, but there are 8",
    ),
    (
        {"routing.load": {"kind": "logits", "hot_experts": {"count": 1, "load": 5}}},
        "routing.load.hot_experts.load: 5 times the mean; 1 experts can have 4",
    ),
]


@pytest.mark.parametrize(("changes", "message"), SHARDING_LAWS)
def test_an_option_without_effect_or_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    assert problems(changes) == [message]


def test_fp16_runs_where_bf16_was_measured() -> None:
    assert problems({"training.precision": "fp16"}) == []


FORMAT_LAWS = [
    (
        {"training.precision": "fp32"},
        "training.precision.gemm: the profile has no fp32 expert products; it has bf16, fp8",
    ),
    (
        {"training.precision.router": "int8"},
        "training.precision.router: the profile has no int8 matrix products; it has bf16, fp8, fp32",
    ),
]


@pytest.mark.parametrize(("changes", "message"), FORMAT_LAWS)
def test_a_format_without_a_measured_curve_is_refused(changes: dict[str, Any], message: str) -> None:
    assert problems(changes) == [message]


def test_a_job_of_more_ranks_than_can_be_placed_is_refused() -> None:
    changes = {"cluster.accelerators": 2**21, "training.global_batch_sequences": 2**21}
    assert problems(changes) == ["cluster.accelerators: 2097152 ranks; at most 1,000,000 are placed"]


def test_a_hash_router_has_no_gate_to_balance() -> None:
    hashed = {"model.moe.router.kind": "hash"}

    assert problems(hashed) == []
    assert problems({**hashed, "routing.balance": [{"kind": "bias"}]}) == [
        "routing.balance: a hash router has no gate that a remedy could balance; leave it empty"
    ]
    assert problems({**hashed, "routing.load": {"kind": "logits", "population": 0.5}}) == [
        "routing.load.kind: logits: the load of a hash router is that of its table under Zipf's law; leave "
        "routing.load out, or replay a record"
    ]
