"""Routers: every kind against a plain reference that looks at one token after the other, ties included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from simulator.routing.routers import Choices, choose, noisy, softmax, top
from simulator.spec import load_model
from simulator.spec.model import Router

Floats = npt.NDArray[np.float64]
Row = Sequence[float]
Chosen = tuple[list[int], list[float]]
"""Experts of one token and their weights."""

SIZES = {"few": (7, 4, 2), "one": (1, 8, 3), "all": (5, 6, 6), "many": (60, 32, 4), "top-1": (9, 16, 1)}
"""Tokens, experts, top_k."""


def random_logits(tokens: int, experts: int, *, tied: bool = False, seed: int = 11) -> Floats:
    """Logits; tied: whole numbers from -1 to 1, so that nearly every choice has ties."""
    rng = np.random.default_rng(seed + tokens + experts)
    if tied:
        return rng.integers(-1, 2, (tokens, experts)).astype(np.float64)
    return 2.0 * rng.standard_normal((tokens, experts))


# The reference, one token at a time


def probabilities(row: Row) -> list[float]:
    exponentials = [math.exp(value) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def best(keys: Row, count: int, among: Sequence[int] | None = None) -> list[int]:
    """Numbers of the largest keys, largest first, the lower number first where keys are equal."""
    return sorted(range(len(keys)) if among is None else among, key=lambda number: (-keys[number], number))[:count]


def normalised(values: Row) -> list[float]:
    return [value / sum(values) for value in values]


def softmax_token(row: Row, top_k: int, weights: str) -> Chosen:
    experts = best(row, top_k)
    if weights == "before_top_k":
        return experts, [probabilities(row)[expert] for expert in experts]
    if weights == "after_top_k":
        return experts, probabilities([row[expert] for expert in experts])
    return experts, normalised([probabilities(row)[expert] for expert in experts])


def sigmoid_token(row: Row, top_k: int, bias: Row, scaling: float) -> Chosen:
    experts = best([sigmoid(value) + shift for value, shift in zip(row, bias, strict=True)], top_k)
    return experts, [scaling * weight for weight in normalised([sigmoid(row[expert]) for expert in experts])]


def in_best_groups(scores: Row, groups: int, limit: int, score: str) -> list[int]:
    """Experts of the groups that a token may use."""
    size = len(scores) // groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(groups)]
    count = 1 if score == "max" else 2
    values = [sum(sorted((scores[expert] for expert in group), reverse=True)[:count]) for group in members]
    return [expert for group in best(values, limit) for expert in members[group]]


def two_level_token(row: Row, group_row: Row, top_k: int, branching: int, weights: str) -> Chosen:
    """Gates by pair (group, expert); the order is that of the product of the full probabilities."""
    each, size = math.isqrt(top_k), len(row) // branching
    gates, order = {}, {}
    groups = best(group_row, each)
    for group in groups:
        inside = list(row[group * size : (group + 1) * size])
        members = best(inside, each)
        for member in members:
            full = probabilities(group_row)[group] * probabilities(inside)[member]
            outer = probabilities([group_row[other] for other in groups])[groups.index(group)]
            inner = probabilities([inside[other] for other in members])[members.index(member)]
            order[group * size + member] = full
            gates[group * size + member] = outer * inner if weights == "after_top_k" else full
    experts = sorted(order, key=lambda expert: (-order[expert], expert))
    values = [gates[expert] for expert in experts]
    return experts, normalised(values) if weights == "renormalized" else values


def expert_choice_tokens(logits: Floats, top_k: int) -> list[Chosen]:
    tokens, experts = logits.shape
    scores = [probabilities(row.tolist()) for row in logits]
    takes = min(tokens, math.floor(tokens * top_k / experts + 0.5))
    taken: list[list[int]] = [[] for _ in range(tokens)]
    for expert in range(experts):
        # Equal up to the last bits is equal, here as in the router.
        for token in best([round(math.log(scores[token][expert]), 9) for token in range(tokens)], takes):
            taken[token].append(expert)
    rows = [best(logits[token].tolist(), experts, taken[token]) for token in range(tokens)]
    return [(row, [scores[token][expert] for expert in row]) for token, row in enumerate(rows)]


def assert_same(choices: Choices, rows: Sequence[Chosen]) -> None:
    """Choices equal the reference; what is missing in a row is -1 with weight 0."""
    width = choices.experts.shape[1]
    assert choices.experts.dtype == np.int64
    assert choices.experts.tolist() == [experts + [-1] * (width - len(experts)) for experts, _ in rows]
    weights = [values + [0.0] * (width - len(values)) for _, values in rows]
    assert choices.weights == pytest.approx(np.array(weights).reshape(len(rows), width), rel=1e-12)
    chosen = [expert for experts, _ in rows for expert in experts]
    assert choices.counts.tolist() == [chosen.count(expert) for expert in range(choices.scores.shape[1])]


def by_token(logits: Floats, route: Callable[[list[float]], Chosen]) -> list[Chosen]:
    return [route(row.tolist()) for row in logits]


# Every kind against it


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weights", ["before_top_k", "after_top_k", "renormalized"])
def test_softmax_routers(weights: Any, size: str, tied: bool) -> None:
    tokens, experts, top_k = SIZES[size]
    logits = random_logits(tokens, experts, tied=tied)
    choices = choose(Router(weights=weights), logits, top_k)

    assert_same(choices, by_token(logits, lambda row: softmax_token(row, top_k, weights)))
    assert choices.scores == pytest.approx(np.array([probabilities(row.tolist()) for row in logits]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_switch_router_takes_the_most_probable_expert_with_its_probability(tied: bool) -> None:
    logits = random_logits(40, 8, tied=tied)

    for weights in ("before_top_k", "after_top_k"):  # a weight of 1 would leave the router without a gradient
        choices = choose(Router.model_validate({"kind": "switch", "weights": weights}), logits, 1)
        assert_same(choices, by_token(logits, lambda row: softmax_token(row, 1, "before_top_k")))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_sigmoid_routers_select_with_a_bias_and_weigh_without(size: str, tied: bool, biased: bool) -> None:
    tokens, experts, top_k = SIZES[size]
    logits = random_logits(tokens, experts, tied=tied)
    bias = random_logits(1, experts, seed=3)[0] if biased else np.zeros(experts)
    router = Router(kind="sigmoid", weights="renormalized", selection_bias=biased, scaling=2.5)
    choices = choose(router, logits, top_k, bias=bias if biased else None)

    assert_same(choices, by_token(logits, lambda row: sigmoid_token(row, top_k, bias.tolist(), 2.5)))
    assert choices.scores == pytest.approx(1.0 / (1.0 + np.exp(-logits)))


def test_sigmoids_may_be_weights_as_they_are() -> None:
    """The router of Llama 4: normalised, its one expert would always have the weight 1."""
    moe = load_model("llama-4-maverick").moe
    assert moe is not None
    logits = random_logits(12, moe.experts)
    choices = choose(moe.router, logits, moe.top_k)

    assert choices.weights[:, 0] == pytest.approx(1.0 / (1.0 + np.exp(-logits.max(1))))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("score", ["max", "top2_sum"])
@pytest.mark.parametrize("biased", [False, True])
def test_group_limited_routers(biased: bool, score: Any, kind: Any) -> None:
    """Groups compete with the scores that select: biased ones, as in DeepSeek-V3."""
    logits, bias = random_logits(50, 24), 0.1 * random_logits(1, 24, seed=4)[0]
    router = Router(kind=kind, groups=6, group_limit=2, group_score=score, weights="renormalized")
    choices = choose(router, logits, 5, bias=bias if biased else None)

    def route(row: list[float]) -> Chosen:
        scores = probabilities(row) if kind == "softmax" else [sigmoid(value) for value in row]
        selection = [value + shift * biased for value, shift in zip(scores, bias.tolist(), strict=True)]
        experts = best(selection, 5, in_best_groups(selection, 6, 2, score))
        return experts, normalised([scores[expert] for expert in experts])

    assert_same(choices, by_token(logits, route))


def test_groups_of_one_expert_and_limits_that_allow_all() -> None:
    logits = random_logits(20, 8)
    plain = choose(Router(), logits, 3)

    for options in ({"groups": 8, "group_limit": 3, "group_score": "top2_sum"}, {"groups": 2, "group_limit": 2}):
        limited = choose(Router.model_validate(options), logits, 3)
        assert limited.experts.tolist() == plain.experts.tolist()


@pytest.mark.parametrize("size", SIZES)
def test_noisy_top_k_is_a_softmax_over_the_kept_noisy_logits(size: str) -> None:
    """The noise is softplus(noise logits) times a normal number, drawn from the caller's generator."""
    tokens, experts, top_k = SIZES[size]
    logits, noise_logits = random_logits(tokens, experts), random_logits(tokens, experts, seed=5)
    choices = choose(Router(kind="noisy_top_k"), logits, top_k, noise_logits=noise_logits, rng=np.random.default_rng(9))

    draws = np.random.default_rng(9).standard_normal((tokens, experts))
    noise = [[math.log1p(math.exp(value)) for value in row] for row in noise_logits.tolist()]
    assert_same(choices, by_token(logits + draws * noise, lambda row: softmax_token(row, top_k, "after_top_k")))
    assert (
        noisy(logits, noise_logits, np.random.default_rng(9)) == logits + draws * np.logaddexp(0, noise_logits)
    ).all()


