"""Admission, token by token: who is dropped, where in the group, and where the others go."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from simulator.routing import capacity as capacities
from simulator.routing.admission import Admission, admit, group_sizes
from simulator.routing.closed_forms import balanced_drop, drop_profile

Choices = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]


def noisy(sigma: float, tokens: int, experts: int, top_k: int, rng: np.random.Generator) -> tuple[Choices, Scores]:
    """Top-k of popularity and Gumbel noise: choices [tokens, k], best first, and the logits [tokens, experts]."""
    logits = sigma * rng.standard_normal(experts) + rng.gumbel(size=(tokens, experts))
    return np.argsort(-logits, axis=-1)[:, :top_k], logits


def of_choices(choices: Choices, logits: Scores) -> Scores:
    return np.take_along_axis(logits, choices, axis=-1)


# Four tokens with two choices of three experts; expert 0 is in demand.
FOUR = np.array([[0, 1], [0, 2], [0, 1], [1, 0]])
AFFINITY = np.array([[0.2, 0.1], [0.9, 0.1], [0.8, 0.3], [0.5, 0.4]])


# Order of service


def test_in_arrival_order_the_last_ones_are_dropped() -> None:
    """Two slots each: expert 0 serves tokens 0 and 1, expert 1 tokens 0 and 2; the last token loses both choices."""
    result = admit(FOUR, 2)

    assert result.accepted.tolist() == [[True, True], [True, True], [False, True], [False, False]]
    assert result.assigned.tolist() == [4, 3, 1]
    assert result.processed.tolist() == [2, 2, 1]
    assert (result.dropped_fraction, result.lost_fraction) == (3 / 8, 1 / 4)


def test_by_score_the_lowest_affinities_are_dropped() -> None:
    """Expert 0 keeps 0.9 and 0.8, expert 1 keeps 0.5 and 0.3, wherever they stand."""
    result = admit(FOUR, 2, order="score", scores=AFFINITY)

    assert result.accepted.tolist() == [[False, False], [True, True], [True, True], [True, False]]
    assert result.processed.tolist() == [2, 2, 1]


def test_one_score_per_token_serves_the_important_tokens_first() -> None:
    """Batch-prioritised routing: the last token is the most important one and loses nothing."""
    importance = np.repeat([[0.1], [0.2], [0.3], [0.4]], 2, axis=1)

    assert admit(FOUR, 2, order="score", scores=importance).accepted.tolist() == [
        [False, False],
        [False, True],
        [True, True],
        [True, True],
    ]


def test_scores_that_fall_by_column_serve_first_choices_first() -> None:
    """Expert 1 is the first choice of the last token, which now comes before the second choices of tokens 0 and 2."""
    result = admit(FOUR, 1, order="score", scores=np.tile([0.0, -1.0], (4, 1)))

    assert result.accepted.tolist() == [[True, False], [False, True], [False, False], [True, False]]


def test_equal_scores_are_served_in_arrival_order() -> None:
    assert admit(FOUR, 2, order="score", scores=np.zeros((4, 2))).accepted.tolist() == admit(FOUR, 2).accepted.tolist()


def test_random_order_drops_every_token_alike_and_repeats_with_its_seed() -> None:
    """Ten tokens, one expert, four slots: each is kept in 40 % of 5000 draws."""
    alike, rng = np.zeros((10, 1), dtype=np.int64), np.random.default_rng(1)
    kept = np.mean([admit(alike, 4, order="random", rng=rng).accepted[:, 0] for _ in range(5000)], axis=0)
    first, again = (admit(alike, 4, order="random", rng=np.random.default_rng(2)).accepted for _ in range(2))

    assert kept == pytest.approx(np.full(10, 0.4), abs=0.03)
    assert (first == again).all()


@pytest.mark.parametrize(("order", "needs"), [("score", "scores"), ("random", "rng")])
def test_an_order_needs_its_means(order: Any, needs: str) -> None:
    with pytest.raises(ValueError) as caught:
        admit(FOUR, 2, order=order)

    assert str(caught.value) == f"order '{order}' needs {needs}"


# Groups, absent choices, exemptions


def test_each_capacity_group_has_its_own_slots() -> None:
    """Two groups of two tokens, one slot per expert in each."""
    result = admit(FOUR, 1, groups=2)

    assert result.accepted.tolist() == [[True, True], [False, True], [True, True], [False, False]]
    assert result.processed.tolist() == [2, 2, 1]


def test_groups_are_as_equal_as_they_can_be() -> None:
    """Five tokens in two groups: three and two."""
    alike = np.zeros((5, 1), dtype=np.int64)

    assert group_sizes(5, 2).tolist() == [3, 2]
    assert admit(alike, 1, groups=2).accepted[:, 0].tolist() == [True, False, False, True, False]


def test_a_token_may_choose_fewer_experts() -> None:
    """-1 is no choice: it asks for no slot and is not dropped; a token without any choice cannot lose one."""
    result = admit(np.array([[0, -1], [0, 1], [-1, -1]]), 1)

    assert result.accepted.tolist() == [[True, False], [False, True], [False, False]]
    assert result.dropped.tolist() == [[False, False], [True, False], [False, False]]
    assert (result.assigned.tolist(), result.dropped_fraction, result.lost_fraction) == ([2, 1], 1 / 3, 0.0)


def test_no_limit_keeps_all() -> None:
    assert admit(FOUR, None).accepted.all()
    assert admit(FOUR, 1, overflow="none").accepted.all()


def test_no_tokens() -> None:
    result = admit(np.empty((0, 2), dtype=np.int64), 3, overflow="reroute", total=4)

    assert result.processed.tolist() == [0] * 4
    assert (result.dropped_fraction, result.lost_fraction, result.profile(2).tolist()) == (0.0, 0.0, [0.0, 0.0])


def test_the_number_of_experts_may_be_stated() -> None:
    assert admit(FOUR, 2, total=5).processed.tolist() == [2, 2, 1, 0, 0]


def test_exempt_tokens_are_kept_beyond_the_capacity() -> None:
    """The last token stays with both experts; it takes no slot away from those that were served before it."""
    result = admit(FOUR, 2, exempt=np.array([False, False, False, True]))

    assert result.accepted.tolist() == [[True, True], [True, True], [False, True], [True, True]]
    assert result.processed.tolist() == [3, 3, 1]


def test_exempt_tokens_keep_the_overflow_that_counts_let_them_keep() -> None:
    """A tenth of 4096 tokens in 64 sequences is exempt: over 300 draws the kept rows agree to 1 % of the overflow."""
    rng = np.random.default_rng(3)
    choices, _ = noisy(0.7, 4096, 32, 2, rng)
    limit = capacities.slots(1.0, 4096, 2, 32)
    counts = np.bincount(choices.ravel(), minlength=32)
    expected = capacities.apply(counts[None], limit, exempt=0.125).processed[0]
    strict = np.minimum(counts, limit)
    kept = np.zeros(32)
    for _ in range(300):
        sequences = rng.permutation(64) < 8
        kept += (
            admit(choices, limit, order="random", rng=rng, exempt=np.repeat(sequences, 64), total=32).processed / 300
        )

    assert kept.sum() - strict.sum() == pytest.approx(expected.sum() - strict.sum(), rel=0.01)
    assert kept == pytest.approx(expected, abs=2.0)


# Rerouting


def test_overflow_moves_to_the_best_expert_with_room() -> None:
    """One slot each: token 1 would rather have expert 2, but it is taken; it goes to 3, the last token to 1."""
    choices = np.array([[0], [0], [2], [0]])
    liking = np.array([[9, 0, 0, 0], [9, 1, 8, 7], [0, 0, 9, 0], [9, 8, 7, 6]], dtype=float)
    result = admit(choices, 1, overflow="reroute", alternatives=liking)

    assert result.experts.tolist() == [[0], [3], [2], [1]]
    assert (result.chosen == choices).all()
    assert result.dropped_fraction == 0.0
    assert (result.assigned.tolist(), result.processed.tolist()) == ([3, 0, 1, 0], [1, 1, 1, 1])


def test_who_is_refused_asks_again() -> None:
    """Tokens 1, 2 and 3 all want expert 1, which has one slot: the first gets it, the others go on to 2 and 3."""
    liking = np.tile([9.0, 8.0, 7.0, 6.0], (4, 1))
    choices = np.zeros((4, 1), dtype=np.int64)

    assert admit(choices, 1, overflow="reroute", alternatives=liking).experts[:, 0].tolist() == [0, 1, 2, 3]
    by_score = admit(
        choices,
        1,
        order="score",
        scores=np.array([[1.0], [2.0], [3.0], [4.0]]),
        overflow="reroute",
        alternatives=liking,
    )
    assert by_score.experts[:, 0].tolist() == [3, 2, 1, 0]


def test_chosen_experts_are_served_before_the_rerouted_ones() -> None:
    """Token 1 overflows before token 2 arrives, and still does not take the slot of token 2's own choice."""
    result = admit(np.array([[0], [0], [1]]), 1, overflow="reroute", total=2)

    assert result.accepted[:, 0].tolist() == [True, False, True]


