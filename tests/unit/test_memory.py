"""Memory: saved activations, sharded states and the worst moment of a schedule, against published tables.

* Korthikanti et al. (arXiv 2205.05198, Table 2) derive the activations of one layer of four GPT models: with tensor
  parallelism, with sequence parallelism on top, with selective and with full recomputation.
* Zhang and Su (arXiv 2502.07846, Tables 6 and 8) count DeepSeek-V3's states for one pipeline stage under ZeRO 0 to 3.
* DeepSeek-V3 (arXiv 2412.19437, sections 3.2.3 and 3.3.3) states its formats and what it recomputes.
* SimuMax's authors measured short models under Megatron-LM with Transformer Engine (validation/published).
"""

from __future__ import annotations

from typing import Any

import pytest

from simulator import memory
from simulator.campaign import simulate_step
from simulator.layout import Layout, resolve
from simulator.program import schedule_of
from simulator.routing import expert_load
from simulator.spec import Scenario, load_scenario
from tests.scenarios import moe_model
from validation.events.static import (
    QUERY_COPY,
    SELECTION_BIAS,
    SHARED_COPY,
    THEIR_PARAMETERS,
    THEIR_STATES,
    zhang_su,
)

MIB, GIB = 2.0**20, 2.0**30


def use_of(scenario: Scenario) -> memory.MemoryUse:
    layout = resolve(scenario)
    return memory.peak(scenario, layout, schedule_of(scenario, layout), expert_load(scenario, layout))


# Activations of a GPT layer

GPT = {
    "22B": (64, 6144, 4, (1264, 844, 204, 96)),
    "175B": (96, 12288, 1, (552, 342, 102, 48)),
    "530B": (128, 20480, 1, (840, 490, 170, 80)),
    "1T": (160, 25600, 1, (1050, 612, 212, 100)),
}
"""Heads, width and batch of Table 1 of arXiv 2205.05198; MiB of one layer at sequence length 2048 and 8 ranks."""

STRATEGIES: dict[str, tuple[bool, Any]] = {
    "tensor parallel": (False, "none"),
    "tensor and sequence parallel": (True, "none"),
    "selective recomputation": (True, ["attention_core"]),
    "full recomputation": (False, "full"),
}
"""Formulas of Table 2: sbh (10 + 24/t + 5as/ht), sbh/t (34 + 5as/h), 34 sbh/t, 2 sbh."""