def test_noisy_top_k_evaluates_without_noise() -> None:
    logits = random_logits(30, 16)

    assert_same(
        choose(Router(kind="noisy_top_k"), logits, 4),
        by_token(logits, lambda row: softmax_token(row, 4, "after_top_k")),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(64, 8, 2), (33, 8, 2), (5, 4, 4), (50, 16, 1)])
def test_expert_choice(tokens: int, experts: int, top_k: int, tied: bool) -> None:
    logits = random_logits(tokens, experts, tied=tied)
    choices = choose(Router(kind="expert_choice"), logits, top_k)

    assert_same(choices, expert_choice_tokens(logits, top_k))
    assert set(choices.counts.tolist()) == {math.floor(tokens * top_k / experts + 0.5)}


def test_in_expert_choice_a_token_may_have_no_expert_or_all_of_them() -> None:
    """Two experts take two of four tokens: both the same ones where the experts compete for nothing."""
    logits = np.array([[0.0, 0.0], [1.0, 1.0], [5.0, -5.0], [-5.0, 5.0]])
    choices = choose(Router(kind="expert_choice"), logits, 1)

    assert choices.experts.tolist() == [[0, 1], [-1, -1], [0, -1], [1, -1]]  # of equal tokens the earlier one
    assert choices.weights[:2].tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert choose(Router(kind="expert_choice"), logits[:0], 1).experts.shape == (0, 0)


