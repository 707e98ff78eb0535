"""What the backward pass computes again: kernels, collectives, and the FLOPs that are really computed."""

from __future__ import annotations

from typing import Any

import pytest

from simulator import NotSimulated, estimate, load_scenario, simulate_step
from simulator.layout import resolve
from simulator.program import TENSOR, build, schedule_of
from simulator.routing import expert_load
from simulator.timing import Region

SMALL: dict[str, Any] = {
    "name": "small",
    "model": "deepseek-v2-lite",
    "cluster": {"profile": "h100-sxm", "accelerators": 16, "overrides": {"stacks.megatron-core.issue": "0 us"}},
    "parallelism": {"expert": 8},
    "training": {"tokens": "1B", "sequence_length": 1024, "global_batch_sequences": 64},
}
TENSOR_PARALLEL = {"parallelism.tensor": 2, "parallelism.sequence_parallel": True}


def regions(changes: dict[str, Any]) -> dict[tuple[str, bool], int]:
    """Tensor-parallel collectives of a step by name and direction, for each microbatch."""
    scenario = load_scenario(SMALL, {**TENSOR_PARALLEL, **changes})
    layout = resolve(scenario)
    program = build(scenario, layout, schedule_of(scenario, layout))
    counts: dict[tuple[str, bool], int] = {}
    for number, cls in enumerate(program.classes):
        if isinstance(cls, Region):
            times = int(((program.cls == number) & (program.stream == TENSOR)).sum())
            key = (cls.op.name, cls.backward)
            counts[key] = counts.get(key, 0) + times // layout.microbatches
    return counts


def breakdown(changes: dict[str, Any]) -> dict[str, float]:
    return dict(simulate_step(load_scenario(SMALL, changes)).timeline.breakdown)


def test_shared_experts_table_and_head_have_tensor_parallel_regions() -> None:
    found = regions({})
    assert found["shared_expert enter", False] == found["shared_expert exit", True] == 26
    assert found["dense_ffn enter", False] == 1
    assert found["embedding exit", False] == found["lm_head enter", True] == 1


def test_full_recomputation_repeats_the_collectives_that_a_layer_needs() -> None:
    once, again = regions({}), regions({"training.recompute": "full"})
    assert again["attention exit", False] == 2 * once["attention exit", False] == 54
    assert again["shared_expert enter", False] == 2 * once["shared_expert enter", False]
    assert again["shared_expert exit", False] == once["shared_expert exit", False]  # nothing in the layer needs it
    assert all(again[key] == once[key] for key in once if key[1])


@pytest.mark.parametrize("recompute", [["expert_ffn"], "full"])
def test_shared_experts_under_the_exchange_are_computed_again_too(recompute: object) -> None:
    changes = {"training.recompute": recompute}
    beside = {**changes, "parallelism.overlap": ["shared_experts", "gradient_reduce", "parameter_gather", "pipeline"]}
    ratio = breakdown(beside)["recompute"] / breakdown(changes)["recompute"]
    assert 1.0 < ratio < 132 / 112  # at most as much slower as the multiprocessors that the exchange holds


def test_full_layers_count_like_full() -> None:
    full = estimate(load_scenario(SMALL, {"training.recompute": "full"}), "max-plus")
    layers = estimate(load_scenario(SMALL, {"training.recompute": {"full_layers": 27}}), "max-plus")
    none = estimate(load_scenario(SMALL), "max-plus")
    assert layers.hfu == full.hfu > none.hfu
    assert layers.step_time_s == full.step_time_s


def test_hardware_flops_leave_dropped_assignments_out_and_count_padded_slots() -> None:
    def ratio(**routing: Any) -> float:
        result = estimate(load_scenario(SMALL, {f"routing.{key}": value for key, value in routing.items()}), "max-plus")
        return result.flop.computed["expert"] / result.flop.forward["expert"]

    assert ratio() == 1.0
    assert ratio(capacity_factor=0.5) == pytest.approx(0.5, abs=0.01)
    assert ratio(capacity_factor=2.0, pad_to_capacity=True) == pytest.approx(2.0)


def test_experts_that_choose_their_tokens_are_balanced() -> None:
    chooses = {"model.moe.router.kind": "expert_choice"}
    scenario = load_scenario(SMALL, chooses)
    load = expert_load(scenario, resolve(scenario))
    assert load is not None
    assert load.max_over_mean == load.rank_max_over_mean == 1.0
    skewed = load_scenario(SMALL, {**chooses, "routing.load": {"kind": "logits", "population": 1.0}})
    same = expert_load(skewed, resolve(skewed))
    assert same is not None
    assert (same.assigned == load.assigned).all()
    limited = load_scenario(SMALL, {**chooses, "routing.capacity_factor": 1.0})
    with pytest.raises(NotSimulated) as refused:
        expert_load(limited, resolve(limited))
    assert "take the same number each" in str(refused.value)
