"""Remedies against published loads: losses that shrink popularity, the bias in closed loop, growth and drift.

Published: MoE of 1701.06538 (Table 6), Switch (2101.03961), loss-free balancing (2408.15664), DeepSeek-V2 and -V3.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from simulator.routing import remedies as room
from simulator.routing.closed_forms import lognormal_drop, max_over_mean, sampling_variance
from simulator.routing.load import FloatArray, draw
from simulator.routing.remedies import DEVICE_STRENGTH, EXPONENT, Batch, Treated, grown, shrunk, trajectory
from simulator.routing.tendencies import Tendencies, chances_of, draw_tendencies
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
    assert after.mean(-1) == pytest.approx(before.mean(-1) / (1.0 + DEVICE_STRENGTH * 0.05**EXPONENT))
    assert spread(treated) == pytest.approx(spread(plain), rel=0.15)
    by_device = [relative(each).reshape(5, 8, 8).mean(-1) for each in (plain, treated)]
    assert by_device[1].std() < by_device[0].std()


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
    assert (grown(None, 3), grown(growth, None), grown(Growth(start=7.0, steps=5), 0)) == (1.0, 1.0, 1.0)


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
    """The same bias within two steps of gamma, up to a constant, and the same spread of the loads within 20 %."""
    plain = popular(sigma, 8, *V2_LITE)
    (long,), (settled,) = (follow(plain, [step], BIAS, tokens=tokens) for step in (1500, None))
    assert long.bias is not None
    assert settled.bias is not None
    apart = long.bias - settled.bias
    spreads = [np.std(each.chances(1, 1e9, np.random.default_rng(0))[0] * 64 / 6) for each in (long, settled)]

    assert np.abs(apart - np.median(apart, axis=-1, keepdims=True)).max() < 0.008
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


def test_drift_keeps_the_bias_busy() -> None:
    """Popularity that moves by 1, 2 or 5 % a step is followed worse and worse; 0.04 as published implies less."""
    plain = popular(1.0, 4, *V2_LITE)
    ends = [violations(follow(plain, [None], BIAS, drift=drift)[0]).mean() for drift in (0.0, 0.01, 0.02, 0.05)]

    assert sorted(ends) == ends
    assert ends[0] < 0.1
    assert ends[3] > 0.4


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


def test_a_step_far_ahead_is_reached_without_walking_all_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last steps are walked, from a bias that balances; steps of 1e-7 have come 0.01 by then and no farther."""
    monkeypatch.setattr(room, "LONGEST_LOOP", 300)
    plain = popular(1.0, 1, *V2_LITE)
    (far,) = follow(plain, [100_000], BIAS, tokens=8192 * 64)
    (slow,) = follow(plain, [100_000], [Remedy(kind="bias", gamma=1e-7)])
    assert slow.bias is not None

    assert violations(far).max() < 0.15
    assert np.abs(slow.bias).max() <= 0.0101
    assert violations(slow).max() > 2.0


def test_there_is_no_bias_where_there_is_nothing_to_balance() -> None:
    even = draw_tendencies(BalancedLoad(), 2, 64, 6, np.random.default_rng(0))
    plain = popular(1.0, 2, *V2_LITE)

    assert follow(even, [None], BIAS)[0].bias is None
    assert follow(plain, [None], [Remedy(kind="bias", gamma=0.0)])[0].bias is None
    assert follow(plain, [None], [loss("load_balance")])[0].bias is None


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_bias_balances_softmax_scores_too(kind: str) -> None:
    (settled,) = follow(popular(1.0, 4, *V2_LITE), [None], BIAS, moe=sparse(kind=kind), tokens=8192 * 64)

    assert violations(settled).max() < 0.2
