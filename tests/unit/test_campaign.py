"""From one step to a training run: tokens to steps to hours to dollars, batch ramps, phases, and the JSON contract."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from simulator import estimate, simulate_step
from simulator.campaign import TrainingEstimate
from simulator.errors import InvalidInput, NotSimulated
from simulator.spec import Scenario, load_profile, load_scenario, profile_sha256

CONTRACT = {
    "schema_version", "simulator_version", "name", "engine", "seed", "scenario", "profile", "profile_sha256", "stack",
    "assumptions", "warnings", "gpu_hours", "gpu_hours_interval", "days", "cost_usd", "tokens_per_s_per_accelerator",
    "step_time_s", "step_breakdown_s", "bubble_s", "exposed_communication_s", "model_flop_per_token",
    "model_flop_per_token_noncausal", "mfu", "mfu_noncausal", "mfu_peak_flop_per_s", "hfu", "parameters_total",
    "parameters_active", "memory_peak_bytes", "memory_breakdown_bytes", "fits", "dropped_token_fraction",
    "padding_fraction", "expert_load_max_over_mean", "all_to_all_bytes_per_token",
}  # fmt: skip
"""Keys that other programs read from `moesim estimate --json`."""

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "name": "small",
        "layers": 6,
        "hidden_size": 512,
        "vocabulary_size": 8000,
        "context": 1024,
        "mixer": {"kind": "gqa", "heads": 8, "kv_heads": 4, "head_dim": 64},
        "moe": {"experts": 8, "top_k": 2, "expert_ffn_size": 1024},
    },
    "cluster": {"profile": "h100-sxm", "accelerators": 16},
    "parallelism": {"pipeline": 2, "expert": 4},
    "training": {"tokens": "10B", "sequence_length": 1024, "global_batch_sequences": 128},
    "routing": {"load": {"kind": "logits", "population": 0.3}, "capacity_factor": 1.25},
}


def small(**changes: Any) -> Scenario:
    return load_scenario(SMALL, changes)


def fast(**changes: Any) -> TrainingEstimate:
    return estimate(small(**changes), "max-plus")


# Arithmetic


def test_tokens_become_steps_hours_days_and_dollars() -> None:
    """10 billion tokens in steps of 128 x 1024: 76 294 steps on 16 GPUs at 2.5 USD."""
    result = fast(**{"cost.price_per_accelerator_hour": "2.5 USD"})
    steps = 10e9 / (128 * 1024)

    assert result.gpu_hours == pytest.approx(steps * result.step_time_s * 16 / 3600)
    assert result.days == pytest.approx(steps * result.step_time_s / 86400)
    assert result.cost_usd == pytest.approx(2.5 * result.gpu_hours)
    assert result.tokens_per_s_per_accelerator == pytest.approx(128 * 1024 / result.step_time_s / 16)
    assert result.gpu_hours == pytest.approx(10e9 / result.tokens_per_s_per_accelerator / 3600)


def test_hours_are_proportional_to_the_tokens() -> None:
    one, ten = fast(), fast(**{"training.tokens": "100B"})

    assert ten.step_time_s == one.step_time_s
    assert ten.gpu_hours == pytest.approx(10 * one.gpu_hours)


def test_the_price_of_the_scenario_wins_over_that_of_the_profile() -> None:
    """Zero is a price too."""
    market = load_profile("h100-sxm").price
    assert market is not None

    assert fast().price_usd_per_hour == market.usd_per_hour
    assert fast(**{"cost.price_per_accelerator_hour": "0 USD"}).cost_usd == 0.0
    assert fast(**{"cost.price_per_accelerator_hour": "7 USD"}).price_usd_per_hour == 7.0


def test_utilisation_is_model_flops_over_the_dense_bf16_peak() -> None:
    """MFU leaves the router out, HFU counts it and what is recomputed; the whole matrix counts more than half of it."""
    result = fast(**{"training.recompute": "full"})
    rate = result.tokens_per_s_per_accelerator / 989.4e12

    assert result.peak_flop_per_s == 989.4e12
    assert result.mfu == pytest.approx(result.flop.model_flop_per_token * rate)
    assert result.hfu == pytest.approx(result.flop.hardware_flop_per_token * rate)
    assert result.mfu < result.mfu_noncausal
    assert 1.2 * result.mfu < result.hfu < 4 / 3 * result.mfu_noncausal


def test_deepseek_v3_counts_steps_as_published() -> None:
    """14.8T tokens in 235 240 steps of 15360 x 4096; at the simulated rate on 2048 GPUs the cost follows."""
    result = estimate(load_scenario("deepseek-v3"), "max-plus")

    assert result.gpu_hours == pytest.approx(14.8e12 / (15360 * 4096) * result.step_time_s * 2048 / 3600)
    assert pytest.approx(235_240, abs=1) == 14.8e12 / (15360 * 4096)
    assert result.cost_usd == pytest.approx(2 * result.gpu_hours)


# Batch ramps


def ramp(start: int, end: int, until: str, shape: str = "linear") -> dict[str, Any]:
    return {"training.global_batch_sequences": {"from": start, "to": end, "until_tokens": until, "shape": shape}}


BALANCED = {"routing.load": {"kind": "balanced"}, "routing.capacity_factor": None}


def test_a_linear_ramp_integrates_the_time_per_token() -> None:
    """Step time a + b B, B linear in tokens: the mean time per token is a ln(to/from) / ((to-from) s) + b / s."""
    changes = {**ramp(128, 1024, "4B"), "model.moe": None, "model.ffn": {"size": 2048}, "parallelism.expert": 1}
    changes |= {"routing.capacity_factor": None}
    result = fast(**changes)

    def dense_step(batch: int) -> float:
        return simulate_step(small(**{**changes, "training.global_batch_sequences": batch}), "max-plus").seconds

    low, high = dense_step(128), dense_step(1024)
    slope = (high - low) / (1024 - 128)
    fixed = low - slope * 128
    ramped = fixed * math.log(1024 / 128) / ((1024 - 128) * 1024) + slope / 1024
    seconds = 4e9 * ramped + 6e9 * high / (1024 * 1024)

    assert dense_step(512) == pytest.approx(fixed + slope * 512, rel=1e-6)
    assert result.phase_seconds.total == pytest.approx(seconds, rel=1e-4)
    assert result.step_time_s == high


def test_a_ramp_in_steps_gives_equal_tokens_to_each_batch_size() -> None:
    """128, 256, 384, 512 for a quarter of the ramp each."""
    result = fast(**ramp(128, 512, "4B", "steps"), **BALANCED)
    sizes = (128, 256, 384, 512)
    per_token = [
        simulate_step(small(**BALANCED, **{"training.global_batch_sequences": b}), "max-plus").seconds / (b * 1024)
        for b in sizes
    ]

    assert result.phase_seconds.total == pytest.approx(4e9 * np.mean(per_token) + 6e9 * per_token[-1], rel=1e-3)


def test_a_ramp_costs_more_than_the_steady_batch_and_less_than_staying_small() -> None:
    """Small batches have more bubble and the same optimizer step for fewer tokens."""
    small_batch, ramped, steady = (
        fast(**changes).gpu_hours
        for changes in (
            {"training.global_batch_sequences": 64},
            ramp(64, 512, "10B"),
            {"training.global_batch_sequences": 512},
        )
    )

    assert steady < ramped < small_batch


def test_a_ramp_of_one_size_is_no_ramp() -> None:
    assert fast(**ramp(128, 128, "4B")).gpu_hours == pytest.approx(fast().gpu_hours)


# Phases


def test_phases_add_their_own_tokens_at_their_own_step() -> None:
    """1 billion tokens at twice the sequence length after the main 10 billion."""
    longer = {"training.sequence_length": 2048, "training.global_batch_sequences": 64}
    phased = fast(**{"training.phases": [{"name": "long", "tokens": "1B", "set": longer}], "model.context": 2048})
    main, extra = fast(**{"model.context": 2048}), fast(**{"model.context": 2048, **longer, "training.tokens": "1B"})

    assert dict(phased.phase_gpu_hours) == {"training": main.gpu_hours, "long": pytest.approx(extra.gpu_hours)}
    assert phased.gpu_hours == pytest.approx(main.gpu_hours + extra.gpu_hours)
    assert phased.days == pytest.approx(main.days + extra.days)
    assert phased.step_time_s == main.step_time_s


def test_a_phase_continues_at_the_batch_that_a_ramp_has_reached() -> None:
    cooldown = {"name": "cooldown", "tokens": "1B"}
    phased = fast(**ramp(64, 128, "4B"), **{"training.phases": [cooldown]})

    assert phased.phase_gpu_hours["cooldown"] == pytest.approx(fast(**{"training.tokens": "1B"}).gpu_hours)


def test_phases_of_one_name_are_added() -> None:
    part = {"name": "part", "tokens": "1B"}

    assert fast(**{"training.phases": [part, part]}).phase_gpu_hours["part"] == pytest.approx(
        2 * fast(**{"training.phases": [part]}).phase_gpu_hours["part"]
    )


def test_a_phase_that_breaks_a_law_is_refused_by_its_name() -> None:
    broken = [{"name": "odd", "tokens": "1B", "set": {"training.global_batch_sequences": 3}}]

    with pytest.raises(InvalidInput, match=r"phase odd.*training\.global_batch_sequences"):
        fast(**{"training.phases": broken})


# Fitting and warning


def test_a_run_that_does_not_fit_says_so_and_names_the_largest_terms() -> None:
    result = fast(
        **{"training.micro_batch_sequences": 8, "training.sequence_length": 16384, "training.fused_attention": False}
    )

    assert result.step.memory.peak_bytes > result.memory_limit_bytes
    assert not result.fits
    assert result.warnings[0].startswith(f"does not fit: rank {result.step.memory.rank} needs ")
    assert "saved_attention_core" in result.warnings[0]
    assert "sequences of 16384 tokens exceed the model's context of 1024" in result.warnings


def test_a_run_that_fits_has_no_warning() -> None:
    result = fast()
    chip = load_profile("h100-sxm").accelerator

    assert (result.fits, result.warnings) == (True, ())
    assert result.memory_limit_bytes == chip.memory_bytes.value * chip.usable_fraction.value


def test_heavy_dropping_is_warned_of() -> None:
    result = fast(**{"routing.capacity_factor": 0.5})

    assert any("of the expert assignments are dropped" in warning for warning in result.warnings)
    assert result.as_dict()["dropped_token_fraction"] == 0.5  # every expert is full


def test_what_was_assumed_is_said() -> None:
    """Repeated loads, shortcuts of the engine, numbers of the profile without a measurement."""
    text = " ".join(fast().assumptions)

    for words in ("no failures", "numbers of profile h100-sxm are assumed", "expert load logits", "max-plus engine"):
        assert words in text


@pytest.mark.parametrize("change", [{"training.offload": ["optimizer"]}])
def test_options_without_a_model_are_refused_rather_than_ignored(change: dict[str, Any]) -> None:
    with pytest.raises(NotSimulated, match="not simulated yet"):
        fast(**change)


# The contract


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    answer: dict[str, Any] = estimate(small()).as_dict()
    return answer


def test_the_answer_has_every_key_of_the_contract(answer: dict[str, Any]) -> None:
    assert set(answer) >= CONTRACT


def test_the_answer_is_strict_json_with_finite_numbers(answer: dict[str, Any]) -> None:
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def test_terms_sum_to_their_totals(answer: dict[str, Any]) -> None:
    breakdown = answer["step_breakdown_s"]
    exposed = [value for name, value in breakdown.items() if name.startswith("exposed_")]

    assert sum(breakdown.values()) == pytest.approx(answer["step_time_s"], rel=1e-9)
    assert sum(exposed) == pytest.approx(answer["exposed_communication_s"], rel=1e-9)
    assert breakdown["bubble"] == answer["bubble_s"] > 0
    assert {"exposed_expert_all_to_all", "optimizer", "stack", "expert", "attention"} <= set(breakdown)
    assert sum(answer["memory_breakdown_bytes"].values()) == pytest.approx(answer["memory_peak_bytes"], rel=1e-9)
    assert sum(answer["gpu_hours_by_phase"].values()) == pytest.approx(answer["gpu_hours"], rel=1e-9)
    by_tier = answer["all_to_all_bytes_per_token_by_tier"]
    assert sum(by_tier.values()) == pytest.approx(answer["all_to_all_bytes_per_token"], rel=1e-9)


def test_the_interval_holds_the_estimate_or_says_by_how_much_such_runs_were_off(answer: dict[str, Any]) -> None:
    low, high = answer["gpu_hours_interval"]

    assert 0.0 < low < high
    assert low < 1.5 * answer["gpu_hours"]
    assert high > answer["gpu_hours"] / 1.5


def test_the_answer_names_its_inputs(answer: dict[str, Any]) -> None:
    stated = {key: answer[key] for key in ("schema_version", "name", "engine", "seed", "profile")}

    assert stated == {
        "schema_version": 1,
        "name": "small",
        "engine": "events",
        "seed": 0,
        "profile": "h100-sxm",
    }
    assert answer["profile_sha256"] == profile_sha256(load_profile("h100-sxm"))
    assert (answer["mfu_peak_flop_per_s"], answer["microbatches"]) == (989.4e12, 16)
    assert [len(stage) for stage in answer["pipeline_stages"]] == [
        4,
        4,
    ]  # embedding and three layers, three and the head


def test_the_resolved_scenario_of_an_answer_gives_the_same_answer(answer: dict[str, Any]) -> None:
    again = estimate(load_scenario(answer["scenario"])).as_dict()

    assert again == answer


def test_bytes_of_the_exchanges_per_token() -> None:
    """Four ranks on one node, 2 of 8 experts: 1.857 ranks hold a choice, three quarters of them are others.

    Dispatch and combine in BF16, forward and backward, in six layers; dropped assignments travel nowhere.
    """
    result = fast(**BALANCED)
    distinct = 4 * (1 - (6 * 5) / (8 * 7))
    per_token = 6 * distinct * 3 / 4 * 4 * 512 * 2

    assert dict(result.all_to_all_bytes) == {"nvlink": pytest.approx(per_token)}


def test_decoder_exchanges_are_spread_over_the_encoder_tokens() -> None:
    """Switch on 512 and 114 tokens: six encoder layers, and six decoder layers that see 114/512 of a token each."""
    tree = {
        "name": "switch",
        "model": "switch-base-16",
        "cluster": {"profile": "h100-sxm", "accelerators": 8},
        "parallelism": {"expert": 8},
        "training": {
            "tokens": "1B",
            "sequence_length": {"encoder": 512, "decoder": 114},
            "global_batch_sequences": 64,
        },
    }
    result = estimate(load_scenario(tree), "max-plus")
    per_layer = 7 / 8 * 4 * 768 * 2

    assert dict(result.all_to_all_bytes) == {"nvlink": pytest.approx((6 + 6 * 114 / 512) * per_layer)}


def test_dense_models_have_neutral_routing_numbers() -> None:
    changes = {"model.moe": None, "model.ffn": {"size": 2048}, "parallelism.expert": 1, "routing.capacity_factor": None}
    answer = fast(**changes).as_dict()
    keys = ("dropped_token_fraction", "padding_fraction", "expert_load_max_over_mean", "all_to_all_bytes_per_token")

    assert [answer[key] for key in keys] == [0.0, 0.0, 1.0, 0]
    assert answer["parameters_total"] == answer["parameters_active"]


# Determinism


@pytest.mark.parametrize("engine", ["events", "max-plus"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_load(engine: Any) -> None:
    first, again, other = (
        json.dumps(estimate(small(**{"routing.seed": seed}), engine).as_dict()) for seed in (3, 3, 4)
    )

    assert first == again
    assert json.loads(first)["expert_load_max_over_mean"] != json.loads(other)["expert_load_max_over_mean"]
