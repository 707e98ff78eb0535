"""Tendencies: what a router likes by itself, and how documents and token ids fold into one logit per expert.

Two oracles: explicit averages over documents or over single tokens' noise, and tokens routed one by one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from simulator.routing.chances import LANDAU, chances_of, logits_of, others, smoothed
from simulator.routing.load import FloatArray, balancing_bias, biased_inclusion, draw
from simulator.routing.routers import choose
from simulator.routing.tendencies import HEAD, Tendencies, draw_tendencies, frequencies, hashed, mixed_domain
from simulator.routing.tokens import block, token_ids
from simulator.spec.model import Router
from simulator.spec.routing import BalancedLoad, DirichletLoad, LogitLoad

SHAPES = pytest.mark.parametrize(("experts", "top_k"), [(32, 1), (8, 2), (64, 6), (256, 8)])


def generator(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


def tendencies(layers: int = 1, experts: int = 64, top_k: int = 6, seed: int = 1, **load: Any) -> Tendencies:
    return draw_tendencies(LogitLoad(kind="logits", **load), layers, experts, top_k, generator(seed))


def spread(chances: FloatArray | npt.NDArray[np.int64]) -> float:
    """CV of the loads: root of the mean square of x - 1."""
    return float(np.sqrt(np.square(chances / chances.mean(-1, keepdims=True) - 1.0).mean()))


def frequency(
    plain: Tendencies, tokens: int = 60_000, *, router: Router | None = None, bias: FloatArray | None = None
) -> FloatArray:
    """How often tokens of the first layer choose each expert, counted one by one."""
    picks = block(plain, 0, tokens, generator(5)).picks(router or Router(), plain.top_k, bias)
    return np.asarray(np.bincount(picks.ravel(), minlength=plain.experts) / tokens)


def scatter(chances: FloatArray, tokens: int) -> FloatArray:
    """Standard deviation of the frequency that chance leaves, relative to the chance itself."""
    return np.asarray(np.sqrt((1.0 - chances) / (chances * tokens)))


# Chances and logits


@SHAPES
def test_logits_and_chances_are_each_others_inverse(experts: int, top_k: int) -> None:
    chances = chances_of(1.3 * generator().standard_normal((5, experts)), top_k)

    assert chances.sum(-1) == pytest.approx(np.full(5, top_k))
    assert chances_of(logits_of(chances, top_k), top_k) == pytest.approx(chances, rel=1e-6)
    assert chances_of(logits_of(chances, top_k) + 7.0, top_k) == pytest.approx(chances, rel=1e-6)


def test_certain_and_hopeless_experts_keep_their_chances() -> None:
    for chances in (np.array([1.0, 1.0, 0.0, 0.0]), np.array([1.0, 0.5, 0.5, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])):
        top_k = round(chances.sum())
        assert chances_of(logits_of(chances, top_k), top_k) == pytest.approx(chances, abs=2e-4)


def test_an_even_router_has_nothing_to_prefer() -> None:
    even = draw_tendencies(BalancedLoad(), 3, 16, 2, generator())

    assert even.even
    assert even.chances(5, 1, generator()) == pytest.approx(np.full((1, 3, 16), 0.125))
    assert not any(tendencies(1, 64, 6, 1, **{name: 0.5}).even for name in ("population", "domain", "token", "sticky"))


def test_popularity_is_drawn_once_for_each_layer() -> None:
    """Weights softmax(sigma N): the spread of one choice over its mean is sqrt(exp(sigma^2) - 1)."""
    plain = tendencies(40, 256, 1, population=0.5)
    chances = plain.chances(9, 1, generator())

    assert chances.shape == (1, 40, 256)
    assert spread(chances) == pytest.approx(math.sqrt(math.exp(0.25) - 1), rel=0.05)


def test_dirichlet_shares_have_the_variance_of_their_concentration() -> None:
    """CV^2 = (E - 1) / (E a + 1); with several choices as long as no expert comes near its ceiling."""
    for top_k, tolerance in ((1, 0.03), (2, 0.03), (4, 0.05)):
        plain = draw_tendencies(DirichletLoad(kind="dirichlet", concentration=5.0), 400, 32, top_k, generator())
        chances = plain.chances(1, 1, generator())
        assert chances.sum(-1) == pytest.approx(np.full((1, 400), top_k))
        assert spread(chances) == pytest.approx(math.sqrt(31 / (32 * 5 + 1)), rel=tolerance)


# Hot experts


@SHAPES
@pytest.mark.parametrize("others", [{}, {"population": 1.5}, {"population": 0.4, "domain": 0.7}, {"token": 0.6}])
def test_hot_experts_have_the_stated_load_in_every_layer(experts: int, top_k: int, others: dict[str, Any]) -> None:
    """And no document moves it: 2.5 times the mean in each of 6 layers and 4 microbatches."""
    plain = tendencies(6, experts, top_k, hot_experts={"count": 2, "load": 2.5}, **others)
    relative = plain.chances(4, 3.0, generator()) * experts / top_k
    pinned = np.broadcast_to(plain.pinned if plain.pinned is not None else False, relative.shape)

    assert (pinned.sum(-1) == 2).all()
    assert relative[pinned] == pytest.approx(np.full(pinned.sum(), 2.5), rel=1e-6)
    assert relative.sum(-1) == pytest.approx(np.full(relative.shape[:-1], experts))
    assert (np.ptp(relative[~pinned]) > 1e-6) == bool(others)


def test_the_others_keep_their_order_beside_hot_experts() -> None:
    hot, plain = tendencies(population=0.8, hot_experts={"count": 3, "load": 4.0}), tendencies(population=0.8)
    assert hot.pinned is not None
    cold = ~hot.pinned[0]

    assert (np.argsort(hot.logits[0][cold]) == np.argsort(plain.logits[0][cold])).all()
    assert len({tuple(row) for row in tendencies(20, hot_experts={"count": 1, "load": 2.0}).logits}) > 10


# Documents


@pytest.mark.parametrize(
    ("experts", "top_k", "sigma"), [(64, 6, 0.45), (64, 6, 1.85), (8, 2, 0.5), (8, 2, 1.5), (256, 8, 0.8)]
)
@pytest.mark.parametrize("documents", [2, 8, 32])
def test_a_mixture_of_n_documents_has_an_nth_of_their_variance(
    experts: int, top_k: int, sigma: float, documents: int
) -> None:
    """CV^2 / n, within 6 % of the CV of explicit averages over n documents; the busiest expert within 20 %.

    Gaussian logits of that CV have a longer tail than an average of few strongly skewed documents.
    """
    rng = generator()
    each = chances_of(sigma * rng.standard_normal((150, documents, experts)), top_k)
    average = each.mean(1)
    drawn = Tendencies(np.zeros((1, experts)), top_k, domain=sigma).chances(300, documents, rng)[:, 0]

    assert spread(drawn) == pytest.approx(spread(average), rel=0.06)
    assert spread(average) == pytest.approx(spread(each) / math.sqrt(documents), rel=0.06)
    busiest = average.max(-1).mean()
    assert drawn.max(-1).mean() == pytest.approx(busiest, rel=0.2 if sigma > 1 else 0.05)


def test_one_document_is_itself_and_infinitely_many_leave_popularity() -> None:
    assert mixed_domain(1.2, 1.0, 64, 6) == 1.2
    assert mixed_domain(0.0, 5.0, 64, 6) == 0.0
    assert mixed_domain(1.2, 1e9, 64, 6) < 1e-3
    assert mixed_domain(1.2, 4.0, 4, 4) <= 1.2  # all experts chosen: nothing to spread


def test_popularity_averaged_over_documents_is_that_of_tokens_with_their_noise() -> None:
    """Mean load of each expert over many microbatches of 1, 4 or 64 documents: 6 % of an explicit average."""
    plain = tendencies(population=0.8, domain=1.0, seed=8)
    exact = chances_of(plain.logits[0] + generator(7).standard_normal((8000, 64)), 6).mean(0)

    for documents in (1, 4, 64):
        drawn = plain.chances(3000, documents, generator(9))[:, 0].mean(0)
        assert np.abs(drawn / exact - 1.0).max() < 0.06
        assert spread(drawn) == pytest.approx(spread(exact), rel=0.02)


@SHAPES
@pytest.mark.parametrize("variance", [0.25, 1.0, 2.0])
def test_noise_of_single_tokens_smooths_the_chances(experts: int, top_k: int, variance: float) -> None:
    """Against 8000 tokens' noise: every chance within 10 %, their spread within 6 %; the mean logit stays."""
    logits = generator(4).standard_normal(experts)
    noise = math.sqrt(variance) * generator(5).standard_normal((8000, experts))
    exact, found = chances_of(logits + noise, top_k).mean(0), chances_of(smoothed(logits, variance, top_k), top_k)

    assert np.abs(found / exact - 1.0).max() < 0.1
    assert spread(found) == pytest.approx(spread(exact), rel=0.06)
    assert spread(found) < spread(chances_of(logits, top_k))
    assert smoothed(logits, variance, top_k).mean() == pytest.approx(logits.mean())