def gpt(heads: int, hidden: int, batch: int, *, sequence_parallel: bool, recompute: Any) -> Scenario:
    """Two layers of a GPT model in FP16-sized numbers: biased norms, GELU of width 4h, dropout, plain attention."""
    model = {
        "name": "GPT",
        "layers": 2,
        "hidden_size": hidden,
        "vocabulary_size": 51200,
        "context": 2048,
        "norm": "layernorm_bias",
        "biases": ["qkv", "attention_output", "ffn"],
        "position": "learned",
        "dropout": True,
        "mixer": {"kind": "mha", "heads": heads, "head_dim": hidden // heads},
        "ffn": {"size": 4 * hidden, "activation": "gelu", "gated": False},
    }
    return load_scenario(
        {
            "name": "GPT",
            "model": model,
            "cluster": {"profile": "a100-sxm-80gb", "accelerators": 8},
            "parallelism": {"tensor": 8, "sequence_parallel": sequence_parallel},
            "training": {
                "tokens": "300B",
                "sequence_length": 2048,
                "global_batch_sequences": batch,
                "micro_batch_sequences": batch,
                "fused_attention": False,
                "recompute": recompute,
            },
        }
    )


@pytest.mark.parametrize("size", GPT)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_activations_of_one_gpt_layer_as_korthikanti_counts_them(size: str, strategy: str) -> None:
    sequence_parallel, recompute = STRATEGIES[strategy]
    heads, hidden, batch, saved = GPT[size]
    scenario = gpt(heads, hidden, batch, sequence_parallel=sequence_parallel, recompute=recompute)
    layout = resolve(scenario)
    layer = next(index for index, block in enumerate(layout.blocks) if block.kind == "layer")
    expected = saved[list(STRATEGIES).index(strategy)]

    assert memory.saved_bytes(scenario, layout, [layer]).total / MIB == pytest.approx(expected, rel=5e-3)


def test_sequence_parallelism_and_selective_recomputation_save_five_times_the_memory() -> None:
    """The abstract of arXiv 2205.05198 says 5x in general: 1264 to 204 MiB for the 22B model."""

    def layer_bytes(*, sequence_parallel: bool, recompute: Any) -> float:
        scenario = gpt(64, 6144, 4, sequence_parallel=sequence_parallel, recompute=recompute)
        return memory.saved_bytes(scenario, resolve(scenario), [1]).total

    before = layer_bytes(sequence_parallel=False, recompute="none")
    after = layer_bytes(sequence_parallel=True, recompute=["attention_core"])

    assert 5.0 < before / after < 6.5


# States: Zhang and Su's stage of DeepSeek-V3


ROUTER = 4 * 1_835_008
"""They count the router among the experts, as they do their copy of the shared ones."""


def test_the_parameters_of_a_stage_differ_from_zhang_and_su_by_what_they_replicate() -> None:
    """429 719 552 outside the experts and 5 820 645 376 in them on their side (Table 6): 11.64 GiB in BF16."""
    scenario = zhang_su(0)
    layout = resolve(scenario)
    held = memory.stage_parameters(scenario, layout, layout.stages[1])

    assert held.expert == 4 * 32 * 44_040_192 == 5_820_645_376 - 2 * SHARED_COPY - ROUTER
    assert held.dense == 429_719_552 - QUERY_COPY + SHARED_COPY + ROUTER + SELECTION_BIAS
    theirs = held.dense + held.expert + QUERY_COPY + SHARED_COPY - SELECTION_BIAS
    assert theirs == THEIR_PARAMETERS == 6_250_364_928
    assert 2 * theirs / GIB == pytest.approx(11.64, abs=5e-3)


@pytest.mark.parametrize(("zero_stage", "theirs"), THEIR_STATES.items())
def test_states_of_a_stage_under_zero_as_zhang_and_su_count_them(zero_stage: int, theirs: float) -> None:
    """2 + 4 + 8 bytes per parameter; dense states over 32 ranks, expert states over 8 (Table 8).

    Their layout of the non-expert weights is put back by hand: the copies on the second tensor-parallel rank, and
    shared experts and router sharded over the 8 ranks of the experts instead of over 32.
    """
    scenario = zhang_su(zero_stage)
    layout = resolve(scenario)
    ours = memory.static_terms(scenario, layout, [layout.stages[1]])
    dense, expert = (1.0 if zero_stage == 0 else ranks for ranks in (32.0, 8.0))

    def states(count: float, ranks: float) -> float:
        sizes = {1: 2.0, 2: 4.0, 3: 8.0}  # shared from ZeRO 3, 2, 1 on
        return count * sum(size / (ranks if zero_stage > 3 - part else 1.0) for part, size in sizes.items())

    moved = SHARED_COPY + ROUTER
    corrections = states(QUERY_COPY - SELECTION_BIAS - moved, dense) + states(moved + SHARED_COPY, expert)

    assert (layout.gradient_ranks, layout.expert_gradient_ranks) == (32, 8)
    assert (ours.total + corrections) / GIB == pytest.approx(theirs, rel=1e-3)
    assert ours.total / GIB == pytest.approx(theirs, rel=0.03)


def test_bytes_per_parameter_are_18_with_fp32_moments_and_14_with_bf16_moments() -> None:
    """BF16 weights 2, FP32 gradients 4, FP32 master 4, two moments 8 or 4 (Megatron-LM; DeepSeek-V3, section 3.3.3)."""
    sizes = {}
    for moments in ("fp32", "bf16"):
        scenario = load_scenario("deepseek-v3", {"training.optimizer.moments": moments})
        sizes[moments] = dict(memory.state_bytes(scenario, "dense"))

    assert sizes == {
        "fp32": {"weights": 2.0, "gradients": 4.0, "optimizer": 12.0},
        "bf16": {"weights": 2.0, "gradients": 4.0, "optimizer": 8.0},
    }
    assert [sum(size.values()) for size in sizes.values()] == [18.0, 14.0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training.optimizer.master": "none"}, 4.0),
        ({"training.optimizer.kind": "muon"}, 2.0 + 4.0),
        ({"training.optimizer.kind": "sgd"}, 2.0 + 4.0),
        ({"training.optimizer.kind": "adafactor"}, 4.0),
        ({"training.optimizer.groups": {"expert": {"moments": "fp32"}}}, 8.0),
        ({"training.optimizer.groups": {"dense": {"kind": "muon"}}}, 6.0),
    ],
)
def test_optimizer_bytes_by_kind_format_and_group(changes: dict[str, Any], expected: float) -> None:
    assert memory.state_bytes(load_scenario("deepseek-v3", changes), "dense")["optimizer"] == expected


