"""Routing: who gets how many tokens, what overflows, and what a scenario makes of it.

Counts are drawn directly, without simulating tokens. Two oracles guard the drawing: a simulation that routes every
token by noisy top-k, and the exact binomial law of balanced routing, N ~ Binomial(T, k/E), under which the dropped
fraction of assignments at capacity C is E[max(0, N - C)] / (T k / E) (:func:`balanced_drop`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from simulator.errors import InvalidInput, NotSimulated
from simulator.layout import resolve
from simulator.routing import ExpertLoad, documents, expert_load, group_tokens, over_steps, tokens_per_rank
from simulator.routing import capacity as capacities
from simulator.routing import load as loads
from simulator.routing.admission import admit
from simulator.routing.closed_forms import balanced_drop
from simulator.routing.load import draw, in_proportion, inclusion
from simulator.routing.tendencies import Tendencies
from simulator.routing.tokens import block
from simulator.routing.traffic import copies_by_tier
from simulator.spec import Scenario, load_model, load_scenario
from simulator.spec.model import Router

Counts = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]


def by_token(weights: Weights, tokens: int, top_k: int, samples: int, rng: np.random.Generator) -> Counts:
    """Route every token by itself: top-k of logits with Gumbel noise, as exponential keys [samples, experts]."""
    experts = len(weights)
    counts = np.zeros((samples, experts), dtype=np.int64)
    for sample in range(samples):
        keys = rng.standard_exponential((tokens, experts), dtype=np.float32) / weights.astype(np.float32)
        chosen = np.argpartition(keys, top_k - 1, axis=-1)[:, :top_k]
        counts[sample] = np.bincount(chosen.ravel(), minlength=experts)
    return counts


def by_count(weights: Weights, tokens: int, top_k: int, samples: int, rng: np.random.Generator) -> Counts:
    return draw(np.tile(inclusion(weights, top_k), (samples, 1)), tokens, top_k, rng)


def dropped(counts: Counts, limit: int) -> npt.NDArray[np.float64]:
    """Dropped fraction of each sample."""
    outcome = capacities.apply(counts, limit)
    return np.asarray(outcome.dropped.sum(-1) / counts.sum(-1))


def skewed(sigma: float, experts: int = 256, seed: int = 7) -> Weights:
    logits = sigma * np.random.default_rng(seed).standard_normal(experts)
    return np.asarray(np.exp(logits) / np.exp(logits).sum())


# The sampler against tokens


@pytest.mark.parametrize(
    ("experts", "top_k", "sigma", "factor", "tolerance"),
    [
        (256, 8, 0.0, 1.0, 0.025),
        (256, 8, 0.0, 1.25, 0.025),
        (256, 8, 0.5, 1.25, 0.025),
        (256, 8, 1.0, 1.25, 0.025),
        (256, 8, 1.0, 2.0, 0.025),
        (64, 6, 0.0, 1.0, 0.025),
        (64, 1, 0.5, 1.25, 0.025),
        (8, 2, 0.0, 1.0, 0.04),
        (8, 2, 0.5, 1.25, 0.03),
        (8, 1, 1.0, 1.25, 0.03),
        (16, 4, 0.5, 1.25, 0.08),  # the form of pi is coarse for few experts and more than two choices
    ],
)
def test_drops_and_their_spread_agree_with_routing_every_token(
    experts: int, top_k: int, sigma: float, factor: float, tolerance: float
) -> None:
    """512 tokens: the mean drop within 2.5 %, a little more where few experts make it scatter; its spread within 20 %.

    Independent binomials have the mean, but where loads are even about twice the spread.
    """
    rng = np.random.default_rng(1)
    weights, limit = skewed(sigma, experts), capacities.slots(factor, 512, top_k, experts)
    truth = dropped(by_token(weights, 512, top_k, 250 if experts > 64 else 1000, rng), limit)
    drawn = dropped(by_count(weights, 512, top_k, 4000, rng), limit)

    assert drawn.mean() == pytest.approx(truth.mean(), rel=tolerance)
    assert drawn.std() == pytest.approx(truth.std(), rel=0.2)
    if (experts, sigma, factor) == (256, 0.0, 1.0):
        loose = dropped(rng.binomial(512, inclusion(weights, 8), (2000, 256)), limit)
        assert [truth.mean(), truth.std()] == [pytest.approx(0.0973, rel=0.02), pytest.approx(0.0046, rel=0.15)]
        assert loose.std() > 1.6 * drawn.std()


def test_the_chance_to_be_among_the_k_choices_agrees_with_routing_every_token() -> None:
    """The form 1 - exp(-p t): within 2 % and four standard errors of the simulated share, for every expert."""
    weights, tokens = skewed(1.0), 60_000
    chances = inclusion(weights, 8)
    truth = by_token(weights, tokens, 8, 1, np.random.default_rng(2))[0] / tokens
    error = np.sqrt(chances * (1.0 - chances) / tokens)

    assert chances.sum() == pytest.approx(8.0)
    assert (np.abs(chances - truth) < 0.02 * truth + 4.0 * error).all()
    assert (np.corrcoef(chances, truth)[0, 1], chances.max()) == (
        pytest.approx(1.0, abs=1e-3),
        pytest.approx(0.214, abs=1e-3),
    )


def test_chances_that_are_known_exactly() -> None:
    """One choice is the weight itself; of two, an expert is the first, or the second after another first one."""
    weights = np.array([0.5, 0.3, 0.2])
    second = np.array(
        [0.3 * 0.5 / 0.7 + 0.2 * 0.5 / 0.8, 0.5 * 0.3 / 0.5 + 0.2 * 0.3 / 0.8, 0.5 * 0.2 / 0.5 + 0.3 * 0.2 / 0.7]
    )

    assert inclusion(weights, 1).tolist() == weights.tolist()
    assert inclusion(weights, 2) == pytest.approx(weights + second)
    assert inclusion(weights, 3).tolist() == [1.0] * 3
    assert inclusion(np.full(64, 1 / 64), 6) == pytest.approx(np.full(64, 6 / 64))
    assert inclusion(np.array([1.0, 0.0, 0.0]).clip(1e-12), 2) == pytest.approx(np.array([1.0, 0.5, 0.5]), abs=1e-3)


def test_every_expert_keeps_the_variance_of_its_binomial_law() -> None:
    """The counts sum to T k, and yet no variance is lost: T pi (1 - pi) for 4, 8 and 64 experts alike."""
    for experts, top_k in ((4, 1), (8, 2), (64, 6)):
        counts = by_count(np.full(experts, 1 / experts), 4096, top_k, 20_000, np.random.default_rng(8))
        share = top_k / experts
        assert counts.var(axis=0).mean() == pytest.approx(4096 * share * (1 - share), rel=0.01)


# The exact law of balanced routing


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(4096, 8, 2), (1024, 64, 1), (4096, 128, 1), (8192, 128, 1), (4096, 64, 2), (4096, 64, 6), (65536, 256, 8)],
)
def test_drops_of_balanced_routing_follow_the_binomial_law(tokens: int, experts: int, top_k: int) -> None:
    """To 3 % of the drop where it is large and to 0.02 % of the assignments everywhere."""
    counts = by_count(np.full(experts, 1 / experts), tokens, top_k, 1500, np.random.default_rng(3))

    for factor in (1.0, 1.1, 1.25, 1.5):
        limit = capacities.slots(factor, tokens, top_k, experts)
        expected = balanced_drop(tokens, experts, top_k, factor, slots=limit)
        assert dropped(counts, limit).mean() == pytest.approx(expected, rel=0.03, abs=2e-4)


# Counts in proportion


def test_counts_in_proportion_to_shares() -> None:
    """By largest remainder; an expert never has more than all tokens, and what it cannot take goes to the others."""
    shares = np.array([[4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [9.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])

    assert in_proportion(shares, 8, 2).tolist() == [[8, 4, 2, 2], [6, 5, 5, 0], [8, 3, 3, 2], [8, 3, 3, 2]]
    assert in_proportion(np.ones((3, 3)), np.array([[0], [1], [2]]), 1).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert in_proportion(np.ones((2, 4)), 5, 4).tolist() == [[5] * 4] * 2


# Capacity


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1.25, 4096, 1, 64), 80),
        ((1.0, 4096, 8, 256), 128),
        ((1.0, 100, 2, 7), 29),  # 28.57: the slot that is needed in part
        ((1.1, 1000, 1, 10), 110),  # not 111: 1.1 is not exact in binary
        ((0.001, 10, 1, 100), 1),  # at least one
    ],
)
def test_slots_of_one_expert(arguments: tuple[float, int, int, int], expected: int) -> None:
    assert capacities.slots(*arguments) == expected


def test_capacity_may_leave_top_k_out() -> None:
    """GShard's factor of 2 for top-2 is a factor of 1 times top_k."""
    assert capacities.slots(2.0, 4096, 2, 64, counts_top_k=False) == capacities.slots(1.0, 4096, 2, 64) == 128