def test_no_noise_leaves_the_logits_alone() -> None:
    logits = generator().standard_normal((2, 16))

    assert smoothed(logits, 0.0, 2) is logits
    assert smoothed(logits, 1.0, 16) is logits
    assert np.isfinite(smoothed(30.0 * logits, 25.0, 2)).all()


# Token identity


@SHAPES
@pytest.mark.parametrize("load", [{"population": 0.5, "token": 0.6}, {"population": 0.3, "token": 1.2}])
def test_chances_with_token_ids_agree_with_tokens_one_by_one(experts: int, top_k: int, load: dict[str, Any]) -> None:
    """60000 tokens with Zipf ids: within 4 % and four standard errors for every expert, the spread within 4 %."""
    plain = tendencies(2, experts, top_k, **load)
    chances, found = plain.chances(1, 1, generator())[0, 0], frequency(plain)

    assert (np.abs(found / chances - 1.0) < 0.04 + 4.0 * scatter(chances, 60_000)).all()
    assert spread(found) == pytest.approx(math.hypot(spread(chances), float(scatter(chances, 60_000).mean())), rel=0.04)


def test_frequent_ids_carry_their_experts_with_them() -> None:
    """Without any popularity of its own, identity alone makes loads uneven; the head holds 56 % of the text."""
    plain = tendencies(8, token=1.2)
    head, rest = frequencies()

    assert len(head) == HEAD
    assert [head.sum() + rest, rest] == pytest.approx([1.0, 0.44], abs=0.01)
    assert 0.1 < spread(plain.chances(1, 1, generator())) < 0.4