# DeepSeek-V3's own layout


def test_the_states_of_a_dualpipe_rank_of_deepseek_v3() -> None:
    """Two stages of four MoE layers, experts over 64 ranks, ZeRO 1 over 256 dense and 4 expert holders.

    6.10 GiB of BF16 weights, 12.19 of FP32 gradients, 2.68 of optimizer states: 20.97 GiB, of which the second copy
    of the parameters that DualPipe needs (arXiv 2412.19437, Table 2) is half.
    """
    scenario = load_scenario("deepseek-v3")
    layout = resolve(scenario)
    held = memory.stage_parameters(scenario, layout, layout.stages[1])
    terms = memory.static_terms(scenario, layout, [layout.stages[1], layout.stages[14]])
    grouped = {
        kind: sum(v for k, v in terms.items() if k.startswith(kind)) / GIB
        for kind in ("weights", "gradients", "optimizer")
    }

    assert held.dense == 4 * (187_107_328 + 2 * 7168 + 44_040_192 + 1_835_264)
    assert held.expert == 4 * 4 * 44_040_192
    assert (layout.gradient_ranks, layout.expert_gradient_ranks) == (256, 4)
    assert grouped == pytest.approx({"weights": 6.10, "gradients": 12.19, "optimizer": 2.68}, abs=0.005)
    assert terms.total / GIB == pytest.approx(20.97, abs=0.005)


def test_the_saved_tensors_of_a_deepseek_v3_layer() -> None:
    """610 MiB per MoE layer and microbatch of 4096 tokens under the stated recomputation and formats.

    Residuals in BF16 and latents (norm), the input of the output projection in 12 bits, dispatched tokens and the
    input of SwiGLU in FP8 with a scale for 128 numbers (arXiv 2412.19437, section 3.3.3).
    """
    scenario = load_scenario("deepseek-v3")
    layout = resolve(scenario)
    terms = memory.saved_bytes(scenario, layout, layout.stages[1]).scaled(0.25 / MIB)

    assert dict(terms) == {
        "norm": 4096 * 2 * (2 * 7168 + 1536 + 576) / MIB,
        "attention_core": 4096 * 4 * 128 / MIB,
        "attention": 4096 * 1.5 * 128 * 128 / MIB,
        "router": 4096 * 4 * 256 / MIB,
        "shared_expert": 4096 * (1 + 4 / 128) * 2 * 2048 / MIB,
        "expert": 4096 * 8 * (1 + 4 / 128) * (7168 + 2 * 2048) / MIB,
    }
    assert terms.total == pytest.approx(610.0, rel=0.03)


def test_deepseek_v3_fits_into_80_gb_with_17_microbatches_in_flight() -> None:
    """DualPipe holds PP + 1 chunks of four layers: 40 GiB of activations on 21 GiB of states."""
    step = simulate_step(load_scenario("deepseek-v3"), "max-plus")
    saved = sum(value for name, value in step.memory.terms.items() if name.startswith("saved_"))

    assert step.memory.in_flight == 17
    assert saved / GIB == pytest.approx(17 * 4 * 610 / 1024, rel=0.05)
    assert 55 < step.memory.peak_bytes / GIB < 76


# Megatron-Core with Transformer Engine: what SimuMax's authors measured on 8 B200

SHORT: dict[str, dict[str, Any]] = {
    "deepseek-v3, 4 layers": {
        "preset": "deepseek-v3",
        "set": {"layers": 4, "moe.first_dense_layers": 1, "mtp_depth": 0},
    },
    "llama-3-70b, 12 layers": {
        "preset": "llama-2-70b",
        "set": {"layers": 12, "vocabulary_size": 128256, "context": 8192},
    },
}


def short(model: str, *, stack: str = "megatron-core", profile: str = "b200", **parallelism: Any) -> Scenario:
    """One of their runs: a microbatch of 4096 tokens in BF16, ZeRO 1, tokens padded to capacity 1."""
    routing = {"capacity_factor": 1.0, "pad_to_capacity": True, "capacity_scope": "rank"}
    scenario = {
        "name": model,
        "model": SHORT[model],
        "cluster": {"profile": profile, "stack": stack, "accelerators": 8},
        "parallelism": {"zero_stage": 1, "sequence_parallel": True, "overlap": [], **parallelism},
        "training": {"tokens": "1T", "sequence_length": 4096, "global_batch_sequences": 32},
        "cost": {"price_per_accelerator_hour": "2 USD"},
    }
    return load_scenario({**scenario, "routing": routing} if "deepseek" in model else scenario)