@pytest.mark.parametrize("weights", ["before_top_k", "after_top_k", "renormalized"])
@pytest.mark.parametrize("group_logits", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "branching", "top_k"), [(40, 32, 4, 4), (20, 12, 6, 1), (9, 36, 6, 9), (3, 4, 2, 4)]
)
def test_two_levels_of_gating(
    tokens: int, experts: int, branching: int, top_k: int, group_logits: bool, weights: Any
) -> None:
    logits = random_logits(tokens, experts)
    sums = np.log(np.exp(logits).reshape(tokens, branching, -1).sum(-1))
    first = random_logits(tokens, branching, seed=6) if group_logits else sums
    router = Router(branching=branching, weights=weights, scaling=3.0)
    choices = choose(router, logits, top_k, group_logits=first if group_logits else None)
    rows = [
        two_level_token(row, group_row, top_k, branching, weights)
        for row, group_row in zip(logits.tolist(), first.tolist(), strict=True)
    ]

    assert_same(choices, [(chosen, [3.0 * value for value in values]) for chosen, values in rows])
    assert choices.scores.sum(1) == pytest.approx(np.ones(tokens))
    if not group_logits:  # the probability of a group is the sum over its experts
        assert choices.scores == pytest.approx(softmax(logits))


def test_two_levels_of_noisy_gating_normalise_at_each_level() -> None:
    moe = load_model("moe-lstm-1b-256-h").moe
    assert moe is not None
    logits = random_logits(25, moe.experts)
    noise_logits = np.zeros_like(logits)
    choices = choose(moe.router, logits, 4, noise_logits=noise_logits, rng=np.random.default_rng(1))

    assert moe.router.branching is not None
    disturbed = noisy(logits, noise_logits, np.random.default_rng(1))
    first = np.log(np.exp(disturbed).reshape(25, moe.router.branching, -1).sum(-1))
    rows = [
        two_level_token(row, group_row, 4, moe.router.branching, "after_top_k")
        for row, group_row in zip(disturbed.tolist(), first.tolist(), strict=True)
    ]
    assert_same(choices, rows)
    assert choices.weights.sum(1) == pytest.approx(np.ones(25))


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_a_hash_router_gives_every_token_id_its_experts_and_every_expert_the_same_ids(top_k: int) -> None:
    ids = np.random.default_rng(2).permutation(8 * 50)
    choices = choose(Router(kind="hash"), np.zeros((400, 8)), top_k, token_ids=ids)

    assert choices.counts.tolist() == [50 * top_k] * 8
    assert (choices.weights == 1.0).all()
    assert all(len(set(row)) == top_k for row in choices.experts.tolist())
    for slot in choices.experts.T:
        assert np.bincount(slot).tolist() == [50] * 8