# With a bias


@pytest.mark.parametrize(("experts", "top_k", "tolerance"), [(8, 2, 0.05), (64, 6, 0.06), (256, 8, 0.1)])
def test_chances_with_a_bias_agree_with_tokens_one_by_one(experts: int, top_k: int, tolerance: float) -> None:
    """sigmoid(logit) + bias: the order of the experts, and the whole distribution within 5 to 10 % of the choices.

    One common threshold stands for each token's own: experts whose scores hardly scatter near the threshold are
    off by up to 40 %.
    """
    plain = tendencies(1, experts, top_k, population=1.0)
    bias = 0.2 * generator(2).standard_normal(experts)
    chances = biased_inclusion(plain.logits[0], bias, top_k)
    found = frequency(plain, 40_000, router=Router(kind="sigmoid"), bias=bias)

    assert chances.sum() == pytest.approx(top_k)
    assert np.abs(chances - found).sum() / 2.0 < tolerance * top_k
    assert np.corrcoef(chances, found)[0, 1] > 0.99
    assert chances == pytest.approx(chances_of(plain.logits[0], top_k, bias))


@pytest.mark.parametrize(("experts", "top_k"), [(16, 2), (64, 6), (128, 8)])
@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_a_bias_on_softmax_scores_acts_on_tokens_one_by_one(experts: int, top_k: int, sigma: float) -> None:
    """softmax(logits) + bias, half way to the balance: relative loads within a root mean square of 0.15.

    With one sum for all tokens, the median of E (log E + 1), they would be off by 0.2 to 1.
    """
    plain = tendencies(1, experts, top_k, population=sigma)
    middle = list(others(plain.logits[0]))[4]
    bias = 0.5 * balancing_bias(plain.logits[0] - middle, top_k) + 0.2 / experts * generator(2).standard_normal(experts)
    relative = chances_of(plain.logits[0], top_k, bias, softmax=True) * experts / top_k
    found = frequency(plain, 40_000, router=Router(), bias=bias) * experts / top_k

    assert relative.mean() == pytest.approx(1.0)
    assert np.sqrt(np.square(relative - found).mean()) < 0.15
    assert relative.std() == pytest.approx(found.std(), rel=0.15)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_the_sum_of_the_other_experts_is_as_broad_as_that_of_tokens(sigma: float) -> None:
    """Quantiles 1/16, 3/16, ... of log sum_(j != e) e^(l_j + G_j) of 20 000 tokens, each within 0.15."""
    logits = sigma * generator(4).standard_normal(64)
    noisy = logits + generator().gumbel(size=(20_000, 64))
    quantiles = (np.arange(len(LANDAU)) + 0.5) / len(LANDAU)

    for expert in (int(logits.argmin()), int(logits.argmax())):
        sums = np.log(np.delete(np.exp(noisy), expert, axis=1).sum(1))
        expected = [each[expert] for each in others(logits)]
        assert expected == pytest.approx(np.quantile(sums, quantiles), abs=0.15)