def test_a_token_never_meets_the_same_expert_twice() -> None:
    """The second token loses both choices and finds two others; the third finds none that is not its own."""
    result = admit(np.array([[0, 1], [0, 1], [2, 3]]), 1, overflow="reroute", total=4, groups=1)
    assert result.experts.tolist() == [[0, 1], [0, 1], [2, 3]]
    assert result.dropped_fraction == 2 / 6

    result = admit(np.array([[0, 1], [0, 1]]), 1, overflow="reroute", total=4)
    assert result.experts.tolist() == [[0, 1], [2, 3]]
    assert result.accepted.all()

    result = admit(np.array([[0, 1], [0, 1], [0, 1]]), 2, overflow="reroute", total=3)
    assert result.experts.tolist() == [[0, 1], [0, 1], [2, 1]]
    assert result.accepted.tolist() == [[True, True], [True, True], [True, False]]


def test_experts_that_a_token_may_not_use() -> None:
    """Minus infinity: the nodes that the router has ruled out stay so, and the assignment is dropped."""
    liking = np.array([[1.0, 0.0, 0.0], [1.0, -np.inf, -np.inf]])
    result = admit(np.array([[0], [0]]), 1, overflow="reroute", alternatives=liking)

    assert result.accepted[:, 0].tolist() == [True, False]


