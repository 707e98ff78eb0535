"""Remedies against published loads: losses that shrink popularity, the bias in closed loop, growth and drift.

Published: MoE of 1701.06538 (Table 6), Switch (2101.03961), loss-free balancing (2408.15664), DeepSeek-V2 and -V3.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from simulator.routing import evolution
from simulator.routing.balance import bias_step, cv, device_loss, load_balance_loss
from simulator.routing.chances import chances_of
from simulator.routing.closed_forms import lognormal_drop, max_over_mean, sampling_variance
from simulator.routing.evolution import Batch, Treated, grown
from simulator.routing.load import FloatArray, balancing_bias, biased_inclusion, draw
from simulator.routing.remedies import EXPONENT, STRENGTH, shrunk, trajectory
from simulator.routing.routers import Choices, softmax
from simulator.routing.tendencies import Tendencies, draw_tendencies
from simulator.routing.tokens import block
from simulator.spec.model import MixtureOfExperts, Router
from simulator.spec.routing import BalancedLoad, Growth, LogitLoad, Remedy

BIAS = [Remedy(kind="bias")]
V2_LITE = (64, 6)


def popular(sigma: float, layers: int, experts: int, top_k: int, **more: Any) -> Tendencies:
    load = LogitLoad(kind="logits", population=sigma, **more)
    return draw_tendencies(load, layers, experts, top_k, np.random.default_rng(2))


def loss(kind: Any, weight: float | None = None) -> Remedy:
    return Remedy(kind=kind, weight=weight)


def relative(plain: Tendencies) -> FloatArray:
    """Loads over the mean [layers, experts]."""
    return chances_of(plain.logits, plain.top_k) * plain.experts / plain.top_k


def spread(plain: Tendencies) -> float:
    """CV of the loads, averaged over layers."""
    return float(relative(plain).std(-1).mean())


def sparse(experts: int = 64, top_k: int = 6, **router: Any) -> MixtureOfExperts:
    return MixtureOfExperts(experts=experts, top_k=top_k, expert_ffn_size=64, router=Router(**router))


SIGMOID = sparse(kind="sigmoid", selection_bias=True)


def follow(
    plain: Tendencies,
    steps: list[int | None],
    remedies: list[Remedy],
    *,
    moe: MixtureOfExperts = SIGMOID,
    tokens: int = 8192,
    documents: float = 4.0,
    seed: int = 0,
    **more: Any,
) -> list[Treated]:
    rng = np.random.default_rng(seed)
    batch = Batch(tokens, documents)
    return list(trajectory(plain, steps, remedies=remedies, moe=moe, batch=batch, rng=rng, **more))


def residual(treated: Treated) -> float:
    """CV of the loads that the remedies leave over, without the luck of a batch."""
    chances = treated.chances(1, 1e9, np.random.default_rng(0))[0]
    return float((chances.std(-1) / chances.mean(-1)).mean())


def violations(treated: Treated) -> FloatArray:
    """MaxVio of each layer, without the luck of a batch."""
    chances = treated.chances(1, 1e9, np.random.default_rng(0))[0]
    return np.asarray(chances.max(-1) * treated.tendencies.experts / treated.tendencies.top_k - 1.0)


# Losses


@pytest.mark.parametrize(
    ("importance", "load", "cv", "largest"),
    [
        (0.2, 0.0, 0.17, 1.47),
        (0.0, 0.2, 0.04, 1.15),
        (0.1, 0.1, 0.05, 1.14),
        (0.01, 0.01, 0.11, 1.37),
        (1.0, 1.0, 0.02, 1.07),
    ],
)
def test_importance_and_load_losses_leave_the_published_loads(
    importance: float, load: float, cv: float, largest: float
) -> None:
    """1701.06538, Table 6, from the sigma whose CV is 3.01: CV within 10 %, largest over mean within 12 %."""
    treated = shrunk(popular(1.93, 40, 256, 4), [loss("importance", importance), loss("load", load)], 1)

    assert spread(treated) == pytest.approx(cv, rel=0.1)
    assert relative(treated).max(-1).mean() == pytest.approx(largest, rel=0.13)


def test_the_load_balance_loss_leaves_the_published_violation() -> None:
    """2408.15664, Table 2: MaxVio 0.72 (1B) and 0.52 (3B) at weight 1e-3; one strength lies between them."""
    treated = shrunk(popular(1.93, 40, *V2_LITE), [loss("load_balance", 1e-3)], 1)

    assert 0.52 < relative(treated).max(-1).mean() - 1.0 < 0.72
    assert 0.52 < max_over_mean(spread(treated), 64) - 1.0 < 0.72
    assert 0.19 < spread(treated) < 0.25


@pytest.mark.parametrize("experts", [16, 64, 128])
def test_switch_drops_less_than_one_percent(experts: int) -> None:
    """2101.03961, section 2.2: weight 0.01, capacity factor 1.25; here 8192 tokens share a capacity."""
    treated = shrunk(popular(1.93, 10, experts, 1), [loss("load_balance")], 1)
    counts = draw(np.repeat(relative(treated) / experts, 20, axis=0), 8192, 1, np.random.default_rng(1))
    limit = math.ceil(1.25 * 8192 / experts)

    assert np.maximum(counts - limit, 0).sum() / counts.sum() < 0.01
    assert lognormal_drop(spread(treated), 1.25, sampling=sampling_variance(8192, experts, 1)) < 0.01
    assert spread(treated) == pytest.approx(0.1, rel=0.2)


def test_the_z_loss_limits_logits_and_leaves_the_load() -> None:
    plain = popular(0.8, 3, *V2_LITE, domain=0.5)
    treated = shrunk(plain, [loss("z", 1.0)], 8)

    assert treated.logits.tolist() == plain.logits.tolist()
    assert treated.domain == plain.domain


@pytest.mark.parametrize("kind", ["device", "communication"])
def test_device_losses_act_on_the_means_of_devices_only(kind: str) -> None:
    """8 devices: their mean popularity shrinks, an expert's distance from its device's mean stays."""
    plain = popular(1.0, 5, *V2_LITE)
    treated = shrunk(plain, [loss(kind, 0.05)], 8)
    before, after = (each.logits.reshape(5, 8, 8) for each in (plain, treated))

    assert after - after.mean(-1, keepdims=True) == pytest.approx(before - before.mean(-1, keepdims=True))
    assert after.mean(-1) == pytest.approx(before.mean(-1) / (1.0 + STRENGTH["load_balance"] * 0.05**EXPONENT))
    assert spread(treated) == pytest.approx(spread(plain), rel=0.15)
    by_device = [relative(each).reshape(5, 8, 8).mean(-1) for each in (plain, treated)]
    assert by_device[1].std() < by_device[0].std()


def test_a_device_loss_is_as_strong_as_the_load_balance_loss_where_devices_alone_are_uneven() -> None:
    """The two losses are then one number (their papers' equations), so that they leave the same popularity."""
    by_device = np.repeat(np.array([[0.9, -0.4, 0.1, -0.6]]), 4, axis=1)
    picks = np.repeat(np.array([0] * 6 + [1] * 3 + [2] * 2 + [3]), 4) * 4 + np.tile(np.arange(4), 12)
    scores = np.repeat(softmax(by_device), len(picks), axis=0)
    choices = Choices(picks[:, None], np.ones((len(picks), 1)), scores)
    plain = Tendencies(by_device, 1)

    assert device_loss(choices, 4) == pytest.approx(load_balance_loss(choices))
    assert device_loss(choices, 4) > 1.2
    treated = [shrunk(plain, [loss(kind, 0.01)], 4).logits for kind in ("device", "load_balance")]
    assert treated[0] == pytest.approx(treated[1])
    assert np.abs(treated[0]).max() < 0.1


def test_the_sequence_loss_holds_documents_too() -> None:
    """DeepSeek-V3's weight of 1e-4 halves sigma_dom; other losses see the batch and leave documents alone."""
    plain = popular(0.5, 2, *V2_LITE, domain=1.0)
    domains = [shrunk(plain, [loss(kind)], 8).domain for kind in ("sequence", "load_balance", "device", "importance")]

    assert domains == [pytest.approx(0.5, abs=0.05), 1.0, 1.0, 1.0]
    assert spread(shrunk(plain, [loss("sequence")], 8)) < 0.5 * spread(plain)


def test_losses_add_up_and_a_weight_of_zero_is_none() -> None:
    plain = popular(1.0, 2, *V2_LITE)
    one, two = loss("load_balance", 0.01), loss("load", 0.1)
    sigma = [float(shrunk(plain, remedies, 1).logits.std() / plain.logits.std()) for remedies in ([one], [two])]
    both = float(shrunk(plain, [one, two], 1).logits.std() / plain.logits.std())

    assert 1.0 / both - 1.0 == pytest.approx(sum(1.0 / each - 1.0 for each in sigma))
    assert shrunk(plain, [loss("load_balance", 0.0), Remedy(kind="bias")], 1).logits.tolist() == plain.logits.tolist()


def test_a_loss_shrinks_popularity_and_not_what_token_ids_add() -> None:
    """Counts and tokens one by one tell the same load after the loss: the spread within 10 %."""
    plain = popular(1.0, 1, *V2_LITE, token=0.6)
    treated = shrunk(plain, [loss("load_balance", 1e-5)], 1)
    tokens = 60_000
    picks = block(treated, 0, tokens, np.random.default_rng(5)).picks(Router(), 6)
    found = np.bincount(picks.ravel(), minlength=64) / tokens * 64 / 6

    assert 0.2 < spread(treated) < 0.5 * spread(plain)
    assert found.std() == pytest.approx(spread(treated), rel=0.1)
    assert np.corrcoef(found, relative(treated)[0])[0, 1] > 0.99


# Growth and drift


def test_popularity_grows_along_a_logistic_curve() -> None:
    """By e for every 100 steps at first, half way after 100 ln 19 = 294 steps, and all of it in the end."""
    growth = Growth(start=0.05, steps=100)

    assert [grown(growth, step) for step in (0, 1, 294, 10**9)] == [
        pytest.approx(0.05),
        pytest.approx(0.05 * math.exp(0.01), rel=1e-3),
        pytest.approx(0.5, abs=0.002),
        1.0,
    ]
    assert (grown(None, 3), grown(growth), grown(Growth(start=1.0, steps=5), 0)) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("start", [0.0, -0.1, 1.01, 7.0, math.nan])
def test_growth_starts_from_a_share(start: float) -> None:
    with pytest.raises(ValidationError):
        Growth(start=start, steps=5)


def test_loads_spread_as_popularity_grows() -> None:
    plain = popular(1.5, 3, *V2_LITE)
    treated = follow(plain, [0, 100, 300, 600, None], [], growth=Growth(start=0.05, steps=100))
    spreads = [spread(each.tendencies) for each in treated]

    assert spreads == sorted(spreads)
    assert spreads[0] < 0.1
    assert spreads[-1] == pytest.approx(spread(plain))
    assert treated[0].tendencies.logits == pytest.approx(0.05 * plain.logits)


def test_a_bias_slows_the_growth_that_it_evens_out() -> None:
    """Experts that are not chosen more often do not learn faster: from 5 % on, hardly any way in 300 steps."""
    plain, growth = popular(1.5, 3, *V2_LITE), Growth(start=0.05, steps=100)
    (free,), (held,) = (follow(plain, [300], remedies, growth=growth) for remedies in ([], BIAS))
    shares = [float(each.tendencies.logits.std() / plain.logits.std()) for each in (free, held)]

    assert shares[0] == pytest.approx(0.51, abs=0.01)
    assert 0.05 < shares[1] < 0.5 * shares[0]


def test_popularity_wanders_and_keeps_its_spread() -> None:
    """1 % a step for 600 steps: what is left of the start is (1 - 1e-4)^300 = 0.970 of it."""
    plain = popular(1.0, 30, *V2_LITE)
    (late,) = follow(plain, [600], [], drift=0.01)
    kept = np.corrcoef(late.tendencies.logits.ravel(), plain.logits.ravel())[0, 1]

    assert kept == pytest.approx(0.9704, abs=0.01)
    assert late.tendencies.logits.std() == pytest.approx(plain.logits.std(), rel=0.05)


# The bias in closed loop


def test_the_bias_balances_between_200_and_400_steps() -> None:
    """Gamma 1e-3, 8192 tokens a step, sigma 1, the slowest of 8 layers: from MaxVio 7.6 to the luck of a batch."""
    steps: list[int | None] = [0, 100, 200, 400]
    slowest = [violations(each).max() for each in follow(popular(1.0, 8, *V2_LITE), steps, BIAS)]

    assert slowest[0] > 3.0
    assert slowest[1] > 1.0
    assert slowest[2] > 0.17 > slowest[3]
    assert sorted(slowest, reverse=True) == slowest


def test_a_large_step_fluctuates_and_a_small_one_is_late() -> None:
    """2408.15664, Figure 4: 1e-2 swings around the balance, 1e-4 has not arrived after 600 steps."""
    plain = popular(1.0, 8, *V2_LITE)
    large = [violations(each) for each in follow(plain, [50, 200, 300], [Remedy(kind="bias", gamma=1e-2)])]
    good = violations(follow(plain, [600], BIAS)[0])
    (small,) = follow(plain, [600], [Remedy(kind="bias", gamma=1e-4)])

    assert all(each.mean() > 5.0 * good.mean() for each in large)
    assert good.max() < 0.15
    assert violations(small).min() > 1.0


def test_the_global_load_of_a_settled_bias_is_as_published() -> None:
    """2408.15664, Table 2: MaxVio of the global batch 0.04, of 1152 x 2048 tokens, little popularity of its own."""
    (settled,) = follow(popular(0.3, 20, *V2_LITE), [None], BIAS, tokens=1152 * 2048, documents=1152)
    chances = settled.chances(1, 1e9, np.random.default_rng(0))[0]
    counts = draw(chances, 1152 * 2048, 6, np.random.default_rng(1))

    assert (counts.max(-1) / counts.mean(-1) - 1.0).mean() == pytest.approx(0.04, abs=0.025)


@pytest.mark.parametrize("tokens", [8192, 8192 * 64])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_the_settled_state_is_the_end_of_a_long_loop(tokens: int, sigma: float) -> None:
    """The same bias up to a constant, within some steps of gamma; the same spread of the loads within 20 %."""
    plain = popular(sigma, 8, *V2_LITE)
    (long,), (settled,) = (follow(plain, [step], BIAS, tokens=tokens) for step in (1500, None))
    assert long.bias is not None
    assert settled.bias is not None
    apart = long.bias - settled.bias
    spreads = [np.std(each.chances(1, 1e9, np.random.default_rng(0))[0] * 64 / 6) for each in (long, settled)]

    assert np.abs(apart - np.median(apart, axis=-1, keepdims=True)).max() < 0.0101
    assert spreads[1] == pytest.approx(spreads[0], rel=0.2)


@pytest.mark.parametrize(("documents", "left"), [(1.0, 0.35), (4.0, 0.15), (64.0, 0.1)])
def test_documents_of_a_balanced_router_are_uneven_and_their_mean_is_even(documents: float, left: float) -> None:
    """Loads are balanced over the global batch; one microbatch of few documents is not.

    What documents do to biased scores is not quite what noise of tokens does: single documents leave a CV of 0.3 in
    their mean, of 1.05 that each has.
    """
    plain = popular(1.0, 2, *V2_LITE, domain=1.0)
    (settled,) = follow(plain, [None], BIAS, tokens=8192 * 512, documents=512 * documents)
    chances = settled.chances(1500, documents, np.random.default_rng(3)) * 64 / 6

    assert chances.mean(0).std(-1).max() < left
    assert chances.std(-1).mean() == pytest.approx(1.05 / math.sqrt(documents), rel=0.12)


def test_documents_make_the_bias_wander() -> None:
    """Four documents with preferences of their own in every batch, one by one and folded into noise: within 8 %.

    How far an expert's bias strays from its mean, over 300 steps of 8 layers.
    """
    plain = popular(0.5, 8, *V2_LITE, domain=1.0)
    state = evolution.World(plain, Batch(8192 * 64, 4.0), None, 0.0, 1e-3, np.random.default_rng(0))
    for _ in range(600):
        state._advance()
    rng, explicit, folded = np.random.default_rng(5), [state.bias], [state.bias]
    for _ in range(400):
        texts = plain.logits + rng.standard_normal((4, 8, 64))
        counts = rng.binomial(8192 * 64, biased_inclusion(texts, np.broadcast_to(explicit[-1], texts.shape), 6).mean(0))
        explicit.append(bias_step(explicit[-1], counts, 1e-3))
        state._advance()
        folded.append(state.bias)
    strays = [np.array(each[100:]).std(0).mean() for each in (explicit, folded)]

    assert strays[1] == pytest.approx(strays[0], rel=0.08)


def test_drift_keeps_the_bias_busy() -> None:
    """Popularity that moves by 1, 2 or 5 % a step is followed worse and worse; 0.04 as published implies less."""
    plain = popular(1.0, 4, *V2_LITE)
    drifts = (0.0, 0.01, 0.02, 0.05)
    states = [follow(plain, [None], BIAS, drift=drift, tokens=8192 * 64)[0] for drift in drifts]
    ends = [residual(state) for state in states]

    assert sorted(ends) == ends
    assert violations(states[0]).mean() < 0.1
    assert violations(states[3]).mean() > 0.4


@pytest.mark.parametrize("remedies", [[], BIAS, [loss("load_balance", 1e-4), *BIAS]])
def test_the_order_of_the_steps_asked_for_does_not_matter(remedies: list[Remedy]) -> None:
    plain = popular(1.0, 2, *V2_LITE)
    more: dict[str, Any] = {"growth": Growth(start=0.1, steps=50), "drift": 0.005}
    forward = follow(plain, [0, 30, 90], remedies, **more)
    shuffled = follow(plain, [90, 0, 30, 90], remedies, **more)
    (alone,) = follow(plain, [90], remedies, **more)

    assert [each.step for each in shuffled] == [90, 0, 30, 90]
    for one, other in ((forward[2], shuffled[0]), (forward[0], shuffled[1]), (forward[1], shuffled[2])):
        assert one.tendencies.logits.tolist() == other.tendencies.logits.tolist()
        assert np.array_equal(np.asarray(one.bias, dtype=float), np.asarray(other.bias, dtype=float), equal_nan=True)
    assert alone.tendencies.logits.tolist() == forward[2].tendencies.logits.tolist()


@pytest.mark.parametrize(("drift", "domain"), [(0.0, 0.0), (0.0, 0.5), (0.02, 0.0)])
def test_leaps_lead_where_all_the_steps_lead(drift: float, domain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step and by walks and leaps: popularity grown within 5 %, spread of the loads within 25 %."""
    plain, growth = popular(1.0, 8, *V2_LITE, domain=domain), Growth(start=0.1, steps=40)
    seen = {}
    for walk in (evolution.WALK, 10**6):
        monkeypatch.setattr(evolution, "WALK", walk)
        monkeypatch.setattr(evolution.World, "walk", walk)
        treated = follow(plain, [500, 2500], BIAS, tokens=8192 * 8, documents=16.0, growth=growth, drift=drift)
        seen[walk] = [(each.tendencies.logits.std(), residual(each)) for each in treated]
    leaps, steps = seen.values()

    for (share, left), (true_share, true_left) in zip(leaps, steps, strict=True):
        assert share == pytest.approx(true_share, rel=0.05)
        assert left == pytest.approx(true_left, rel=0.25)


@pytest.mark.parametrize(("drift", "domain"), [(0.0, 0.0), (0.02, 0.0), (0.05, 0.0), (0.0, 0.5)])
def test_in_the_end_a_biased_router_is_the_settled_one(drift: float, domain: float) -> None:
    """All of popularity has grown and the loads are as uneven as they stay, within 25 %."""
    plain, growth = popular(1.0, 8, *V2_LITE, domain=domain), Growth(start=0.2, steps=20)
    late, settled = follow(plain, [10**5, None], BIAS, tokens=8192 * 8, documents=16.0, growth=growth, drift=drift)

    assert late.tendencies.logits.std() == pytest.approx(plain.logits.std(), rel=1e-3 if not drift else 0.1)
    assert residual(late) == pytest.approx(residual(settled), rel=0.25)


def test_a_bias_of_small_steps_is_on_its_way_after_many() -> None:
    """Steps of 1e-7 have come 0.01 after 100 000 and no farther; those of 1e-5 have come 0.5 after 50 000."""
    plain = popular(1.0, 1, *V2_LITE)
    (slow,) = follow(plain, [100_000], [Remedy(kind="bias", gamma=1e-7)])
    middle, far, settled = follow(plain, [10_000, 200_000, None], [Remedy(kind="bias", gamma=1e-5)], tokens=8192 * 64)
    assert slow.bias is not None
    assert middle.bias is not None

    assert np.abs(slow.bias).max() == pytest.approx(0.01, rel=1e-6)
    assert violations(slow).max() > 2.0
    assert np.abs(middle.bias).max() == pytest.approx(0.1, rel=1e-6)
    assert violations(middle).max() > 1.0
    assert violations(far).max() < 0.15
    assert violations(settled).max() < 0.05


def world(plain: Tendencies, growth: Growth | None = None, gamma: float = 1e-3) -> evolution.World:
    return evolution.World(plain, Batch(8192 * 64, 4.0), growth, 0.0, gamma, np.random.default_rng(0))


@pytest.mark.parametrize("part", [0.0, 0.5, 0.9])
def test_popularity_is_driven_by_the_unevenness_that_the_bias_leaves(part: float) -> None:
    """Time passes by CV(load) over CV(load without the bias), at no, half and most of the balancing bias."""
    plain = popular(1.0, 4, *V2_LITE)
    state = world(plain, Growth(start=0.5, steps=100))
    half = 0.5 * plain.logits
    state.bias = part * balancing_bias(half, 6)
    left, free = (cv(chances_of(half, 6, bias)).mean() for bias in (state.bias, None))
    state._advance()

    assert state.time == pytest.approx(min(1.0, left / free), rel=0.02)
    assert state.share == pytest.approx(grown(Growth(start=0.5, steps=100), state.time))


def test_a_leap_of_popularity_takes_the_bias_along() -> None:
    """1000 steps at a drive of 0.05: popularity grows by e^0.5, and no expert's bias is farther from its balance."""
    state = world(popular(1.0, 4, *V2_LITE), Growth(start=0.1, steps=100))
    state.bias = balancing_bias(0.1 * state.full, 6) + 0.004 * np.random.default_rng(1).standard_normal((4, 64))
    before = state.bias - balancing_bias(0.1 * state.full, 6)
    state.arrived, state.drive = True, 0.05
    state._leap(1000)

    assert state.step == 1000
    assert state.time == pytest.approx(50.0)
    assert state.share == pytest.approx(1.0 / (1.0 + 9.0 * math.exp(-0.5)))
    assert state.bias - balancing_bias(state.share * state.full, 6) == pytest.approx(before, abs=0.00101)


def test_nothing_grows_where_popularity_is_none() -> None:
    """Loads that documents alone make uneven: no popularity, no drive, and no division by the CV of zero."""
    plain = popular(0.0, 2, *V2_LITE, domain=0.5)
    late, settled = follow(plain, [300, None], BIAS, documents=1e12, growth=Growth(start=0.5, steps=10))

    assert not late.tendencies.logits.any()
    assert not settled.tendencies.logits.any()


def test_there_is_no_bias_where_there_is_nothing_to_balance() -> None:
    even = draw_tendencies(BalancedLoad(), 2, 64, 6, np.random.default_rng(0))
    plain = popular(1.0, 2, *V2_LITE)

    assert follow(even, [None], BIAS)[0].bias is None
    assert follow(plain, [None], [Remedy(kind="bias", gamma=0.0)])[0].bias is None
    assert follow(plain, [None], [loss("load_balance")])[0].bias is None


def test_steps_that_are_coarse_against_softmax_scores_make_the_bias_swing() -> None:
    """Softmax scores of 128 experts are 1/128 on average, a step is 1/1000: against a loop of tokens one by one.

    The mean over the last 100 of 200 steps of a router that would collapse (sigma 2): CV of the loads within 20 %.
    """
    experts, top_k, tokens, gamma = 128, 8, 4096, 1e-3
    plain = Tendencies(2.0 * np.random.default_rng(0).standard_normal((1, experts)), top_k, softmax=True)
    rng = np.random.default_rng(1)
    (settled,) = follow(plain, [None], BIAS, moe=sparse(experts, top_k))
    assert settled.bias is not None
    one_by_one, by_chances = settled.bias[0].copy(), settled.bias[0].copy()
    found: list[tuple[float, float]] = []
    for _ in range(200):
        picks = block(plain, 0, tokens, rng).picks(Router(), top_k, one_by_one)
        counts = np.bincount(picks.ravel(), minlength=experts)
        drawn = rng.binomial(tokens, chances_of(plain.logits[0], top_k, by_chances, softmax=True))
        one_by_one, by_chances = bias_step(one_by_one, counts, gamma), bias_step(by_chances, drawn, gamma)
        found.append((float(cv(counts)), float(cv(drawn))))
    truth, ours = np.mean(found[100:], axis=0)

    assert 0.5 < truth < 0.9
    assert ours == pytest.approx(truth, rel=0.2)
