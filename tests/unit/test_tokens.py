"""Tokens one by one: neighbours that share experts, token ids, documents, and how a router's map settles.

Published: repetition of Mixtral's choices (2401.04088, Table 5) and saturation of OLMoE's (2409.02060, Figure 20).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from simulator.layout import resolve
from simulator.routing import expert_load
from simulator.routing.load import IntArray, draw
from simulator.routing.tendencies import HEAD, VOCABULARY, Tendencies, draw_tendencies, frequencies
from simulator.routing.tokens import (
    block,
    dispersion,
    gumbel,
    map_correlation,
    overlap,
    repetition,
    token_ids,
)
from simulator.spec import load_scenario
from simulator.spec.model import Router
from simulator.spec.routing import LogitLoad


def generator(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def even(experts: int = 8, top_k: int = 2, **neighbours: Any) -> Tendencies:
    return Tendencies(np.zeros((1, experts)), top_k, **neighbours)


def routed(plain: Tendencies, tokens: int, seed: int = 1, **options: Any) -> IntArray:
    return block(plain, 0, tokens, generator(seed), **options).picks(Router(), plain.top_k)


# Neighbours


@pytest.mark.parametrize(
    ("correlation", "sticky", "first", "shared"),
    [(0.0, 0.0, 12.5, 46.4), (0.02, 0.01, 14.1, 48.0), (0.23, 0.08, 26.4, 63.7), (-0.02, 0.12, 22.7, 50.9)],
    ids=["independent", "layer 0", "layer 15", "layer 31"],
)
def test_neighbouring_tokens_repeat_experts_as_in_mixtral(
    correlation: float, sticky: float, first: float, shared: float
) -> None:
    """2401.04088, Table 5, mean of eight domains: six numbers and the two of chance, within 1.5 points."""
    picks = routed(even(context_correlation=correlation, sticky=sticky), 120_000)

    assert [100 * share for share in repetition(picks)] == pytest.approx([first, shared], abs=1.5)


def test_repetition_of_three_tokens() -> None:
    assert repetition(np.array([[0, 1], [0, 2], [1, 0]])) == (0.5, 1.0)


def test_correlated_noise_stays_gumbel_and_forgets() -> None:
    """Whatever the correlation, each value has the same distribution; in Gaussian units the lag-n one is rho^n."""
    noise = gumbel(40_000, 2, 0.6, 40_000, generator())
    normal = stats.norm.ppf(stats.gumbel_r.cdf(noise[:, 0].astype(np.float64)))

    assert stats.kstest(noise[::20, 0], stats.gumbel_r.cdf).pvalue > 0.01
    assert [np.corrcoef(normal[lag:], normal[:-lag])[0, 1] for lag in (1, 2, 4)] == pytest.approx(
        [0.6, 0.36, 0.13], abs=0.03
    )
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.03


def test_a_sticky_token_repeats_the_first_choice_of_a_chain() -> None:
    """Probability 0.9: runs of 1 / (0.1 x 7 / 8) = 11.4 tokens with one first choice, the second ones independent."""
    picks = routed(even(sticky=0.9), 60_000)
    changes = np.count_nonzero(np.diff(picks[:, 0]))

    assert 60_000 / changes == pytest.approx(1.0 / (0.1 * 7 / 8), rel=0.05)
    assert (picks[:, 0] != picks[:, 1]).all()
    assert np.bincount(picks[:, 0], minlength=8) / 60_000 == pytest.approx(np.full(8, 0.125), abs=0.02)


@pytest.mark.parametrize("neighbours", [{"sticky": 0.97}, {"context_correlation": 0.97}])
def test_documents_do_not_leak_into_each_other(neighbours: dict[str, Any]) -> None:
    """Inside documents of 20 tokens neighbours nearly always agree; over an edge they agree by chance, 1 in 8."""
    first = routed(even(**neighbours), 40_000, document_tokens=20)[:, 0].reshape(-1, 20)
    inside, across = (first[:, 1:] == first[:, :-1]).mean(), (first[1:, 0] == first[:-1, -1]).mean()

    assert inside > 0.8
    assert across == pytest.approx(0.125, abs=0.03)


def test_every_document_has_preferences_of_its_own() -> None:
    """Loads of documents are correlated between the halves of one document, not between documents."""
    plain = draw_tendencies(LogitLoad(kind="logits", domain=1.0), 1, 64, 6, generator())
    picks = routed(plain, 20 * 2000, document_tokens=2000).reshape(40, 1000 * 6)
    loads = np.array([np.bincount(half, minlength=64) for half in picks])
    correlation = np.corrcoef(loads)

    assert np.diag(correlation, 1)[::2].min() > 0.9
    assert abs(np.diag(correlation, 1)[1::2].mean()) < 0.1
    assert abs(np.diag(correlation, 2).mean()) < 0.1


def test_hot_experts_are_not_moved_by_documents() -> None:
    """Their logit stays while those of others move: 2.1 of 3 times the mean are left, in every document alike.

    Counts keep the stated load; blocks only say which experts are chosen together.
    """
    load = LogitLoad(kind="logits", domain=1.0, hot_experts={"count": 1, "load": 3.0})
    plain = draw_tendencies(load, 1, 64, 6, generator())
    assert plain.pinned is not None
    hot = int(plain.pinned[0].argmax())
    shares = (routed(plain, 100 * 400, document_tokens=400).reshape(100, -1) == hot).mean(-1) * 64

    assert shares.std() / shares.mean() < 0.25
    assert shares.mean() == pytest.approx(3.0, rel=0.35)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 6)])
@pytest.mark.parametrize(
    "neighbours",
    [
        {"context_correlation": 0.23, "sticky": 0.08},
        {"sticky": 0.4},
        {"context_correlation": 0.6},
        {"context_correlation": -0.4},
    ],
)
def test_counts_of_tokens_that_follow_their_neighbours(experts: int, top_k: int, neighbours: dict[str, Any]) -> None:
    """2048 tokens with some popularity: spread of every expert's count within 8 %, mean drop at 1.1 within 4 %.

    Neighbours that choose alike raise the variance by up to 2.7 here; those that avoid each other lower it.
    """
    tokens, limit = 2048, int(np.ceil(1.1 * 2048 * top_k / experts))
    plain = Tendencies(0.4 * generator(11).standard_normal((1, experts)), top_k, **neighbours)
    truth = np.array([np.bincount(routed(plain, tokens, seed).ravel(), minlength=experts) for seed in range(100)])
    factor = dispersion(plain, generator(0))
    chances = np.repeat(plain.chances(1, 1, generator())[0], 2000, axis=0)
    drawn = draw(chances, tokens, top_k, generator(), dispersion=factor)
    drops = [np.maximum(counts - limit, 0).sum(-1) / (tokens * top_k) for counts in (drawn, truth)]

    assert drawn.mean(0) == pytest.approx(truth.mean(0), rel=0.05)
    assert drawn.std(0).mean() == pytest.approx(truth.std(0).mean(), rel=0.08)
    assert drops[0].mean() == pytest.approx(drops[1].mean(), rel=0.04)
    assert drops[0].std() == pytest.approx(drops[1].std(), rel=0.3)
    assert (factor > 1.0) == (neighbours.get("context_correlation", 1.0) > 0.0)


def test_independent_tokens_have_no_dispersion() -> None:
    assert dispersion(even(), generator()) == 1.0
    assert dispersion(even(sticky=1e-9), generator()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("sticky", [0.2, 0.5])
def test_the_dispersion_of_sticky_tokens_has_a_closed_form(sticky: float) -> None:
    """One choice, repeated with probability q: correlations q, q^2, ... add up to 1 + 2 q / (1 - q)."""
    plain = Tendencies(np.zeros((1, 8)), 1, sticky=sticky)

    assert dispersion(plain, generator(), 60_000) == pytest.approx((1.0 + sticky) / (1.0 - sticky), rel=0.06)


def test_counts_of_a_scenario_are_dispersed() -> None:
    """Tokens that repeat half of the choices before them: three times the variance of the binomial law."""
    scenario = load_scenario(
        {
            "name": "sticky",
            "model": {
                "name": "small",
                "layers": 8,
                "hidden_size": 64,
                "vocabulary_size": 100,
                "context": 512,
                "mixer": {"kind": "mha", "heads": 4, "head_dim": 16},
                "moe": {"experts": 8, "top_k": 1, "expert_ffn_size": 64},
            },
            "cluster": {"profile": "h100-sxm", "accelerators": 8},
            "parallelism": {"expert": 8},
            "training": {"tokens": "1B", "sequence_length": 512, "global_batch_sequences": 512},
            "routing": {"load": {"kind": "logits", "sticky": 0.5}},
        }
    )
    load = expert_load(scenario, resolve(scenario))
    assert load is not None

    tokens = 8 * 512
    assert load.assigned.shape == (64, 8, 8)
    assert load.assigned.var() / (tokens * 1 / 8 * 7 / 8) == pytest.approx(3.0, rel=0.1)


# Token ids


def test_token_ids_follow_zipf() -> None:
    """The most frequent id is one token of eleven; ids stay in the vocabulary."""
    ids = token_ids(200_000, generator())
    head, rest = frequencies()
    shares = np.bincount(ids, minlength=VOCABULARY) / len(ids)

    assert shares[:HEAD] == pytest.approx(head, abs=0.002)
    assert shares[HEAD:].sum() == pytest.approx(rest, abs=0.005)
    assert head[0] == pytest.approx(0.0911, abs=0.0005)
    assert (ids.min(), ids.max() < VOCABULARY) == (0, True)


def test_a_token_id_prefers_the_same_experts_wherever_it_stands() -> None:
    """With a strong identity the most frequent id's two halves of occurrences choose alike, another id otherwise."""
    plain = draw_tendencies(LogitLoad(kind="logits", token=2.0), 1, 64, 6, generator())
    tokens = block(plain, 0, 60_000, generator(2))
    assert tokens.ids is not None
    picks = tokens.picks(Router(), 6)
    loads = [
        np.bincount(picks[(tokens.ids == number) & (np.arange(60_000) % 2 == half)].ravel(), minlength=64)
        for number in (0, 1)
        for half in (0, 1)
    ]
    correlation = np.asarray(np.corrcoef(loads))

    assert correlation[0, 1] > 0.98
    assert correlation[2, 3] > 0.98
    assert abs(correlation[0, 2]) < 0.4
    assert block(even(), 0, 10, generator()).ids is None


