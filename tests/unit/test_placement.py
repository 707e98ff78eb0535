"""Placement: contiguous blocks, replicas after the load, and the rows that each rank receives.

The example is the one in the README of DeepSeek's load balancer (github.com/deepseek-ai/EPLB): two layers of 12
experts in 4 groups, 16 slots on 8 ranks of 2 nodes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from simulator.routing.placement import Placement, balanced, contiguous, slowest_over_mean

Loads = npt.NDArray[np.int64]

EXAMPLE = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
PUBLISHED = np.array(
    [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
)
WHOLE = 12
"""Factor under which every load of the example divides over its replicas."""


def skewed(sigma: float, seed: int = 3) -> Loads:
    """Assignments of 262,144 tokens with 8 choices to 256 experts, in 58 layers."""
    weights = np.exp(sigma * np.random.default_rng(seed).standard_normal((58, 256)))
    return np.asarray(np.round(weights / weights.sum(-1, keepdims=True) * 262_144 * 8), dtype=np.int64)


# The published example


def test_the_published_plan_brings_the_slowest_rank_near_the_mean() -> None:
    """Experts differ by a factor of two from the mean, ranks by a fifth."""
    published = Placement(PUBLISHED, ranks=8, experts=12)

    assert (EXAMPLE.std(-1) / EXAMPLE.mean(-1)).round(2).tolist() == [0.59, 0.68]
    assert (EXAMPLE.max(-1) / EXAMPLE.mean(-1)).tolist() == pytest.approx([2.13, 2.04], abs=0.005)
    assert slowest_over_mean(published, EXAMPLE * WHOLE).round(2).tolist() == [1.21, 1.24]


def test_the_same_steps_find_the_published_plan() -> None:
    plan = balanced(EXAMPLE, 8, redundant=4, nodes=2, groups=4)

    assert plan.expert_of_slot.tolist() == PUBLISHED.tolist()
    assert (plan.layers, plan.ranks, plan.slots_per_rank) == (2, 8, 2)
    assert plan.replicas.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]


def test_without_nodes_replicas_go_anywhere_and_balance_better() -> None:
    plan = balanced(EXAMPLE, 8, redundant=4)

    assert (slowest_over_mean(plan, EXAMPLE * WHOLE) < [1.10, 1.20]).all()


def test_groups_stay_on_one_node_with_all_replicas() -> None:
    """A token that may use few groups then reaches few nodes; a group of 3 experts is on one of 2 nodes."""
    plan = balanced(EXAMPLE, 8, redundant=4, nodes=2, groups=4)

    for layer in plan.expert_of_slot.reshape(2, 2, 8):
        assert not {expert // 3 for expert in layer[0]} & {expert // 3 for expert in layer[1]}


def test_groups_that_do_not_divide_over_nodes_are_ignored() -> None:
    alone, ignored = balanced(EXAMPLE, 8, redundant=4), balanced(EXAMPLE, 8, redundant=4, nodes=2, groups=3)

    assert ignored.expert_of_slot.tolist() == alone.expert_of_slot.tolist()


def test_blocks_that_are_even_already_stay_in_order() -> None:
    """Nothing is gained by moving equal experts; a layer whose blocks differ is packed, the layer beside it is not."""
    loads = np.ones((3, 12))
    loads[1] = [1, 2, 3, 3, 2, 1, 2, 2, 2, 6, 0, 0]  # uneven experts in even blocks
    loads[2, :3] = 9
    plan = balanced(loads, 4)

    assert plan.expert_of_slot[:2].tolist() == [list(range(12))] * 2
    assert plan.expert_of_slot[2].tolist() != list(range(12))
    assert (plan.in_order, balanced(loads[:2], 4).in_order) == (False, True)


# Rows


def test_contiguous_experts_are_counted_in_order() -> None:
    plan = contiguous(layers=2, experts=6, ranks=3)
    counts = np.arange(24).reshape(2, 2, 6)

    assert plan.expert_of_slot.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert plan.replicas.tolist() == [[1] * 6] * 2
    assert plan.rows(counts).tolist() == counts.reshape(2, 2, 3, 2).tolist()
    assert plan.rank_loads(counts)[0].tolist() == [[1, 5, 9], [13, 17, 21]]


def test_replicas_share_an_experts_rows_to_within_one() -> None:
    """Expert 0 is on three ranks: of 8 rows they take 3, 3 and 2, whatever else they hold."""
    plan = Placement(np.array([[0, 3, 1, 0, 0, 2]]), ranks=3, experts=4)

    assert plan.rows(np.array([[8, 5, 1, 9]])).tolist() == [[[3, 9], [5, 3], [2, 1]]]
    assert plan.rank_loads(np.array([[[8, 5, 1, 9]], [[1, 0, 0, 0]]])).tolist() == [[[12, 8, 3]], [[1, 0, 0]]]


def test_each_layer_has_its_own_plan() -> None:
    plan = Placement(np.array([[0, 1, 2, 3], [3, 0, 1, 2]]), ranks=2, experts=4)

    assert plan.rank_loads(np.array([[1, 2, 3, 4], [1, 2, 3, 4]])).tolist() == [[3, 7], [5, 5]]


def test_the_slowest_rank_of_nothing_is_the_mean() -> None:
    plan = contiguous(2, 4, 2)

    assert slowest_over_mean(plan, np.array([[0, 0, 0, 0], [3, 0, 0, 1]])).tolist() == [1.0, 1.5]


# What it is good for


@pytest.mark.parametrize(
    ("sigma", "ranks", "redundant", "blocks", "reached"),
    [
        (0.25, 64, 0, 1.33, 1.01),
        (0.5, 64, 0, 1.80, 1.15),  # in some layers the hottest expert alone is more than a mean rank
        (0.5, 32, 32, 1.45, 1.005),  # as many as DeepSeek-V3 adds for prefill (arXiv 2412.19437, section 3.4.1)
        (0.5, 64, 64, 1.80, 1.005),
        (1.0, 64, 64, 3.50, 1.02),
    ],
)
def test_replicas_flatten_loads_that_blocks_cannot(
    sigma: float, ranks: int, redundant: int, blocks: float, reached: float
) -> None:
    """256 experts, popularity exp(sigma x normal): the slowest rank, mean of 58 layers."""
    loads = skewed(sigma)
    before = slowest_over_mean(contiguous(58, 256, ranks), loads)
    after = slowest_over_mean(balanced(loads, ranks, redundant=redundant), loads)

    assert before.mean() == pytest.approx(blocks, rel=0.03)
    assert after.mean() < reached
    assert (after < before).all()


def test_a_plan_for_other_loads_is_no_help() -> None:
    """Placed for one batch mixture, run on another: replicas must follow the load."""
    loads, other = skewed(0.5), skewed(0.5, seed=4)
    plan = balanced(loads, 64, redundant=64)

    assert slowest_over_mean(plan, other).mean() > 1.5


# What cannot be placed


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (8, {"redundant": 3}, "12 experts and 3 redundant ones do not divide over 8 ranks"),
        (4, {"redundant": -4}, "do not divide"),
        (4, {"nodes": 3}, "on 4 ranks of 3 nodes"),
        (4, {"groups": 5}, "12 experts in 5 groups"),
        (4, {"redundant": 40}, "13 slots per rank for 12 experts"),
    ],
)
def test_placements_that_cannot_be(ranks: int, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        balanced(EXAMPLE, ranks, **arguments)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("slots", "ranks", "experts", "message"),
    [
        ([[0, 1, 2]], 2, 3, "3 slots do not divide over 2 ranks"),
        ([[0, 1, 1, 0]], 2, 3, "an expert has no slot"),
        ([[0, 1, 2, 3]], 2, 3, "experts are 0 to 2"),
        ([[0, 1, 2, -1]], 2, 3, "experts are 0 to 2"),
    ],
)
def test_plans_that_break_a_law(slots: list[list[int]], ranks: int, experts: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Placement(np.array(slots), ranks, experts)

    assert message in str(caught.value)


def test_counts_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        contiguous(2, 8, 4).rows(np.zeros((3, 8), dtype=np.int64))

    assert "2 layers and 8 experts" in str(caught.value)