@pytest.mark.parametrize(
    ("options", "processed", "computed", "drops"),
    [
        ({"capacity": 12}, [8, 4, 1, 2], [8, 4, 1, 2], [4, 2, 0, 0]),
        ({"capacity": 12, "pad": True}, [8, 4, 1, 2], [8, 4, 5, 7], [4, 2, 0, 0]),
        ({"capacity": 12, "overflow": "reroute"}, [8, 4, 4, 5], [8, 4, 4, 5], [0, 0, 0, 0]),
        ({"capacity": 9, "overflow": "reroute"}, [6, 3, 4, 5], [6, 3, 4, 5], [2, 1, 0, 0]),
        ({"capacity": 12, "exempt": 0.5}, [10, 5, 1, 2], [10, 5, 1, 2], [2, 1, 0, 0]),
        ({"capacity": 12, "overflow": "none"}, [12, 6, 1, 2], [12, 6, 1, 2], [0, 0, 0, 0]),
    ],
)
def test_two_devices_of_two_experts_share_a_capacity(
    options: dict[str, Any], processed: list[int], computed: list[int], drops: list[int]
) -> None:
    """18 assignments meet 12 slots: both experts lose a third. What comes from elsewhere is shared evenly."""
    outcome = capacities.apply(np.array([12, 6, 1, 2]), options.pop("capacity"), holders=2, **options)

    assert outcome.processed.tolist() == processed
    assert outcome.computed.tolist() == computed
    assert outcome.dropped.tolist() == drops