# Choices


def test_choices_follow_the_models_router() -> None:
    """Group limits keep a token in its groups, two levels in the branches, a bias moves the choices."""
    plain = draw_tendencies(LogitLoad(kind="logits", population=0.5), 1, 64, 4, generator())
    tokens = block(plain, 0, 2000, generator(3))
    free = tokens.picks(Router(), 4)
    limited = tokens.picks(Router(groups=8, group_limit=2, group_score="max"), 4)
    two_levels = tokens.picks(Router(branching=8), 4)
    bias = np.where(np.arange(64) < 8, 1.0, 0.0)
    pushed = tokens.picks(Router(kind="sigmoid", selection_bias=True), 4, bias)

    assert max(len(set(row // 8)) for row in free) == 4
    assert max(len(set(row // 8)) for row in limited) == 2
    assert max(len(set(row // 8)) for row in two_levels) == 2
    assert (pushed < 8).mean() > 0.9 > 0.5 > (free < 8).mean()
    for picks in (free, limited, two_levels, pushed):
        assert picks.shape == (2000, 4)
        assert all(len(set(row)) == 4 for row in picks)


# The map of a router in training


@pytest.mark.parametrize(("progress", "shared"), [(0.01, 0.6), (0.4, 0.8), (1.0, 1.0)])
def test_early_choices_agree_with_the_final_ones_as_in_olmoe(progress: float, shared: float) -> None:
    """2409.02060, Figure 20, top-8 of 64: about 60 % at 1 % of training, about 80 % at 40 %; within 3 points."""
    assert overlap(map_correlation(progress), 64, 8, generator()) == pytest.approx(shared, abs=0.03)


def test_the_correlation_with_the_final_map() -> None:
    assert [map_correlation(progress) for progress in (0.01, 0.4, 1.0)] == pytest.approx([0.81, 0.96, 1.0], abs=0.005)
    assert 0.0 <= map_correlation(0.0) < 0.2
    assert overlap(0.0, 64, 8, generator()) == pytest.approx(8 / 64, abs=0.005)
