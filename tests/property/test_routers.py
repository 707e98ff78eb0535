"""Laws of routers: no expert twice, weights that sum to what they should, limits that hold, names without meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.routing import balance
from simulator.routing.routers import choose, top
from simulator.spec.model import Router

Floats = npt.NDArray[np.float64]

KINDS = st.sampled_from(["softmax", "noisy_top_k", "sigmoid"])
WEIGHTS = st.sampled_from(["before_top_k", "after_top_k", "renormalized"])


@st.composite
def logits_and_top_k(draw: st.DrawFn, ties: bool = True) -> tuple[Floats, int, np.random.Generator]:
    """Logits of 0 (without ties 1) to 40 tokens and 1 to 24 experts, from equal to far apart; some with ties."""
    experts = draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((draw(st.integers(0 if ties else 1, 40)), experts))
    logits *= draw(st.sampled_from([0.0, 0.5, 3.0, 100.0] if ties else [0.5, 3.0]))
    if ties and draw(st.booleans()):
        logits = logits.round()
    return logits, draw(st.integers(1, experts)), rng


@settings(deadline=None, max_examples=200)
@given(logits_and_top_k(), KINDS, WEIGHTS, st.floats(0.1, 20.0))
def test_every_token_has_top_k_experts_and_weights_that_sum_to_the_scaling(
    case: Any, kind: Any, weights: Any, scaling: float
) -> None:
    logits, top_k, rng = case
    router = Router(kind=kind, weights=weights, scaling=scaling)
    choices = choose(router, logits, top_k, noise_logits=np.zeros_like(logits), rng=rng)
    totals = choices.weights.sum(1)

    assert choices.experts.shape == choices.weights.shape == (len(logits), top_k)
    assert all(len(set(row)) == top_k for row in choices.experts.tolist())
    assert choices.counts.sum() == len(logits) * top_k
    assert (choices.weights >= 0.0).all()
    if weights != "before_top_k" or kind == "noisy_top_k":
        assert np.allclose(totals, scaling)
    elif kind == "softmax":
        assert (totals <= scaling * (1 + 1e-9)).all()
    assert (np.diff(choices.weights, axis=1) <= 1e-9 * scaling).all()  # without a bias, weights fall too
    if kind != "sigmoid":
        assert np.allclose(choices.scores.sum(1), 1.0)


@settings(deadline=None, max_examples=150)
@given(logits_and_top_k(ties=False), KINDS, WEIGHTS, st.booleans(), st.randoms(use_true_random=False))
def test_experts_under_other_numbers_are_chosen_all_the_same(
    case: Any, kind: Any, weights: Any, biased: bool, shuffle: Any
) -> None:
    """Column j of the shuffled logits is expert order[j]."""
    logits, top_k, rng = case
    order = list(range(logits.shape[1]))
    shuffle.shuffle(order)
    bias = rng.standard_normal(len(order)) if biased else None
    router = Router(kind=kind, weights=weights)
    choices = choose(router, logits, top_k, bias=bias)
    shuffled = choose(router, logits[:, order], top_k, bias=None if bias is None else bias[order])

    assert (np.array(order)[shuffled.experts] == choices.experts).all()
    assert np.allclose(shuffled.weights, choices.weights)
    assert np.allclose(shuffled.scores, choices.scores[:, order])
    assert np.isclose(balance.load_balance_loss(shuffled), balance.load_balance_loss(choices))


@st.composite
def limited(draw: st.DrawFn) -> tuple[Router, Floats, int, Floats | None]:
    """A router with 2 to 6 groups of 1 to 6 experts, of which a token may use some, and top_k that they hold."""
    groups, size = draw(st.integers(2, 6)), draw(st.integers(1, 6))
    limit = draw(st.integers(1, groups))
    router = Router(
        kind=draw(KINDS), groups=groups, group_limit=limit, group_score=draw(st.sampled_from(["max", "top2_sum"]))
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((30, groups * size)).round(draw(st.sampled_from([0, 9])))
    bias = rng.standard_normal(groups * size) if draw(st.booleans()) else None
    return router, logits, draw(st.integers(1, limit * size)), bias


@settings(deadline=None, max_examples=200)
@given(limited())
def test_tokens_keep_to_their_groups_and_take_the_best_experts_there(case: Any) -> None:
    router, logits, top_k, bias = case
    choices = choose(router, logits, top_k, bias=bias)
    keys = choices.scores + (0.0 if bias is None else bias)
    size = logits.shape[1] // router.groups

    for row, values in zip(choices.experts.tolist(), keys.tolist(), strict=True):
        used = {expert // size for expert in row}
        assert len(set(row)) == top_k
        assert len(used) <= router.group_limit
        left = [value for expert, value in enumerate(values) if expert // size in used and expert not in row]
        assert max(left, default=-np.inf) <= min(values[expert] for expert in row)


@settings(deadline=None, max_examples=100)
@given(logits_and_top_k())
def test_experts_that_choose_take_equally_many_tokens_and_each_only_once(case: Any) -> None:
    logits, top_k, _ = case
    choices = choose(Router(kind="expert_choice"), logits, top_k)
    tokens, experts = logits.shape

    assert len(set(choices.counts.tolist())) == 1
    assert abs(choices.counts[0] - tokens * top_k / experts) <= 0.5
    for row, weights in zip(choices.experts.tolist(), choices.weights.tolist(), strict=True):
        held = [expert for expert in row if expert >= 0]
        assert len(set(held)) == len(held)
        assert row == held + [-1] * (len(row) - len(held))
        assert all(weight == 0.0 for weight in weights[len(held) :])


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3), st.integers(3, 5), st.integers(3, 5), WEIGHTS, st.integers(0, 2**32 - 1))
def test_two_levels_choose_equally_many_experts_in_each_of_their_groups(
    each: int, branching: int, size: int, weights: Any, seed: int
) -> None:
    logits = np.random.default_rng(seed).standard_normal((20, branching * size))
    choices = choose(Router(branching=branching, weights=weights), logits, each**2)

    for row in (choices.experts // size).tolist():
        assert sorted(row.count(group) for group in set(row)) == [each] * each
    assert all(len(set(row)) == each**2 for row in choices.experts.tolist())
    assert (choices.weights.sum(1) <= 1.0 + 1e-9).all()
    if weights != "before_top_k":
        assert np.allclose(choices.weights.sum(1), 1.0)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 20), st.data())
def test_a_hash_router_is_balanced_over_its_ids(experts: int, data: st.DataObject) -> None:
    top_k, runs = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 5))
    ids = np.arange(runs * experts)
    choices = choose(Router(kind="hash"), np.zeros((len(ids), experts)), top_k, token_ids=ids)

    assert choices.counts.tolist() == [runs * top_k] * experts
    assert all(len(set(row)) == top_k for row in choices.experts.tolist())


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 6))
def test_of_equal_keys_the_lower_number_wins(rows: list[list[int]], count: int) -> None:
    expected = [sorted(range(6), key=lambda number: (-row[number], number))[:count] for row in rows]

    assert top(np.array(rows, dtype=np.float64), count).tolist() == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12), st.sampled_from(["sign", "proportional"]))
def test_bias_steps_push_towards_the_mean(counts: list[int], rule: Any) -> None:
    """Every expert's bias moves against its excess; the proportional steps cancel."""
    step = balance.bias_step(np.zeros(len(counts)), np.array(counts), 0.01, rule)
    excess = np.array(counts) - np.mean(counts)

    assert (step * excess <= 0.0).all()
    if rule == "proportional":
        assert abs(step.sum()) < 1e-9
    else:
        assert set(np.abs(step).tolist()) <= {0.0, 0.01}