def test_the_hash_table_depends_neither_on_the_batch_nor_on_the_logits() -> None:
    router, whole = Router(kind="hash"), np.arange(1000)
    table = choose(router, np.zeros((1000, 16)), 2, token_ids=whole).experts
    ids = np.array([3, 999, 3, 17, 250])
    again = choose(router, random_logits(5, 16), 2, token_ids=ids)

    assert again.experts.tolist() == table[ids].tolist()
    assert again.scores.sum(1).tolist() == [1.0] * 5
    assert len({tuple(run) for run in table[:992, 0].reshape(-1, 16).tolist()}) == 62  # a permutation for each run


# A second choice at random


def test_a_second_expert_is_kept_twice_as_often_as_its_share() -> None:
    """Shares 0.5, 0.4, 0.2 and 0.05 of the second: kept always, and in 80, 40 and 10 % of 20,000 tokens each."""
    for share, chance in ((0.5, 1.0), (0.4, 0.8), (0.2, 0.4), (0.05, 0.1)):
        logits = np.tile(np.log([1e-3, (1 - share) * 0.9 + 1e-9, share * 0.9, 1e-30]), (20_000, 1))
        router = Router(second_choice="random", weights="after_top_k", scaling=2.0)
        choices = choose(router, logits, 2, rng=np.random.default_rng(7))
        kept = choices.experts[:, 1] >= 0

        assert kept.mean() == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 20_000) + 1e-9)
        assert choices.weights[kept, 1] == pytest.approx(2.0 * share)
        assert (choices.weights[~kept, 1] == 0.0).all()
        assert choices.weights[:, 0] == pytest.approx(2.0 * (1 - share))  # the first one keeps its weight
        assert choices.counts.tolist() == [0, 20_000, kept.sum(), 0]