def test_without_a_bias_sigmoid_scores_choose_like_logits() -> None:
    logits = generator().standard_normal((3, 64))

    assert biased_inclusion(logits, np.zeros((3, 64)), 6) == pytest.approx(chances_of(logits, 6), rel=1e-5)
    assert biased_inclusion(logits, np.zeros((3, 64)), 64).tolist() == [[1.0] * 64] * 3


@pytest.mark.parametrize(("experts", "top_k", "left"), [(8, 2, 0.03), (64, 6, 0.08), (256, 8, 0.12)])
def test_the_balancing_bias_gives_equal_chances(experts: int, top_k: int, left: float) -> None:
    """Exactly in the model of one threshold; of tokens routed one by one a spread of 2 to 10 % is left of 0.5 to 1."""
    plain = tendencies(1, experts, top_k, population=1.0)
    bias = balancing_bias(plain.logits[0], top_k)
    found = frequency(plain, 40_000, router=Router(kind="sigmoid"), bias=bias)

    assert bias.mean() == pytest.approx(0.0, abs=1e-12)
    assert biased_inclusion(plain.logits[0], bias, top_k) == pytest.approx(np.full(experts, top_k / experts))
    assert math.sqrt(max(0.0, spread(found) ** 2 - float(scatter(found, 40_000).mean()) ** 2)) < left
    assert spread(frequency(plain)) > 0.4
    assert (np.diff(bias[np.argsort(plain.logits[0])]) <= 1e-12).all()
    assert balancing_bias(plain.logits[0], experts).tolist() == [0.0] * experts


def test_normal_noise_has_its_own_chances() -> None:
    logits = 0.5 * generator().standard_normal(32)
    noisy = logits + generator(1).standard_normal((40_000, 32))
    bias = np.zeros(32)
    found = np.bincount(np.argsort(-noisy, axis=-1)[:, :4].ravel(), minlength=32) / 40_000

    assert biased_inclusion(logits, bias, 4, "normal") == pytest.approx(found, rel=0.06, abs=2e-3)


