"""Traffic: what a block of tokens sends to whom, under even and skewed popularity, and how many bytes that is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from simulator.campaign.result import all_to_all_bytes_per_token
from simulator.layout import resolve
from simulator.routing import expert_load
from simulator.routing.placement import balanced, contiguous
from simulator.routing.traffic import (
    copies,
    copies_by_tier,
    distinct,
    distinct_groups,
    limited_groups,
    merged_send_matrix,
    payload_bytes,
    sampled_distinct,
    sampled_picks,
    send_matrix,
)
from simulator.spec import load_model, load_scenario
from simulator.spec.fields import ELEMENT_BYTES

V3: dict[str, Any] = {"groups": 8, "limit": 4, "score": "top2_sum"}
EVEN = np.ones(256)


def generator(seed: int = 5) -> np.random.Generator:
    return np.random.default_rng(seed)


def popular(sigma: float, experts: int = 256) -> npt.NDArray[np.float64]:
    return np.asarray(np.exp(sigma * generator(7).standard_normal(experts)))


# Distinct parts of a token


def test_parts_are_counted_once_per_token() -> None:
    """Of 8 experts on 4 ranks: one token on ranks 0 and 3, one on rank 1 only, one that lost every choice."""
    picks = np.array([[0, 1, 7], [3, 2, -1], [-1, -1, -1]])

    assert distinct(picks[:1], 8, 4) == 2.0
    assert distinct(picks[:2], 8, 4) == 1.5
    assert distinct(picks, 8, 4) == 1.0
    assert distinct(picks, 8, 8) == 5 / 3
    assert distinct(picks[:0], 8, 4) == 0.0


@pytest.mark.parametrize(("parts", "expected"), [(8, 5.2947), (64, 7.6758)])
def test_sampled_tokens_agree_with_the_formula_under_even_popularity(parts: int, expected: float) -> None:
    found = sampled_distinct(EVEN, parts, 8, 40_000, generator())

    assert distinct_groups(256, parts, 8) == pytest.approx(expected, abs=6e-5)
    assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("parts", "expected"), [(8, 3.953), (64, 7.490)])
def test_the_group_limit_of_deepseek_v3(parts: int, expected: float) -> None:
    """The best 4 of 8 nodes by their two best experts (arXiv 2412.19437, section 2.1.2)."""
    assert sampled_distinct(EVEN, parts, 8, 40_000, generator(), **V3) == pytest.approx(expected, abs=0.01)
    assert limited_groups(256, 8, 4, "top2_sum", parts, 8) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("experts", "groups", "top_k", "expected"),
    [
        (256, 8, 8, 5.2947),
        (256, 64, 8, 7.6758),
        (160, 8, 6, 4.4586),
        (128, 16, 8, 6.5965),
        (256, 32, 8, 7.2668),
        (64, 8, 6, 4.5355),
        (8, 1, 2, 1.0),
        (8, 8, 2, 2.0),
        (8, 2, 8, 2.0),
    ],
)
def test_distinct_groups_that_a_token_reaches(experts: int, groups: int, top_k: int, expected: float) -> None:
    """D (1 - C(E - E/D, k) / C(E, k)) under uniform top-k without replacement."""
    exact = groups * (1.0 - math.comb(experts - experts // groups, top_k) / math.comb(experts, top_k))

    assert distinct_groups(experts, groups, top_k) == pytest.approx(exact, rel=1e-9)
    assert exact == pytest.approx(expected, abs=6e-5)


def test_the_node_limit_of_deepseek_v3_saves_a_quarter_of_the_network() -> None:
    """At most 4 of 8 nodes, by the sum of their two best scores (arXiv 2412.19437, section 2.1.2)."""
    moe = load_model("deepseek-v3").moe
    assert moe is not None

    assert dict(copies_by_tier(moe, (8, 8))) == {0: copies(moe, 64) * 7 / 8, 1: copies(moe, 8) * 7 / 8}
    assert distinct_groups(256, 8, 8) / copies(moe, 8) == pytest.approx(1.34, abs=0.02)


def test_a_limit_of_all_groups_is_no_limit() -> None:
    assert limited_groups(64, 8, 8, "max", 8, 6, tokens=20_000) == pytest.approx(distinct_groups(64, 8, 6), abs=0.03)
    assert limited_groups(64, 8, 1, "max", 8, 6) == 1.0


def test_no_token_leaves_its_groups() -> None:
    picks = sampled_picks(popular(1.0), 8, 2000, generator(), groups=8, limit=2, score="max")

    assert max(len(set(row // 32)) for row in picks) == 2
    assert all(len(set(row)) == 8 for row in picks)
    assert ((picks >= 0) & (picks < 256)).all()


def test_groups_with_fewer_experts_than_choices_leave_choices_empty() -> None:
    picks = sampled_picks(np.ones(8), 3, 50, generator(), groups=4, limit=1, score="max")

    assert ((picks >= 0).sum(-1) == 2).all()
    assert distinct(picks, 8, 4) == 1.0


def test_popularity_is_that_of_a_draw_without_replacement() -> None:
    """Of 3 experts with weights 5, 3, 2 a token has two: 1 - sum over the first choice of leaving one out."""
    weights, tokens = np.array([0.5, 0.3, 0.2]), 100_000
    picks = sampled_picks(weights, 2, tokens, generator())
    left_out = [0.3 * 0.2 / 0.7 + 0.2 * 0.3 / 0.8, 0.5 * 0.2 / 0.5 + 0.2 * 0.5 / 0.8, 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7]

    assert np.bincount(picks.ravel()) / tokens == pytest.approx(1.0 - np.array(left_out), abs=0.006)


def test_experts_that_are_hardly_ever_chosen_do_no_harm() -> None:
    """Seven experts hold nearly all weight; the eighth choice is even over the other 249, however small they are."""
    weights = np.full(256, 1e-300)
    weights[:7] = 1.0
    picks = sampled_picks(weights, 8, 20_000, generator())
    last = picks[picks >= 7]

    assert len(last) == 20_000
    assert last.mean() == pytest.approx(131.0, abs=2.5)


@pytest.mark.parametrize("options", [{}, V3])
def test_hot_experts_on_one_node_keep_tokens_there(options: dict[str, Any]) -> None:
    """Skew that is spread over nodes hardly matters; a hot node does."""
    spread, together = popular(0.5), EVEN.copy()
    together[:32] = 20.0
    even, mixed, hot = (
        sampled_distinct(weights, 8, 8, 20_000, generator(), **options) for weights in (EVEN, spread, together)
    )

    assert mixed == pytest.approx(even, rel=0.02)
    assert hot < 0.75 * even


# Who sends to whom


def test_assignments_by_source_and_rank() -> None:
    counts = np.array([[1, 2, 3, 4], [0, 5, 0, 1]])

    assert send_matrix(counts, np.array([0, 0, 1, 1])).tolist() == [[3, 7], [5, 1]]
    assert send_matrix(counts, np.array([1, 0, 1, 0])).tolist() == [[6, 4], [6, 0]]
    assert send_matrix(counts[None], contiguous(1, 4, 2)).tolist() == [[[3, 7], [5, 1]]]


def test_ranks_with_different_numbers_of_experts_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        send_matrix(np.ones((2, 4), dtype=np.int64), np.array([0, 0, 0, 1]))

    assert "same number of experts" in str(caught.value)


def test_what_is_sent_is_what_replicas_receive() -> None:
    """58 layers, 64 sources, 64 redundant experts: every row arrives, and no replica gets more than its part."""
    counts = generator().poisson(16.0 * popular(1.0), (3, 58, 64, 256))
    plan = balanced(counts[0].sum(1), 64, redundant=64)
    sent = send_matrix(counts, plan)

    assert sent.shape == (3, 58, 64, 64)
    assert (sent >= 0).all()
    assert (sent.sum(-1) == counts.sum(-1)).all()
    assert (sent.sum(-2) == plan.rank_loads(counts.sum(-2))).all()


def test_merged_copies_by_source_and_rank() -> None:
    """Two tokens per source; the first token of source 0 has two experts on rank 0 and sends it one copy."""
    picks = np.array([[0, 1, 7], [0, 2, 4], [7, 6, 5], [-1, -1, 3]])

    assert merged_send_matrix(picks, sources=2, experts=8, ranks=4).tolist() == [[2, 1, 1, 1], [0, 1, 1, 1]]
    assert merged_send_matrix(picks[:0], 2, 8, 4).tolist() == [[0] * 4] * 2


def test_merging_saves_what_shares_a_rank() -> None:
    picks = sampled_picks(popular(0.5), 8, 64 * 512, generator())
    counts = np.stack([np.bincount(block.ravel(), minlength=256) for block in picks.reshape(64, 512, 8)])
    merged, single = merged_send_matrix(picks, 64, 256, 64), send_matrix(counts, np.arange(256) // 4)

    assert (merged <= single).all()
    assert merged.sum() / len(picks) == pytest.approx(distinct(picks, 256, 64))
    assert single.sum() == 8 * len(picks)


def test_tokens_that_do_not_divide_over_sources_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        merged_send_matrix(np.zeros((3, 1), dtype=np.int64), 2, 4, 2)

    assert "3 tokens do not divide over 2 sources" in str(caught.value)


# Bytes


def test_bytes_of_one_token() -> None:
    """FP8 carries one FP32 scale per 128 elements; the formats of a scenario say the same."""
    assert payload_bytes(7168, "fp8") == 7168 + 56 * 4 == 7168 * ELEMENT_BYTES["fp8"]
    assert payload_bytes(7168, "fp8", scale_block=32) == 7168 * 1.125
    assert payload_bytes(7168, "bf16") == 2 * 7168


def test_bytes_that_a_rank_of_deepseek_v3_sends_over_the_network() -> None:
    """4096 tokens to 3.46 of 7 other nodes: 104.9 MB in FP8, and 203.4 MB back in BF16."""
    moe = load_model("deepseek-v3").moe
    assert moe is not None
    remote = copies(moe, 8) * 7 / 8

    assert remote == pytest.approx(3.46, abs=0.006)
    assert 4096 * remote * payload_bytes(7168, "fp8") == pytest.approx(104.9e6, rel=2e-3)
    assert 4096 * remote * payload_bytes(7168, "bf16") == pytest.approx(203.4e6, rel=2e-3)
    assert math.isclose(distinct_groups(256, 8, 8) * 7 / 8, 4.63, abs_tol=0.005)


def test_padded_slots_travel_one_by_one() -> None:
    """Two experts on 8 ranks are two copies, 7 of 8 for another rank; on two nodes merging saves what shares a node."""
    moe = load_model("mixtral-8x22b").moe
    assert moe is not None

    found = {ways: dict(copies_by_tier(moe, ways)) for ways in ((1, 1), (8, 1), (4, 2))}
    expected = {0: 2 * 3 / 4, 1: distinct_groups(8, 2, 2) / 2}

    assert found[1, 1] == {}
    assert found[8, 1] == pytest.approx({0: 2 * 7 / 8})
    assert found[4, 2] == pytest.approx(expected)
    assert dict(copies_by_tier(moe, (4, 2), merged=False)) == {0: 2 * 3 / 4, 1: 2 / 2}


def test_copies_that_are_not_merged_cost_a_choice_each() -> None:
    """OLMoE on two nodes: 8 choices send 8 x 1/2 copies over the network, merged ones at most one."""

    def network(**changes: object) -> float:
        scenario = load_scenario(
            "quickstart", {"cluster.accelerators": 16, "parallelism.expert": 16, **changes}, label="test"
        )
        layout = resolve(scenario)
        sent = dict(all_to_all_bytes_per_token(scenario, layout, expert_load(scenario, layout)))
        return sent["infiniband"]

    separate = network(**{"routing.merge_copies": False})

    assert separate == pytest.approx(16 * 4 * 2 * 2048 * 8 / 2)  # layers, exchanges, bytes, width, copies
    assert network() < separate / 4
    assert network(**{"routing.capacity_factor": 1.0, "routing.pad_to_capacity": True}) == pytest.approx(separate)