LOADS: Counts = np.array([[10, 0, 3, 7], [5, 5, 5, 5]])


@pytest.mark.parametrize(
    ("options", "processed", "computed", "drops"),
    [
        ({"capacity": None}, [[10, 0, 3, 7], [5, 5, 5, 5]], [[10, 0, 3, 7], [5, 5, 5, 5]], [0, 0]),
        ({"capacity": 6}, [[6, 0, 3, 6], [5, 5, 5, 5]], [[6, 0, 3, 6], [5, 5, 5, 5]], [5, 0]),
        ({"capacity": 6, "pad": True}, [[6, 0, 3, 6], [5, 5, 5, 5]], [[6, 6, 6, 6], [6, 6, 6, 6]], [5, 0]),
        ({"capacity": 6, "overflow": "none"}, [[10, 0, 3, 7], [5, 5, 5, 5]], [[10, 0, 3, 7], [5, 5, 5, 5]], [0, 0]),
        ({"capacity": 6, "overflow": "reroute"}, [[6, 5, 3, 6], [5, 5, 5, 5]], [[6, 5, 3, 6], [5, 5, 5, 5]], [0, 0]),
        ({"capacity": 4, "overflow": "reroute"}, [[4, 4, 4, 4], [4, 4, 4, 4]], [[4, 4, 4, 4], [4, 4, 4, 4]], [4, 4]),
        ({"capacity": 6, "exempt": 0.5}, [[8, 0, 3, 7], [5, 5, 5, 5]], [[8, 0, 3, 7], [5, 5, 5, 5]], [2, 0]),
        ({"capacity": 6, "exempt": 1.0}, [[10, 0, 3, 7], [5, 5, 5, 5]], [[10, 0, 3, 7], [5, 5, 5, 5]], [0, 0]),
    ],
)
def test_what_capacity_does_to_two_groups_of_four_experts(
    options: dict[str, Any], processed: list[list[int]], computed: list[list[int]], drops: list[int]
) -> None:
    """Drop, pad, keep, move to the experts with room, or spare half of the sequences."""
    outcome = capacities.apply(LOADS, options.pop("capacity"), **options)

    assert outcome.processed.tolist() == processed
    assert outcome.computed.tolist() == computed
    assert outcome.dropped.sum(-1).tolist() == drops


# A scenario's expert load


SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "name": "small",
        "layers": 4,
        "hidden_size": 256,
        "vocabulary_size": 1000,
        "context": 512,
        "mixer": {"kind": "mha", "heads": 4, "head_dim": 64},
        "moe": {
            "experts": 16,
            "top_k": 2,
            "expert_ffn_size": 256,
            "capacity_factor": 1.25,
            "capacity_group_tokens": 256,
        },
    },
    "cluster": {"profile": "h100-sxm", "accelerators": 8},
    "parallelism": {"expert": 4},
    "training": {"tokens": "1B", "sequence_length": 512, "global_batch_sequences": 32},
    "routing": {"load": {"kind": "logits", "population": 0.5}},
}


def small(**changes: Any) -> Scenario:
    return load_scenario(SMALL, changes)


def load_of(scenario: Scenario) -> ExpertLoad:
    load = expert_load(scenario, resolve(scenario))
    assert load is not None
    return load


def test_an_expert_group_of_four_ranks_routes_their_tokens() -> None:
    """8 ranks with 4 microbatches each; one group of 4 ranks has 2048 tokens per microbatch and 4 experts on a rank."""
    scenario = small()
    load = load_of(scenario)

    assert (tokens_per_rank(scenario), group_tokens(scenario), load.tokens.tolist()) == (512, 2048, [2048] * 4)
    assert load.assigned.shape == load.processed.shape == load.computed.shape == (4, 4, 16)
    assert load.by_rank.shape == (4, 4, 4, 4)
    assert (load.assigned.sum(-1) == 2048 * 2).all()
    assert (load.dropped_fraction, load.padding_fraction) == (0.0, 0.0)
    assert 1.0 < load.rank_max_over_mean < load.max_over_mean < 16 / 2


def test_dense_models_have_no_expert_load() -> None:
    scenario = load_scenario({**SMALL, "model": "mistral-7b", "parallelism": {}, "routing": {}})

    assert expert_load(scenario, resolve(scenario)) is None


RICH: dict[str, Any] = {
    "routing.load": {
        "kind": "logits",
        "population": 0.4,
        "domain": 0.5,
        "token": 0.6,
        "context_correlation": 0.2,
        "sticky": 0.1,
        "drift": 0.01,
        "growth": {"start": 0.1, "steps": 20},
        "hot_experts": {"count": 1, "load": 3.0},
    },
    "routing.balance": [{"kind": "load_balance", "weight": 1e-5}, {"kind": "bias"}],
    "routing.at_step": 40,
    "routing.capacity_factor": 1.25,
}
"""A load with everything at once."""