MLA_WEIGHTS = [(1536, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384)]
EXPERT_WEIGHTS = [(4096, 7168), (7168, 2048)]
DENSE_WEIGHTS, HEAD_WEIGHTS = [(36864, 7168), (7168, 18432)], [(129280, 7168)]
"""Shapes of DeepSeek-V3's products; the shared expert's are those of a routed one."""


def buffers_of(use: memory.MemoryUse) -> dict[str, float]:
    kinds = ("weights", "gradients", "optimizer", "saved")
    return {name: value for name, value in use.terms.items() if name.split("_")[0] not in kinds}


def test_a_moe_layer_of_megatron_core_holds_its_tokens_four_times_at_its_end() -> None:
    """EP8: 32768 rows before and after the dispatch, out of the experts and sorted back, 1.75 GiB; and shared outputs.

    More than the head needs (0.99 GiB of logits and 0.05 of gradients). 104.3 GiB were measured.
    """
    use = use_of(short("deepseek-v3, 4 layers", expert=8))
    weights = [*MLA_WEIGHTS, *EXPERT_WEIGHTS, *DENSE_WEIGHTS, *HEAD_WEIGHTS]

    assert buffers_of(use) == {
        "exchange_buffers": (4 * 32768 + 4096) * 7168 * 2.0,
        "weight_gradients": 2.0 * sum(n * k for n, k in weights),
    }
    assert use.peak_bytes / GIB == pytest.approx(104.3, rel=5e-3)


def test_one_expert_on_a_rank_needs_no_sorting() -> None:
    """Tokens before the dispatch, outputs of the expert, outputs that came back: three times 512 tokens x top_k."""
    one, two = (use_of(small(**{"parallelism.expert": ranks})).terms["exchange_buffers"] for ranks in (8, 4))

    assert one == pytest.approx(3 * 512 * 2 * 512 * 2.0, rel=0.04)  # the busiest rank receives a little more
    assert two == pytest.approx(4 * 512 * 2 * 512 * 2.0, rel=0.04)


def test_the_second_of_two_stages_of_two_layers_needs_most() -> None:
    """EP4 x PP2: the last stage has one microbatch in flight, but no second holder of its 2 x 64 experts: 114.0 GiB."""
    scenario = short("deepseek-v3, 4 layers", expert=4, pipeline=2, layers_per_stage=[2, 2])
    layout, use = resolve(scenario), use_of(scenario)
    held = memory.stage_parameters(scenario, layout, layout.stages[1])

    assert (layout.gradient_ranks, layout.expert_gradient_ranks) == (4, 1)
    assert held.expert == 2 * 64 * 44_040_192
    assert (use.rank, use.in_flight) == (1, 1.0)
    assert use.peak_bytes / GIB == pytest.approx(114.0, rel=5e-3)


def test_a_dense_model_needs_most_in_the_backward_pass_of_its_head() -> None:
    """TP8: the gradient in place of the logits in BF16, the head's input gathered and its gradient before the scatter.

    28.29 GiB were measured.
    """
    use = use_of(short("llama-3-70b, 12 layers", tensor=8))
    weights = [(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584), (16032, 8192)]

    assert buffers_of(use) == {
        "logits": 4096 * 128256 * 2.0 / 8,
        "activation_gradients": 2 * 4096 * 8192 * 2.0,
        "weight_gradients": 2.0 * sum(n * k for n, k in weights),
    }
    assert use.peak_bytes / GIB == pytest.approx(28.29, rel=5e-3)


def test_a_stage_without_head_needs_most_when_its_backward_pass_begins() -> None:
    """The gradients of the feed-forward part's output and of the input of its activation."""
    scenario = short("llama-3-70b, 12 layers", tensor=4, pipeline=2, layers_per_stage=[6, 6])
    layout = resolve(scenario)
    first, _ = memory.holding(scenario, layout, schedule_of(scenario, layout), None)

    assert first.buffers["activation_gradients"] == 4096 * 2.0 * (8192 / 4 + 2 * 28672 / 4)
    assert "logits" not in first.buffers