# Counts against tokens


def drop(counts: npt.NDArray[np.int64], tokens: int, top_k: int, factor: float) -> FloatArray:
    limit = math.ceil(factor * tokens * top_k / counts.shape[-1])
    return np.asarray(np.maximum(counts - limit, 0).sum(-1) / (tokens * top_k))


@pytest.mark.parametrize(
    ("experts", "top_k", "load", "documents"),
    [
        (64, 6, {"population": 0.8}, 1),
        (64, 6, {"population": 0.3, "domain": 0.45}, 1),
        (64, 6, {"population": 0.3, "domain": 0.45}, 4),
        (64, 6, {"population": 0.3, "domain": 1.0}, 4),
        (64, 6, {"population": 1.0, "domain": 1.0}, 8),
        (64, 6, {"population": 0.3, "domain": 0.4, "token": 0.6}, 4),
        (8, 2, {"population": 0.8}, 1),
        (8, 2, {"population": 0.3, "domain": 0.45}, 4),
        (256, 8, {"population": 0.5, "token": 0.8}, 1),
    ],
)
def test_counts_agree_with_tokens_one_by_one(experts: int, top_k: int, load: dict[str, Any], documents: int) -> None:
    """Microbatches of 2048 tokens: spread of the loads within 4 %, mean drop at factors 1 and 1.25 within 9 %.

    Documents make microbatches differ: that scatter of the drop agrees within 30 % (100 microbatches are few).
    """
    tokens, some = 2048, 100
    plain = tendencies(1, experts, top_k, **load)
    rng = generator(3)
    truth = np.array(
        [
            np.bincount(
                block(plain, 0, tokens, rng, document_tokens=tokens // documents).picks(Router(), top_k).ravel(),
                minlength=experts,
            )
            for _ in range(some)
        ]
    )
    chances = np.broadcast_to(plain.chances(1500, documents, generator(4))[:, 0], (1500, experts))
    drawn = draw(chances, tokens, top_k, generator(5))

    assert spread(drawn) == pytest.approx(spread(truth), rel=0.04)
    for factor in (1.0, 1.25):
        expected = drop(truth, tokens, top_k, factor)
        found = drop(drawn, tokens, top_k, factor)
        assert found.mean() == pytest.approx(expected.mean(), rel=0.09, abs=2e-4)
        assert found.std() == pytest.approx(expected.std(), rel=0.3, abs=2e-4)


# Hash routers


@pytest.mark.parametrize(("experts", "top_k"), [(128, 1), (16, 4)])
def test_a_hash_router_is_as_uneven_as_the_frequencies_of_its_token_ids(experts: int, top_k: int) -> None:
    """Chances in one sum over the vocabulary, and tokens of a text hashed one by one; every layer has the same."""
    ids = token_ids(100_000, generator())
    counts = choose(Router(kind="hash"), np.zeros((len(ids), experts)), top_k, token_ids=ids).counts / len(ids)
    chances = hashed(experts, top_k)
    plain = draw_tendencies(BalancedLoad(), 3, experts, top_k, generator(), Router(kind="hash"))

    assert chances.sum() == pytest.approx(top_k)
    assert np.abs(counts - chances).max() < 5.0 * np.sqrt(chances.max() / len(ids))
    assert chances_of(plain.logits, top_k) == pytest.approx(np.broadcast_to(chances, (3, experts)), rel=2e-3)


def test_one_expert_of_a_hash_router_has_the_most_frequent_word() -> None:
    """128 experts: id 0 alone, 9.1 % of a text after Zipf, is 11.7 times an expert's share; CV 1.22 in all."""
    relative = 128 * hashed(128, 1)

    assert relative.max() == pytest.approx(128 * float(frequencies()[0][0]), rel=0.05)
    assert relative.std() == pytest.approx(1.22, abs=0.03)