def everything(load: ExpertLoad) -> tuple[bytes, ...]:
    picks = np.zeros(0) if load.picks is None else load.picks
    parts = (load.assigned, load.processed, load.computed, load.by_rank, load.drop_profile, load.lost_fraction, picks)
    return tuple(np.asarray(part).tobytes() for part in parts)


@pytest.mark.parametrize("changes", [{}, RICH], ids=["simple", "everything"])
def test_the_same_seed_gives_the_same_loads_and_another_seed_others(changes: dict[str, Any]) -> None:
    first, again = load_of(small(**changes)), load_of(small(**changes))
    other = load_of(small(**changes, **{"routing.seed": 1}))

    assert everything(first) == everything(again)
    assert first.assigned.tobytes() != other.assigned.tobytes()


@pytest.mark.parametrize("changes", [{}, RICH], ids=["simple", "everything"])
@pytest.mark.parametrize(
    "variant",
    [
        {"routing.capacity_factor": 1.0},
        {"routing.capacity_factor": 2.0, "routing.pad_to_capacity": True},
        {"routing.capacity_factor": 1.0, "routing.overflow": "reroute"},
        {"routing.capacity_factor": 1.0, "routing.capacity_scope": "global"},
        {"routing.capacity_factor": 1.0, "routing.drop_order": "score"},
        {"routing.placement": {"kind": "balanced"}},
        {"routing.placement": {"kind": "balanced", "redundant_experts": 4}},
    ],
    ids=lambda variant: " ".join(str(value) for value in variant.values()),
)
def test_capacity_and_placement_are_compared_on_the_same_draw(changes: dict[str, Any], variant: dict[str, Any]) -> None:
    assert load_of(small(**{**changes, **variant})).assigned.tobytes() == load_of(small(**changes)).assigned.tobytes()


def test_a_larger_capacity_never_drops_more_of_the_same_draw() -> None:
    loads = [load_of(small(**{"routing.capacity_factor": factor})) for factor in (0.5, 1.0, 1.25, 2.0, 8.0)]

    assert all((load.assigned == loads[0].assigned).all() for load in loads)
    assert all((before.processed <= after.processed).all() for before, after in pairwise(loads))
    fractions = [load.dropped_fraction for load in loads]
    assert fractions == sorted(fractions, reverse=True)
    assert (fractions[0] > 0.5, fractions[-1]) == (True, 0.0)


def test_capacity_per_rank_drops_more_than_per_group_and_that_more_than_globally() -> None:
    """Fewer tokens share one capacity: the loads of 512 tokens scatter more than those of 2048 or of all 4096."""
    balanced = {"routing.load": {"kind": "balanced"}, "routing.capacity_factor": 1.0}
    drops = {}
    for scope in ("rank", "group", "global"):
        draws = [
            load_of(small(**balanced, **{"routing.capacity_scope": scope, "routing.seed": seed})) for seed in range(20)
        ]
        drops[scope] = float(np.mean([load.dropped_fraction for load in draws]))

    assert drops["rank"] == pytest.approx(balanced_drop(512, 16, 2, 1.0), rel=0.05)
    assert drops["group"] == pytest.approx(balanced_drop(2048, 16, 2, 1.0), rel=0.08)
    assert drops["global"] == pytest.approx(balanced_drop(4096, 16, 2, 1.0), rel=0.12)


def test_the_presets_own_factor_and_group_size_can_be_asked_for() -> None:
    """capacity_factor model: 1.25; groups of 256 tokens, 8 of them in the expert group, 40 slots each."""
    load = load_of(small(**{"routing.capacity_factor": "model", "routing.capacity_group_tokens": "model"}))

    assert load.processed.max() <= 8 * capacities.slots(1.25, 256, 2, 16) == 8 * 40
    assert 0.0 < load.dropped_fraction < 0.2