def test_rerouting_stays_in_the_capacity_group() -> None:
    """Group 0 overflows; the empty slots of group 1 do not help it."""
    result = admit(np.array([[0], [0], [0], [1], [0], [1]]), 1, overflow="reroute", groups=2, total=2)

    assert result.accepted[:, 0].tolist() == [True, True, False, True, True, False]
    assert result.experts[:, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_with_a_free_choice_rerouting_fills_what_counts_say() -> None:
    """512 tokens, 16 experts, one choice, factor 1: every slot is taken, as counts have it."""
    choices, logits = noisy(1.0, 512, 16, 1, np.random.default_rng(4))
    result = admit(choices, 32, overflow="reroute", alternatives=logits)
    counts = capacities.apply(result.assigned[None], 32, overflow="reroute")

    assert result.processed.tolist() == counts.processed[0].tolist() == [32] * 16


# Where the drops are


@pytest.fixture(scope="module")
def by_spread() -> dict[float, dict[str, list[Admission]]]:
    """32 experts, 2048 tokens, two choices, factor 1.25: 80 layers with lognormal popularity of a given CV."""
    rng, found = np.random.default_rng(5), {}
    for cv in (0.1, 0.25, 0.45, 0.9):
        layers: dict[str, list[Admission]] = {"arrival": [], "score": []}
        for _ in range(80):
            choices, logits = noisy(math.sqrt(math.log1p(cv**2)), 2048, 32, 2, rng)
            layers["arrival"].append(admit(choices, 160, total=32))
            layers["score"].append(admit(choices, 160, order="score", scores=of_choices(choices, logits), total=32))
        found[cv] = layers
    return found


@pytest.mark.parametrize(
    ("cv", "last_tenth", "last_half", "drop"),
    [(0.1, 0.92, 1.00, 0.002), (0.25, 0.59, 1.00, 0.028), (0.45, 0.38, 0.99, 0.088), (0.9, 0.24, 0.88, 0.21)],
)
def test_in_arrival_order_the_end_of_the_group_bears_the_drops(
    by_spread: Any, cv: float, last_tenth: float, last_half: float, drop: float
) -> None:
    layers = by_spread[cv]["arrival"]
    profile = np.mean([layer.profile() for layer in layers], axis=0)
    share = profile / profile.sum()

    assert profile[0] == 0.0
    assert share[-1] == pytest.approx(last_tenth, abs=0.04)
    assert share[5:].sum() == pytest.approx(last_half, abs=0.015)
    assert profile.mean() == pytest.approx(drop, rel=0.06, abs=5e-4)


@pytest.mark.parametrize("cv", [0.25, 0.45, 0.9])
def test_by_score_the_drops_are_spread_evenly(by_spread: Any, cv: float) -> None:
    """No tenth of the group bears more than 11 % or less than 9 % of the drops; how many there are stays the same."""
    profile = np.mean([layer.profile() for layer in by_spread[cv]["score"]], axis=0)
    drops = [[layer.dropped_fraction for layer in by_spread[cv][order]] for order in ("arrival", "score")]

    assert profile / profile.sum() == pytest.approx(np.full(10, 0.1), abs=0.011)
    assert drops[0] == drops[1]


@pytest.mark.parametrize("cv", [0.1, 0.25, 0.45, 0.9])
def test_the_closed_form_of_the_profile_agrees_with_admission(by_spread: Any, cv: float) -> None:
    """The whole exactly, every tenth to 0.8 % of its assignments: the form spreads arrivals evenly over the group."""
    layers = by_spread[cv]["arrival"]
    profile = np.mean([layer.profile() for layer in layers], axis=0)
    form = drop_profile([layer.assigned / 128 for layer in layers], 1.25)

    assert form.mean() == pytest.approx(np.mean([layer.dropped_fraction for layer in layers]))
    assert form == pytest.approx(profile, abs=0.008)


def test_shares_and_profile_count_positions_within_their_group() -> None:
    """Four groups of five tokens, two slots: positions 2, 3 and 4 of each lose theirs."""
    result = admit(np.zeros((20, 1), dtype=np.int64), 2, groups=4)

    assert result.profile(5).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert result.share_of_drops(5) == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert result.profile(1).tolist() == [0.6]
    assert admit(FOUR, 4).share_of_drops(2).tolist() == [0.0, 0.0]


def test_balanced_routing_drops_what_the_binomial_law_says() -> None:
    """64 experts, one choice, groups of 1024 tokens, factor 1.25: 2.2415 %; 400 groups at once give it to 3 %."""
    choices = np.random.default_rng(6).integers(0, 64, (400 * 1024, 1))
    result = admit(choices, 20, groups=400, total=64)

    assert result.dropped_fraction == pytest.approx(balanced_drop(1024, 64, 1, 1.25), rel=0.03)
    assert result.lost_fraction == result.dropped_fraction
