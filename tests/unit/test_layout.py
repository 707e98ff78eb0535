"""Who sits where: rank grids and their groups, how groups lie on nodes and tori, and which stage holds which layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from simulator.errors import InvalidInput, NotSimulated
from simulator.layout import Grid, Layout, Span, balance, resolve
from simulator.layout.grid import span
from simulator.spec import Scenario, load_profile, load_scenario

SMALL: dict[str, Any] = {
    "name": "small",
    "model": "mixtral-8x7b",
    "cluster": {"profile": "h100-sxm", "accelerators": 32},
    "parallelism": {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "expert": 4},
    "training": {"tokens": "1B", "sequence_length": 1024, "global_batch_sequences": 64},
}


def small(**changes: Any) -> Scenario:
    return load_scenario(SMALL, changes)


def placed(**changes: Any) -> Layout:
    return resolve(small(**changes))


def members(grid: Grid, *axes: str, rank: int = 0) -> list[int]:
    found: list[int] = grid.group(axes, rank).tolist()
    return found


# Grids


def test_ranks_are_numbered_with_the_first_axis_fastest() -> None:
    grid = Grid({"tensor": 2, "data": 3, "pipeline": 2})

    assert grid.strides == {"tensor": 1, "data": 2, "pipeline": 6}
    assert grid.coordinate("data").tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    assert [members(grid, "tensor", rank=9), members(grid, "data", rank=9)] == [[8, 9], [7, 9, 11]]
    assert members(grid, "tensor", "pipeline", rank=4) == [4, 5, 10, 11]
    assert members(grid, rank=7) == [7]


def test_dense_and_expert_grids_of_32_ranks() -> None:
    """Tensor 2 and pipeline 2 leave 8 data-parallel ranks; experts over 4 ranks leave 4 copies of each expert."""
    layout = placed()

    assert dict(layout.dense.sizes) == {"tensor": 2, "context": 1, "data": 8, "pipeline": 2}
    assert dict(layout.expert.sizes) == {"expert_tensor": 1, "expert": 4, "expert_data": 4, "pipeline": 2}
    assert (layout.data, layout.expert_data, layout.gradient_ranks, layout.expert_gradient_ranks) == (8, 4, 8, 4)
    assert layout.microbatches == 64 // 8


def test_folding_lays_expert_groups_over_tensor_and_data_ranks() -> None:
    """An expert group of four consecutive ranks holds two tensor-parallel pairs (arXiv 2504.14960)."""
    layout = placed()

    assert [members(layout.dense, "tensor", rank=5), members(layout.expert, "expert", rank=5)] == [[4, 5], [4, 5, 6, 7]]
    assert members(layout.expert, "expert_data", rank=5) == [1, 5, 9, 13]
    assert members(layout.dense, "data", rank=5) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert np.array_equal(layout.dense.coordinate("pipeline"), layout.expert.coordinate("pipeline"))


def test_an_expert_rank_order_of_its_own_spreads_experts_over_the_nodes() -> None:
    layout = placed(**{"parallelism.expert_rank_order": ["expert_tensor", "expert_data", "expert", "pipeline"]})

    assert members(layout.expert, "expert") == [0, 4, 8, 12]
    assert layout.spans["expert"] == Span(4, (2, 2))
    assert layout.spans["expert_data"] == Span(4, (4, 1))


def test_grids_that_disagree_on_the_stage_are_refused() -> None:
    """With pipeline innermost for the experts only, rank 1 would sit on stage 0 and on stage 1."""
    with pytest.raises(InvalidInput) as refusal:
        placed(**{"parallelism.expert_rank_order": ["pipeline", "expert_tensor", "expert", "expert_data"]})

    assert [problem.path for problem in refusal.value.problems] == ["parallelism.expert_rank_order"]
    assert "different pipeline stages" in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"parallelism.tensor": 3}, "parallelism"),
        ({"parallelism.expert": 3}, "parallelism.expert"),
        ({"parallelism.rank_order": ["tensor", "tensor", "expert", "data", "pipeline"]}, "parallelism.rank_order"),
    ],
)
def test_grids_that_do_not_fill_the_ranks_are_refused(change: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        small(**change)

    assert path in [problem.path for problem in refusal.value.problems]


# Spans


def test_how_the_groups_of_deepseek_v3_lie_on_nodes_of_eight() -> None:
    """2048 GPUs, PP16, EP64: an expert group covers 8 nodes, its two copies and the stages sit on different nodes."""
    layout = resolve(load_scenario("deepseek-v3"))

    expected = {
        "tensor": Span(1, (1, 1)),
        "context": Span(1, (1, 1)),
        "data": Span(128, (8, 16)),
        "gradient": Span(128, (8, 16)),
        "pipeline": Span(16, (1, 16)),
        "expert": Span(64, (8, 8)),
        "expert_tensor": Span(1, (1, 1)),
        "expert_data": Span(2, (1, 2)),
    }

    assert {name: layout.spans[name] for name in expected} == expected
    assert (layout.gradient_ranks, layout.expert_gradient_ranks, layout.microbatches) == (256, 4, 120)
    assert [layout.spans[name].outermost for name in ("tensor", "expert", "pipeline")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("ranks", "stride", "ways"),
    [
        (8, 1, (8, 1)),
        (2, 4, (2, 1)),
        (2, 8, (1, 2)),
        (64, 1, (8, 8)),
        (16, 2, (4, 4)),
        (4, 4, (2, 2)),
        (12, 1, (8, 2)),  # eight and four: the fullest node counts
        (1, 1, (1, 1)),
    ],
)
def test_ranks_at_a_stride_on_nodes_of_eight(ranks: int, stride: int, ways: tuple[int, ...]) -> None:
    tiers = load_profile("h100-sxm").tiers

    assert span(np.arange(ranks) * stride, tiers, 1, None) == Span(ranks, ways)


def test_the_rank_order_decides_which_group_shares_a_node() -> None:
    """Tensor innermost stays on the node; with data innermost it crosses nodes."""
    inside = placed(**{"parallelism.tensor": 4, "cluster.accelerators": 64})
    across = placed(
        **{
            "parallelism.tensor": 4,
            "cluster.accelerators": 64,
            "parallelism.rank_order": ["data", "tensor", "context", "expert", "pipeline"],
            "parallelism.expert_rank_order": ["expert_tensor", "expert", "expert_data", "pipeline"],
        }
    )

    assert (inside.spans["tensor"], inside.spans["data"]) == (Span(4, (4, 1)), Span(8, (2, 4)))
    assert (across.spans["tensor"], across.spans["data"]) == (Span(4, (1, 4)), Span(8, (8, 1)))


def test_context_ranks_hold_the_same_weights() -> None:
    """Gradients are reduced over data x context (8 x 2 on 32 ranks); the tokens are divided by context."""
    layout = placed(**{"parallelism.context": 2, "parallelism.tensor": 1, "parallelism.pipeline": 1})

    assert (layout.data, layout.gradient_ranks, layout.spans["gradient"].size) == (16, 32, 32)
    assert members(layout.dense, "context") == [0, 1]


@pytest.mark.parametrize(
    ("profile", "chips", "axes", "ways", "extents"),
    [
        ("tpu-v4", 8, None, (8, 1), (2, 2, 2)),
        ("tpu-v4", 64, None, (64, 1), (4, 4, 4)),
        ("tpu-v4", 256, None, (256, 1), (4, 8, 8)),
        ("tpu-v4", 16, ("x",), (16, 1), (16,)),
        ("tpu-v4", 256, ("x", "y"), (256, 1), (16, 16)),
        ("tpu-v4", 4096, None, (4096, 1), (16, 16, 16)),
        ("tpu-v4", 8192, None, (4096, 2), (16, 16, 16)),  # two slices, joined by the data-centre network
        ("tpu-v6e", 64, None, (64, 1), (8, 8)),
        ("tpu-v6e", 32, None, (32, 1), (4, 8)),
        ("tpu-v6e", 7, None, (7, 1), (7,)),
    ],
)
def test_a_group_covers_the_most_cubic_part_of_a_torus(
    profile: str, chips: int, axes: tuple[str, ...] | None, ways: tuple[int, ...], extents: tuple[int, ...]
) -> None:
    found = span(np.arange(chips), load_profile(profile).tiers, 1, axes)

    assert (found.size, found.ways, tuple(sorted(found.extents))) == (chips, ways, tuple(sorted(extents)))


def test_two_ranks_of_a_tpu_v3_share_a_chip() -> None:
    """64 cores are 32 chips: 4 x 8 of the torus."""
    tiers = load_profile("tpu-v3").tiers

    assert span(np.arange(64), tiers, 2, None) == Span(64, (64, 1), (4, 8))
    assert span(np.arange(2), tiers, 2, None) == Span(2, (2, 1), (1,))
    assert span(np.arange(4096), tiers, 2, None) == Span(4096, (2048, 2), (32, 32))


# Stages


def kinds(layout: Layout, stage: int) -> list[str]:
    return [layout.blocks[index].kind for index in layout.stages[stage]]


def test_stages_balance_the_flops_of_layers_and_head() -> None:
    """Mixtral's 32 layers on 4 stages; the head of a small model is as heavy as many layers and gets its own stage."""
    even = placed(**{"parallelism.pipeline": 4, "training.global_batch_sequences": 64})
    heavy = placed(**{"parallelism.pipeline": 4, "model.vocabulary_size": 32_000_000})

    assert [len(stage) for stage in even.stages] == [9, 8, 8, 9]  # with embedding and head
    assert (kinds(even, 0)[0], kinds(even, 3)[-1]) == ("embedding", "lm_head")
    assert kinds(heavy, 3) == ["lm_head"]