def test_another_stack_holds_one_exchange_and_the_weight_gradient_of_the_moment() -> None:
    """Without Transformer Engine: logits in FP32 beside the gradient of the head's weight."""
    use = use_of(short("deepseek-v3, 4 layers", stack="pytorch-fsdp", profile="h100-sxm", expert=8))

    assert buffers_of(use) == {
        "logits": 4096 * 129280 * 4.0,
        "activation_gradients": 4096 * 7168 * 2.0,
        "weight_gradients": 129280 * 7168 * 2.0,
    }


def test_in_fp8_every_product_keeps_its_own_cast_of_a_norm_and_the_router_keeps_bf16() -> None:
    """Norm outputs of a MoE layer: 2 x 7168 numbers in BF16; in FP8 casts for query, key and value, shared expert.

    Beside the router's input: 2.5 x 7168 x 2 bytes without scales, 8.2 GiB in 15 chunks of 4 layers, as arXiv
    2603.07685 saves (Table 4). The latents' two norms save 2048 numbers more.
    """
    kept = {}
    for name, precision in (("bf16", {}), ("fp8", {"gemm": "fp8", "saved_activations": "fp8"})):
        for recompute in ("none", ["norm"]):
            scenario = load_scenario("deepseek-v3", {"training.precision": precision, "training.recompute": recompute})
            layer = memory.saved_bytes(scenario, resolve(scenario), [5])
            kept[name, str(recompute)] = layer.total / 4096
    saved = {name: kept[name, "none"] - kept[name, "['norm']"] for name in ("bf16", "fp8")}

    assert saved["bf16"] == 2.0 * (2 * 7168 + 2048)
    assert saved["fp8"] == (1 + 4 / 128) * (3 * 7168 + 2048) + 2.0 * 7168
    assert 60 * 4096 * (saved["fp8"] - 2048 * (1 + 4 / 128)) / GIB == pytest.approx(8.2, rel=0.03)


# Laws


SMALL: dict[str, Any] = {
    "name": "small",
    "model": moe_model(8, vocabulary_size=8000),
    "cluster": {"profile": "h100-sxm", "accelerators": 16},
    "parallelism": {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "expert": 4},
    "training": {"tokens": "1B", "sequence_length": 1024, "global_batch_sequences": 64},
}


def small(**changes: Any) -> Scenario:
    return load_scenario(SMALL, changes)


def test_the_terms_sum_to_the_peak_and_are_named() -> None:
    use = use_of(small())

    assert use.peak_bytes == sum(use.terms.values())
    assert set(use.terms) == {
        *(f"{state}_{group}" for state in ("weights", "gradients", "optimizer") for group in ("dense", "expert")),
        *(f"saved_{family}" for family in ("norm", "attention", "attention_core", "router", "expert")),
        "exchange_buffers",
        "weight_gradients",
    }


def test_more_zero_never_needs_more_static_memory() -> None:
    """Every stage of ZeRO divides one more kind of state (arXiv 1910.02054): by 4 dense and by 2 expert holders."""
    static = {}
    for zero in range(4):
        scenario = small(**{"parallelism.zero_stage": zero})
        layout = resolve(scenario)
        static[zero] = memory.static_terms(scenario, layout, [layout.stages[0]])

    held = {name: static[0][f"weights_{name}"] / 2 for name in ("dense", "expert")}
    assert [ledger.total for ledger in static.values()] == [
        pytest.approx(held["dense"] * dense + held["expert"] * expert)
        for dense, expert in ((18, 18), (6 + 12 / 4, 6 + 12 / 2), (2 + 16 / 4, 2 + 16 / 2), (18 / 4, 18 / 2))
    ]


def test_fully_sharded_groups_set_the_divisor() -> None:
    """HSDP: ZeRO 3 over 2 of 4 dense holders; the experts, not named, stay over all of theirs."""
    whole = small(**{"parallelism.zero_stage": 3})
    part = small(**{"parallelism.zero_stage": 3, "parallelism.fully_sharded": {"ranks": 2}})
    terms = [memory.static_terms(s, resolve(s), [resolve(s).stages[0]]) for s in (whole, part)]

    assert terms[1]["weights_dense"] == 2 * terms[0]["weights_dense"]
    assert terms[1]["weights_expert"] == terms[0]["weights_expert"]