@pytest.mark.parametrize("weights", ["before_top_k", "after_top_k", "renormalized"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy_top_k"])
def test_a_random_second_choice_only_takes_experts_away(kind: Any, weights: Any) -> None:
    logits = random_logits(300, 8)
    noise_logits = np.zeros_like(logits)
    router = Router(kind=kind, weights=weights)
    both = choose(router, logits, 2, noise_logits=noise_logits, rng=np.random.default_rng(4))
    random = router.model_copy(update={"second_choice": "random"})
    some = choose(random, logits, 2, noise_logits=noise_logits, rng=np.random.default_rng(4))
    kept = some.experts >= 0

    assert 0.2 < kept[:, 1].mean() < 0.9
    assert kept[:, 0].all()
    assert (some.experts[kept] == both.experts[kept]).all()
    assert (some.weights == np.where(kept, both.weights, 0.0)).all()
    assert some.scores.tolist() == both.scores.tolist()


# Presets, extremes, refusals


@pytest.mark.parametrize("model", ["deepseek-v2", "deepseek-v3", "mixtral-8x7b", "qwen3-235b-a22b", "switch-base-8"])
def test_routers_of_known_models(model: str) -> None:
    """Weights of their kind, groups within their limit, and a spread of experts that a fair draw would have."""
    moe = load_model(model).moe
    assert moe is not None
    router = moe.router
    logits = np.random.default_rng(8).standard_normal((2000, moe.experts))
    choices = choose(router, logits, moe.top_k, bias=np.zeros(moe.experts) if router.selection_bias else None)
    totals = choices.weights.sum(1)

    if router.weights == "before_top_k":
        assert ((totals > 0) & (totals < router.scaling)).all()
    else:
        assert totals == pytest.approx(np.full(2000, router.scaling))
    if router.group_limit:
        groups = choices.experts // (moe.experts // router.groups)
        assert max(len(set(row)) for row in groups.tolist()) == router.group_limit
    mean = 2000 * moe.top_k / moe.experts
    assert stats.chi2.sf(np.square(choices.counts - mean).sum() / mean, moe.experts - 1) > 1e-3


def test_extreme_logits_neither_overflow_nor_tie() -> None:
    """Sigmoids of 50 and 60 are both 1 in double precision; the larger logit still comes first."""
    logits = np.array([[50.0, 60.0, -800.0, -900.0], [-800.0, -900.0, -901.0, -1000.0]])
    router = Router(kind="sigmoid", weights="renormalized")

    assert choose(router, logits, 2).experts.tolist() == [[1, 0], [0, 1]]
    assert choose(router, logits, 2).weights == pytest.approx(np.array([[0.5, 0.5], [1.0, 0.0]]))
    assert choose(Router(weights="after_top_k"), logits, 2).weights[1] == pytest.approx(np.array([1.0, 0.0]))


def test_the_largest_keys_are_found_with_any_number_of_ties() -> None:
    keys = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 1.0], [-np.inf, 1.0, -np.inf, 1.0]])

    for count in range(5):
        assert top(keys, count).tolist() == [best(row, count) for row in keys.tolist()]


@pytest.mark.parametrize(
    ("options", "top_k", "inputs", "message"),
    [
        ({"kind": "noisy_top_k"}, 2, {"rng": np.random.default_rng(0)}, "noise_logits"),
        ({"kind": "hash"}, 1, {}, "token_ids"),
        ({"kind": "hash"}, 1, {"token_ids": np.array([0, -1, 2])}, "zero or more"),
        ({"kind": "hash"}, 1, {"token_ids": np.array([0, 1])}, "3 numbers"),
        ({"second_choice": "random"}, 2, {}, "needs rng"),
        ({"second_choice": "random"}, 3, {"rng": np.random.default_rng(0)}, "top_k = 2"),
        ({"second_choice": "random", "kind": "expert_choice"}, 2, {}, "top_k = 2"),
        ({"kind": "switch"}, 2, {}, "one expert"),
        ({}, 0, {}, "between 1 and the 12 experts"),
        ({}, 13, {}, "between 1 and the 12 experts"),
        ({"groups": 5, "group_limit": 2}, 2, {}, "do not divide into 5"),
        ({"groups": 6, "group_limit": 2}, 5, {}, "cannot hold top_k = 5"),
        ({"branching": 5}, 4, {}, "do not divide into 5"),
        ({"branching": 4}, 2, {}, "not the square"),
        ({"branching": 2}, 9, {}, "not the square"),
        ({"branching": 4, "kind": "sigmoid"}, 4, {}, "two-level"),
        ({"branching": 4, "groups": 4, "group_limit": 2}, 4, {}, "no effect on two-level gating"),
        ({"branching": 4}, 4, {"group_logits": np.zeros((3, 3))}, "[3, 4]"),
        ({"branching": 4}, 4, {"bias": np.zeros(12)}, "no effect on two-level gating"),
        ({"kind": "expert_choice"}, 2, {"bias": np.zeros(12)}, "no effect on expert_choice"),
        ({}, 2, {"bias": np.zeros(1)}, "each of the 12 experts"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(
    options: dict[str, Any], top_k: int, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        choose(Router.model_validate(options), np.zeros((3, 12)), top_k, **inputs)

    assert message in str(refusal.value)


@pytest.mark.parametrize("logits", [np.zeros(4), np.full((2, 4), np.nan), np.full((2, 4), np.inf)])
def test_logits_are_finite_numbers_of_tokens_by_experts(logits: Floats) -> None:
    with pytest.raises(ValueError, match="finite"):
        choose(Router(), logits, 1)