def test_a_list_of_layers_is_honoured_and_items_claim_what_else_they_hold() -> None:
    layout = placed(
        **{
            "parallelism.layers_per_stage": [
                {"layers": 20, "with": ["lm_head"]},
                {"layers": 12, "with": ["embedding"]},
            ],
        }
    )

    assert [kinds(layout, stage).count("layer") for stage in (0, 1)] == [20, 12]
    assert ["lm_head" in kinds(layout, 0), "embedding" in kinds(layout, 1)] == [True, True]
    assert sorted(index for stage in layout.stages for index in stage) == list(range(len(layout.blocks)))


def test_the_published_split_of_deepseek_v3() -> None:
    """15 stages of four layers; the last layer sits with head and MTP module."""
    layout = resolve(load_scenario("deepseek-v3"))

    assert [kinds(layout, stage).count("layer") for stage in range(16)] == [4] * 15 + [1]
    assert kinds(layout, 0)[0] == "embedding"
    assert kinds(layout, 15) == ["layer", "lm_head", "mtp"]


@pytest.mark.parametrize(
    ("weights", "stages", "expected"),
    [
        ([1, 1, 1, 1], 2, ((0, 1), (2, 3))),
        ([0, 5, 1, 1, 1, 4], 3, ((0, 1), (2, 3, 4), (5,))),
        ([3, 3, 3], 3, ((0,), (1,), (2,))),
        ([1, 1, 1, 1, 1, 9], 3, ((0, 1), (2, 3, 4), (5,))),  # the rest is split as evenly as it goes: 2 + 3 or 3 + 2
        ([2], 1, ((0,),)),
    ],
)
def test_balance_by_hand(weights: list[float], stages: int, expected: tuple[tuple[int, ...], ...]) -> None:
    found = balance(weights, stages)

    def sums(parts: tuple[tuple[int, ...], ...]) -> list[float]:
        return sorted(sum(weights[i] for i in part) for part in parts)

    assert sums(found) == sums(expected)


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(InvalidInput, match="3 stages for 2 blocks"):
        balance([1, 1], 3)