def test_padding_computes_every_slot() -> None:
    """Factor 2: every expert computes 512 rows, and the padded share is what stays empty."""
    load = load_of(small(**{"routing.capacity_factor": 2.0, "routing.pad_to_capacity": True}))

    assert (load.computed == 2 * 2048 * 2 // 16).all()
    assert load.padding_fraction == pytest.approx(1.0 - (1.0 - load.dropped_fraction) / 2.0)


def test_rerouting_fills_free_slots_until_none_is_left() -> None:
    enough, scarce = (
        load_of(small(**{"routing.capacity_factor": factor, "routing.overflow": "reroute"})) for factor in (1.0, 0.5)
    )

    assert (enough.dropped_fraction, scarce.dropped_fraction) == (0.0, 0.5)
    assert (enough.processed == 256).all()
    assert (scarce.processed == 128).all()


def test_exempt_sequences_keep_their_share_of_the_overflow() -> None:
    """DeepSeek-V2 exempts about 10 % of the sequences from dropping (arXiv 2405.04434, section 2.2.4)."""
    drops = [
        load_of(small(**{"routing.capacity_factor": 1.0, "routing.exempt_sequence_fraction": share})).dropped_fraction
        for share in (0.0, 0.1, 1.0)
    ]

    assert drops[1] == pytest.approx(0.9 * drops[0], rel=0.01)
    assert drops[2] == 0.0


def test_the_order_of_dropping_changes_nobodys_number() -> None:
    loads = [
        load_of(small(**{"routing.capacity_factor": 1.0, "routing.drop_order": order}))
        for order in ("arrival", "score", "random")
    ]

    assert len({load.processed.tobytes() for load in loads}) == 1


# Where drops fall


@pytest.mark.parametrize("changes", [{}, RICH, {"routing.exempt_sequence_fraction": 0.2}])
@pytest.mark.parametrize("order", ["arrival", "score", "random"])
def test_the_mean_of_the_profile_is_the_dropped_fraction(changes: dict[str, Any], order: str) -> None:
    load = load_of(small(**{**changes, "routing.capacity_factor": 1.0, "routing.drop_order": order}))

    assert load.dropped_fraction > 0.01
    assert load.drop_profile.mean() == pytest.approx(load.dropped_fraction)


def test_late_tokens_are_dropped_in_order_of_arrival_and_any_by_score() -> None:
    """Nothing in the first decile, more from decile to decile, over a fifth of all in the last; by score it is flat."""
    skewed_ = {"routing.load": {"kind": "logits", "population": 0.45}, "routing.capacity_factor": 1.25}
    late, *flat = (
        load_of(small(**skewed_, **{"routing.drop_order": order})).drop_profile
        for order in ("arrival", "score", "random")
    )

    assert (len(late), late[0]) == (10, 0.0)
    assert (np.diff(late) >= 0.0).all()
    assert late[-1] / late.sum() > 0.2
    assert all(np.ptp(profile) == 0.0 and profile[0] > 0.0 for profile in flat)


def test_without_drops_the_profile_is_zero() -> None:
    for changes in ({}, {"routing.capacity_factor": 8.0}, {"routing.capacity_factor": 0.5, "routing.overflow": "none"}):
        load = load_of(small(**changes))
        assert (load.drop_profile.tolist(), load.lost_fraction) == ([0.0] * 10, 0.0)


# Tokens that lose all their experts


@pytest.mark.parametrize("order", ["arrival", "score", "random"])
def test_with_one_choice_a_dropped_assignment_is_a_lost_token(order: str) -> None:
    one = {"model.moe.top_k": 1, "routing.capacity_factor": 1.0, "routing.drop_order": order}
    load = load_of(small(**one))

    assert load.dropped_fraction > 0.1
    assert load.lost_fraction == pytest.approx(load.dropped_fraction)


def test_tokens_that_arrive_late_lose_both_experts() -> None:
    """Against a queue of 2048 tokens, one after the other: about 11 % lose both at a factor of 0.7; 9 % at random."""
    experts, tokens, limit = 16, 2048, capacities.slots(0.7, 2048, 2, 16)
    picks = np.argsort(np.random.default_rng(1).random((tokens, experts)), axis=-1)[:, :2]
    room, lost = np.full(experts, limit), 0
    for token in picks:
        found = [expert for expert in token if room[expert] > 0]
        room[found] -= 1
        lost += not found
    even = {"routing.load": {"kind": "balanced"}, "routing.capacity_factor": 0.7}
    arrival, random = (load_of(small(**even, **{"routing.drop_order": order})) for order in ("arrival", "random"))

    assert arrival.lost_fraction == pytest.approx(lost / tokens, rel=0.1)
    assert random.lost_fraction == pytest.approx(0.3**2, rel=0.1)
    assert arrival.dropped_fraction == random.dropped_fraction
    rerouted = load_of(small(**even, **{"routing.overflow": "reroute"}))  # once all are full, a token loses both
    assert rerouted.lost_fraction == pytest.approx(rerouted.dropped_fraction, rel=0.15)


# Placement


def test_placing_by_load_evens_ranks_out() -> None:
    """Experts of very different popularity on 4 ranks: packed by expected load, and with copies of the busiest."""
    skewed_ = {"routing.load": {"kind": "logits", "population": 0.8}}
    by_number, packed, copied = (
        load_of(small(**skewed_, **{"routing.placement": placement}))
        for placement in ({}, {"kind": "balanced"}, {"kind": "balanced", "redundant_experts": 4})
    )

    assert by_number.rank_max_over_mean > 1.1
    assert packed.rank_max_over_mean < 1.0 + 0.5 * (by_number.rank_max_over_mean - 1.0)
    assert copied.rank_max_over_mean < 1.0 + 0.5 * (by_number.rank_max_over_mean - 1.0)
    assert (packed.by_rank.shape, copied.by_rank.shape) == ((4, 4, 4, 4), (4, 4, 4, 5))
    for load in (by_number, packed, copied):
        assert (load.by_rank.sum((-1, -2)) == load.computed.sum(-1)).all()
        assert 1.0 <= load.rank_max_over_mean <= load.max_over_mean


def test_documents_cannot_be_placed_for() -> None:
    """Where every microbatch has preferences of its own, the expected load is even and packing gains nothing."""
    moody = {"routing.load": {"kind": "logits", "domain": 1.0, "documents": 1}}
    by_number, packed = (
        load_of(small(**moody, **{"routing.placement": {"kind": kind}})) for kind in ("contiguous", "balanced")
    )

    assert packed.rank_max_over_mean == pytest.approx(by_number.rank_max_over_mean, rel=0.1)
    assert packed.rank_max_over_mean > 1.2


def test_a_placement_after_a_recording_knows_the_steps_before(tmp_path: Any) -> None:
    """Other experts are busy in the second half: packed after the first half, the placement is none the wiser.

    In a recording of one step it knows what it is judged on.
    """
    rng, file = np.random.default_rng(2), str(tmp_path / "loads.npz")
    first, second = rng.integers(10, 60, (2, 1, 4, 16))

    def packed(*steps: Counts) -> ExpertLoad:
        np.savez(file, np.concatenate(steps))
        replay = {"routing.load": {"kind": "replay", "file": file}, "routing.placement": {"kind": "balanced"}}
        return load_of(small(**replay))

    changing, steady, single = packed(first, first, second, second), packed(first, first), packed(second)

    assert (changing.assigned == single.assigned).all()
    assert (changing.placement.expert_of_slot == steady.placement.expert_of_slot).all()
    assert steady.rank_max_over_mean < 1.01
    assert single.rank_max_over_mean < 1.01
    assert changing.rank_max_over_mean > 1.05


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"routing.placement": {"redundant_experts": 4}},
            "routing.placement.redundant_experts: copies of experts need placement kind balanced",
        ),
        (
            {"routing.placement": {"kind": "balanced", "redundant_experts": 5}},
            "routing.placement.redundant_experts: 16 experts and 5 copies make 21 slots, which do not divide over 4 "
            "expert ranks; nearest: 8",
        ),
        (
            {"routing.placement": {"kind": "balanced", "redundant_experts": 64}},
            "routing.placement.redundant_experts: 20 slots per rank for 16 experts: a rank would hold an expert twice",
        ),
        (
            {"routing.balance": [{"kind": "z"}, {"kind": "bias", "weight": 0.1}]},
            "routing.balance.1.weight: the bias has no weight; its step is gamma",
        ),
        (
            {"routing.balance": [{"kind": "device", "gamma": 0.1}]},
            "routing.balance.0.gamma: a loss has no step; device has a weight",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_of(small(**changes))

    assert str(caught.value).endswith(expected)


# Every load and every remedy

LOADS_OF_A_SCENARIO: dict[str, dict[str, Any]] = {
    "balanced": {"kind": "balanced"},
    "popular": {"kind": "logits", "population": 0.8},
    "collapsed": {"kind": "logits", "population": 6.0},
    "everything": RICH["routing.load"],
    "dirichlet": {"kind": "dirichlet", "concentration": 0.05},
    "replay": {"kind": "replay", "file": "loads.npz"},
}
REMEDIES = ["importance", "load", "load_balance", "z", "device", "communication", "sequence", "bias"]


@pytest.mark.parametrize("remedy", [*REMEDIES, None])
@pytest.mark.parametrize("load", LOADS_OF_A_SCENARIO)
def test_every_load_goes_with_every_remedy(load: str, remedy: str | None, tmp_path: Any) -> None:
    """All tokens keep their two experts, no expert has more than all tokens, and what is lost is at most a drop."""
    stated = dict(LOADS_OF_A_SCENARIO[load])
    if "file" in stated:
        stated["file"] = str(tmp_path / stated["file"])
        np.savez(stated["file"], np.random.default_rng(0).integers(10, 30, (3, 4, 16)))
    balance = [] if remedy is None else [{"kind": remedy}]
    found = load_of(small(**{"routing.load": stated, "routing.balance": balance, "routing.capacity_factor": 1.1}))

    assert (found.assigned.sum(-1) == 2 * 2048).all()
    assert (found.assigned >= found.processed).all()
    assert 0 <= found.assigned.min() <= found.assigned.max() <= 2048
    assert found.max_over_mean <= 16 / 2
    assert 0.0 <= found.lost_fraction <= found.dropped_fraction + 0.02
    assert found.drop_profile.mean() == pytest.approx(found.dropped_fraction)
    if remedy in ("importance", "load", "load_balance", "sequence") and load in ("popular", "collapsed", "dirichlet"):
        assert found.max_over_mean < load_of(small(**{"routing.load": stated})).max_over_mean


def test_a_remedy_is_looked_at_on_its_way() -> None:
    """The bias after 0, 60 and 2000 steps, and settled: the busiest expert comes down to where it stays."""
    popular = {"routing.load": {"kind": "logits", "population": 0.8}, "routing.balance": [{"kind": "bias"}]}
    busiest = [load_of(small(**popular, **{"routing.at_step": step})).max_over_mean for step in (0, 60, 2000, None)]

    assert busiest[0] > busiest[1] > busiest[2]
    assert busiest[0] == pytest.approx(load_of(small(**{**popular, "routing.balance": []})).max_over_mean, rel=0.06)
    assert busiest[3] == pytest.approx(busiest[2], rel=0.06)  # two moments of a bias that swings


def test_the_states_of_training_are_told_without_drawing_counts() -> None:
    scenario = small(**RICH)
    states = list(over_steps(scenario, resolve(scenario), [0, 50, None]))

    assert [treated.step for treated, _ in states] == [0, 50, None]
    assert all(plain.logits.shape == treated.tendencies.logits.shape == (4, 16) for treated, plain in states)
    for refused in (
        small(**{"routing.load": {"kind": "replay", "file": "loads.npz"}}),
        load_scenario({**SMALL, "model": "mistral-7b", "parallelism": {}, "routing": {}}),
    ):
        with pytest.raises(NotSimulated) as caught:
            list(over_steps(refused, resolve(refused), [0]))
        assert "routing.load" in str(caught.value)


def test_documents_of_a_microbatch() -> None:
    """4 ranks of one sequence each are 4 documents, unless the load says how many."""
    assert documents(small()) == 4.0
    assert documents(small(**{"training.micro_batch_sequences": 2})) == 8.0
    assert documents(small(**{"routing.load": {"kind": "logits", "domain": 1.0, "documents": 3}})) == 3.0


def test_experts_that_choose_their_tokens_take_the_same_number_each() -> None:
    choosing = {"model.moe.router.kind": "expert_choice"}
    load = load_of(small(**choosing))

    assert (load.assigned == 2048 * 2 // 16).all()
    assert (load.picks, load.max_over_mean) == (None, 1.0)
    with pytest.raises(NotSimulated) as caught:
        load_of(small(**choosing, **{"routing.capacity_factor": 1.0}))
    assert "use capacity_factor: null" in str(caught.value)


# Too large to draw in full


def test_further_microbatches_repeat_the_drawn_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "MAX_COUNTS", 2 * 4 * 16)
    load = load_of(small())

    assert load.assigned.shape == (2, 4, 16)
    assert (load.assigned.sum(-1) == 2048 * 2).all()


def test_many_capacity_groups_are_told_from_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 groups of 32 tokens: drawn 8 of them, the drop agrees with all within 15 %, and no token is lost."""
    grouped = {"routing.capacity_factor": 1.0, "routing.capacity_group_tokens": 32}
    full = load_of(small(**grouped))
    monkeypatch.setattr(loads, "MAX_COUNTS", 8 * 4 * 16)
    some = load_of(small(**grouped))

    assert some.assigned.shape == (1, 4, 16)
    assert (some.assigned.sum(-1) == 2048 * 2).all()
    assert (some.computed == some.processed).all()
    assert some.dropped_fraction == pytest.approx(full.dropped_fraction, rel=0.15)
    assert some.drop_profile.mean() == pytest.approx(some.dropped_fraction, rel=0.05)


# What travels


def test_where_all_experts_are_alike_copies_follow_the_formula() -> None:
    scenario = small(**{"routing.load": {"kind": "balanced"}})
    load, moe = load_of(scenario), scenario.model.moe
    assert moe is not None

    assert load.picks is None
    assert load.copies_by_tier(moe, (4, 1)) == copies_by_tier(moe, (4, 1))


def test_hot_experts_on_one_rank_are_reached_with_fewer_copies() -> None:
    """Two experts of the same rank in most tokens need one copy for both; placing by load parts them."""
    moe = small().model.moe
    assert moe is not None
    by_number, packed = (
        load_of(
            small(
                **{
                    "routing.load": {"kind": "logits", "population": 2.0},
                    "routing.placement": {"kind": kind},
                }
            )
        )
        for kind in ("contiguous", "balanced")
    )
    assert packed.picks is not None
    copies_ = [dict(load.copies_by_tier(moe, (4, 1)))[0] for load in (by_number, packed)]

    assert packed.picks.shape == (4 * 2048, 2)
    assert copies_[0] < copies_[1]


@pytest.mark.parametrize(("groups", "tokens"), [(2, "auto"), (4, "auto"), (24, "auto"), (2, 3072)])
def test_a_wider_capacity_meets_the_documents_of_all_who_share_it(groups: int, tokens: int | str) -> None:
    """Against all expert groups drawn one by one: what single groups prefer evens out, the more of them the more.

    24 groups are more than are drawn apart. 3072 tokens are one group and half of another.
    """
    drops = []
    for seed in range(6):
        changes = {
            "cluster.accelerators": 4 * groups,
            "training.global_batch_sequences": 32 * groups,
            "routing.load": {"kind": "logits", "domain": 1.0},
            "routing.capacity_factor": 1.25,
            "routing.capacity_scope": "global",
            "routing.capacity_group_tokens": tokens,
            "routing.seed": seed,
        }
        drops.append(load_of(small(**changes)).dropped_fraction)
    rng = np.random.default_rng(5)
    tendencies = Tendencies(np.zeros((4, 16)), 2, domain=1.0)
    sizes = np.full((groups, 1, 1), 2048) if tokens == "auto" else np.array([2048, 1024])[:, None, None]
    limit = capacities.slots(1.25, int(sizes.sum()), 2, 16)
    expected = []
    for _ in range(80):
        chances = np.concatenate([tendencies.chances(1, size / 512, rng) for size in sizes.ravel()])
        expected.append(dropped(draw(chances, sizes, 2, rng).sum(0), limit).mean())

    assert np.mean(drops) == pytest.approx(np.mean(expected), rel=0.12, abs=2e-4)


def test_a_wider_capacity_loses_no_assignment_between_the_groups() -> None:
    """What is rerouted is computed, what is dropped is told by position too."""
    for overflow in ("drop", "reroute", "none"):
        load = load_of(
            small(
                **{
                    "routing.load": {"kind": "logits", "domain": 1.0, "population": 0.5},
                    "routing.capacity_factor": 0.8,
                    "routing.capacity_scope": "global",
                    "routing.overflow": overflow,
                }
            )
        )
        assert load.drop_profile.mean() == pytest.approx(load.dropped_fraction)
        if overflow == "reroute":
            assert load.dropped_fraction == pytest.approx(0.2, abs=0.06)
            assert (load.processed > load.assigned).any()


def test_a_dropless_training_is_evaluated_in_capacity_groups_of_the_stated_size() -> None:
    """32 groups of 64 tokens drop what 64 tokens drop, not what 2048 do."""
    changes = {
        "routing.load": {"kind": "balanced"},
        "routing.capacity_factor_evaluation": 1.0,
        "routing.capacity_group_tokens": 64,
    }
    load = load_of(small(**changes))

    assert load.dropped_fraction == 0.0
    assert load.dropped_fraction_evaluation == pytest.approx(balanced_drop(64, 16, 2, 1.0), rel=0.03)


def test_a_small_share_of_a_large_overflow_is_not_rounded_away() -> None:
    """An expert group with 10 of each expert's 1000 assignments, of which 20 are dropped: 0.2 of each, 3 of 16."""
    whole = np.full(16, 1000)
    found = capacities.in_part(np.full(16, 10), whole, capacities.apply(whole, 980))

    assert (found.processed.sum(), found.dropped.sum()) == (157, 3)


# Capacity of devices


DEVICES: dict[str, Any] = {"model.moe.router.groups": 4, "routing.capacity_factor": 1.0}


def test_a_capacity_of_devices_drops_what_their_sums_exceed() -> None:
    """DeepSeek-V2's token dropping (arXiv 2405.04434, section 2.2.4): experts of a device make up for each other."""
    by_expert, by_device = (
        load_of(small(**DEVICES, **{"routing.capacity_over": over})) for over in ("expert", "device")
    )
    sums = by_device.assigned.reshape(4, 4, 4, 4).sum(-1)

    assert (by_device.assigned == by_expert.assigned).all()
    assert (by_device.processed.reshape(4, 4, 4, 4).sum(-1) == np.minimum(sums, 2048 * 2 // 4)).all()
    assert 0.0 < by_device.dropped_fraction < 0.6 * by_expert.dropped_fraction
    assert by_device.processed.max() > 2048 * 2 // 16
    assert by_device.drop_profile.mean() == pytest.approx(by_device.dropped_fraction)


def test_a_preset_says_what_its_capacity_limits() -> None:
    preset = {**DEVICES, "model.moe.capacity_over": "device"}
    as_trained, by_expert, by_device = (
        load_of(small(**preset, **{"routing.capacity_over": over})) for over in ("model", "expert", "device")
    )

    assert load_model("deepseek-v2").moe.capacity_over == "device"  # type: ignore[union-attr]
    assert everything(as_trained) == everything(by_device) != everything(by_expert)


def test_a_router_without_groups_has_no_devices() -> None:
    with pytest.raises(InvalidInput) as caught:
        load_of(small(**{"routing.capacity_factor": 1.0, "routing.capacity_over": "device"}))

    assert "routing.capacity_over: a device is one of model.moe.router.groups" in str(caught.value)


def test_a_capacity_of_one_rank_meets_the_documents_of_that_rank_alone() -> None:
    """One sequence per rank: what a rank drops is what one document drops, token by token, not the group's mixture."""
    domain, drops = 0.8, []
    for seed in range(6):
        changes = {
            "routing.load": {"kind": "logits", "domain": domain},
            "routing.capacity_factor": 1.25,
            "routing.capacity_scope": "rank",
            "routing.seed": seed,
        }
        drops.append(load_of(small(**changes)).dropped_fraction)
    rng = np.random.default_rng(0)
    alone = Tendencies(np.zeros((1, 16)), 2, domain=domain)
    limit = capacities.slots(1.25, 512, 2, 16)
    blocks = [block(alone, 0, 512, rng).picks(Router(), 2) for _ in range(200)]
    by_token = np.mean([admit(picks, limit, total=16).dropped_fraction for picks in blocks])

    assert np.mean(drops) == pytest.approx(by_token, rel=0.1)


def test_tokens_of_a_biased_router_choose_as_evenly_as_its_counts_say() -> None:
    load = load_of(
        small(
            **{
                "routing.load": {"kind": "logits", "population": 1.0},
                "routing.balance": [{"kind": "bias", "gamma": 0.0005}],
            }
        )
    )
    assert load.picks is not None
    shares = np.bincount(load.picks.ravel(), minlength=16) / load.picks.size * 16

    assert load.max_over_mean < 1.25
    assert shares.max() < 1.1