def test_gpipe_keeps_all_microbatches_and_1f1b_only_the_pipeline() -> None:
    """16 microbatches on 2 stages: GPipe holds 16 of the first stage, 1F1B 2."""
    held = {name: use_of(small(**{"parallelism.schedule": name})) for name in ("gpipe", "1f1b", "zb1p")}

    assert {name: use.in_flight for name, use in held.items()} == {"gpipe": 16, "1f1b": 2, "zb1p": 2}
    saved = {name: sum(v for k, v in use.terms.items() if k.startswith("saved_")) for name, use in held.items()}
    assert saved["gpipe"] == pytest.approx(8 * saved["1f1b"], rel=0.05)


def test_recomputation_never_keeps_more() -> None:
    def saved(recompute: Any) -> float:
        scenario = small(**{"training.recompute": recompute})
        layout: Layout = resolve(scenario)
        return memory.saved_bytes(scenario, layout, layout.stages[0]).total

    everything, layers = saved("none"), [saved({"full_layers": number}) for number in range(5)]
    single = [saved([item]) for item in ("norm", "activation", "attention_core", "attention", "expert_ffn")]

    assert layers[0] == everything
    assert layers == sorted(layers, reverse=True)
    assert layers[4] == saved("full") == 4 * 1024 * 512 * 2 / 2  # inputs of four layers in shards of two ranks
    assert all(saved("full") < one < everything for one in single)


def rows_of(scenario: Any) -> tuple[float, float]:
    """Received rows of the first stage: busiest rank over all its layers, and mean rank."""
    layout = resolve(scenario)
    load = expert_load(scenario, layout)
    assert load is not None
    received = memory.received_rows(layout, load, layout.stages[0], held=1)
    return sum(received.values()), float(load.by_rank.sum(-1)[:, : len(received)].sum(1).mean())


def test_the_busiest_rank_over_all_layers_of_a_stage_sets_the_memory_of_the_experts() -> None:
    """A hot expert makes a rank heavy in one layer; over several layers the ranks differ less than in each."""
    hot = small(**{"routing.load": {"kind": "logits", "hot_experts": {"count": 1, "load": 3.0}}})
    even, skewed = use_of(small()), use_of(hot)
    busiest, mean = rows_of(hot)
    load = expert_load(hot, resolve(hot))
    assert load is not None
    worst_layers = load.by_rank.sum(-1)[:, :4].max(-1).sum(1).max()

    assert mean < busiest < worst_layers
    assert skewed.terms["saved_expert"] > 1.05 * even.terms["saved_expert"]
    assert skewed.terms["exchange_buffers"] > even.terms["exchange_buffers"]
    assert skewed.terms["saved_attention"] == even.terms["saved_attention"]


def test_dropped_tokens_need_no_memory_and_padded_slots_do() -> None:
    """Capacity 1 under skew keeps fewer rows than dropless; padded it keeps every slot; factor 2 twice as many."""
    skew = {"routing.load": {"kind": "logits", "population": 1.0}}
    tight = {**skew, "routing.capacity_factor": 1.0}
    padded = {**tight, "routing.pad_to_capacity": True}
    dropless, dropping, slots, double = (
        use_of(small(**changes)).terms["saved_expert"]
        for changes in (skew, tight, padded, {**padded, "routing.capacity_factor": 2.0})
    )

    assert dropping < slots < dropless
    assert double == pytest.approx(2 * slots)


def test_the_layer_that_is_computed_again_needs_room() -> None:
    """Full recomputation keeps inputs only, but the layer in its backward pass has everything back."""
    scenario = small(**{"training.recompute": "full"})
    layout = resolve(scenario)
    plain = small()
    layer = memory.saved_bytes(plain, layout, [1], {1: 1.0})
    terms = use_of(scenario).terms

    assert "recomputed_layer" not in use_of(plain).terms
    assert terms["recomputed_layer"] > 0.9 * (layer.total - 1024 * 512 * 2)


def test_a_tied_head_on_another_rank_keeps_a_copy_of_the_table() -> None:
    """Table on the first, head on the last of two pipeline ranks: the same parameters on both."""
    tied = small(**{"model.tied_embeddings": True})
    layout = resolve(tied)
    table = tied.model.vocabulary_size * 512 / 2
    assert memory.table_copy(tied, layout, [layout.stages[1]]) == table
    assert memory.table_copy(tied, layout, [layout.stages[0]]) == 0.0
    assert memory.table_copy(small(), layout, [layout.stages[1]]) == 0.0