# Overlap


def test_overlap_auto_hides_the_exchange_only_where_forward_and_backward_are_paired() -> None:
    usual = {"gradient_reduce", "parameter_gather", "pipeline", "tensor_backward"}

    assert placed().overlap == usual
    assert resolve(load_scenario("deepseek-v3", {"parallelism.overlap": "auto"})).overlap == usual | {
        "expert_all_to_all"
    }
    assert placed(**{"parallelism.overlap": []}).overlap == set()


@pytest.mark.parametrize("wish", ["context", "expert_all_to_all"])
def test_an_overlap_that_would_have_no_effect_is_refused(wish: Any) -> None:
    with pytest.raises(NotSimulated, match=r"parallelism\.overlap"):
        placed(**{"parallelism.overlap": [wish]})


def test_weight_gradients_without_a_pair_cannot_be_delayed_or_not() -> None:
    with pytest.raises(NotSimulated, match=r"parallelism\.delay_weight_gradients: no forward runs beside a backward"):
        placed(**{"parallelism.delay_weight_gradients": False})
    resolve(load_scenario("deepseek-v3", {"parallelism.delay_weight_gradients": False}))


def test_axes_that_are_too_short_for_a_group_are_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        span(np.arange(64), load_profile("tpu-v4").tiers, 1, ("x",))
    assert str(caught.value) == "parallelism.axes: a group of 64 chips does not fit along x (16 chips)"
