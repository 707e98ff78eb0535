"""Laws of routing.

Every token keeps its k choices, nothing is lost between capacity and experts, and no expert exceeds what its tokens
allow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.layout import resolve
from simulator.routing import capacity as capacities
from simulator.routing import expert_load
from simulator.routing.chances import chances_of
from simulator.routing.load import draw, inclusion
from simulator.routing.remedies import Batch, shrunk, trajectory
from simulator.routing.tendencies import draw_tendencies
from simulator.routing.traffic import distinct_groups
from simulator.spec import load_scenario
from simulator.spec.model import MixtureOfExperts, Router
from simulator.spec.routing import DirichletLoad, LogitLoad, Remedy

Counts = npt.NDArray[np.int64]


@st.composite
def routed(draw_: st.DrawFn) -> tuple[npt.NDArray[np.float64], int, int, np.random.Generator]:
    """Weights of 1 to 32 experts from even to collapsed, tokens, top_k, and a generator."""
    experts = draw_(st.integers(1, 32))
    top_k = draw_(st.integers(1, experts))
    tokens = draw_(st.integers(1, 600))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32 - 1)))
    logits = draw_(st.sampled_from([0.0, 0.3, 1.0, 4.0])) * rng.standard_normal((2, experts))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True), tokens, top_k, rng


@settings(deadline=None, max_examples=150)
@given(routed())
def test_chances_sum_to_top_k_and_follow_the_order_of_the_weights(case: Any) -> None:
    weights, _, top_k, _ = case
    chances = inclusion(weights, top_k)

    assert np.allclose(chances.sum(-1), top_k, atol=1e-6)
    assert ((chances >= 0.0) & (chances <= 1.0 + 1e-12)).all()
    order = np.argsort(weights, axis=-1)
    assert (np.diff(np.take_along_axis(chances, order, -1), axis=-1) >= -1e-12).all()


@settings(deadline=None, max_examples=150)
@given(routed())
def test_every_draw_gives_each_token_top_k_experts_and_no_expert_twice(case: Any) -> None:
    """Rows sum to T k exactly, and an expert meets a token at most once: no load exceeds T, that is E/k of the mean."""
    weights, tokens, top_k, rng = case
    counts = draw(inclusion(weights, top_k), tokens, top_k, rng)

    assert (counts.sum(-1) == tokens * top_k).all()
    assert ((counts >= 0) & (counts <= tokens)).all()


@settings(deadline=None, max_examples=100)
@given(routed(), st.integers(0, 2**32 - 1))
def test_chances_of_the_extremest_loads_are_chances(case: Any, seed: int) -> None:
    """Dirichlet shares, popularity and hot experts: never above one, always top_k in all, and their logits too."""
    weights, _, top_k, _ = case
    experts = weights.shape[-1]
    rng = np.random.default_rng(seed)
    concentration = float(10.0 ** rng.uniform(-2, 3))
    hot = {"count": 1, "load": 1.0} if experts > 1 else None
    for load in (
        DirichletLoad(kind="dirichlet", concentration=concentration),
        LogitLoad.model_validate(
            {"kind": "logits", "population": rng.uniform(0, 9), "domain": 2.0, "hot_experts": hot}
        ),
    ):
        chances = draw_tendencies(load, 2, experts, top_k, rng).chances(2, 3.0, rng)
        assert np.allclose(chances.sum(-1), top_k, rtol=2e-3)
        assert ((chances >= 0.0) & (chances <= 1.0 + 1e-9)).all()


LOSSES = st.sampled_from(["importance", "load", "load_balance", "device", "communication", "sequence", "z"])


@settings(deadline=None, max_examples=100)
@given(LOSSES, st.floats(0, 10), st.floats(0, 10), st.sampled_from([0.2, 1.0, 3.0]), st.integers(0, 10**6))
def test_a_stronger_weight_never_leaves_more_spread(kind: Any, a: float, b: float, sigma: float, seed: int) -> None:
    """Of experts; a device loss of devices, since inside of a device it has no say."""
    plain = draw_tendencies(
        LogitLoad(kind="logits", population=sigma, domain=0.5), 2, 16, 2, np.random.default_rng(seed)
    )
    weak, strong = (
        shrunk(plain, [Remedy(kind=kind, weight=weight)], devices=4) for weight in sorted((float(a), float(b)))
    )
    spreads = []
    for each in (plain, weak, strong):
        mean = kind in ("device", "communication")
        spreads.append((each.logits.reshape(2, 4, 4).mean(-1) if mean else chances_of(each.logits, 2)).std(-1))

    assert (spreads[0] >= spreads[1] - 1e-9).all()
    assert (spreads[1] >= spreads[2] - 1e-9).all()
    assert plain.domain >= weak.domain >= strong.domain


@settings(deadline=None, max_examples=30)
@given(st.floats(0.0, 2.0), st.sampled_from(["softmax", "sigmoid"]), st.integers(0, 10**6))
def test_a_bias_never_leaves_more_spread_than_it_found(sigma: float, kind: Any, seed: int) -> None:
    """Once settled, but for the swing of its own steps."""
    plain = draw_tendencies(LogitLoad(kind="logits", population=sigma), 2, 16, 2, np.random.default_rng(seed))
    moe = MixtureOfExperts(experts=16, top_k=2, expert_ffn_size=64, router=Router(kind=kind))
    (settled,) = trajectory(
        plain, [None], remedies=[Remedy(kind="bias")], moe=moe, batch=Batch(65536, 8), rng=np.random.default_rng(seed)
    )
    spreads = [
        each.std(-1).max() * 8
        for each in (settled.chances(1, 1, np.random.default_rng(0))[0], chances_of(plain.logits, 2))
    ]

    assert spreads[0] <= max(spreads[1], 0.05)


COUNTS = st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4), min_size=1, max_size=3).map(np.array)
OVERFLOW = st.sampled_from(["drop", "reroute", "none"])


HOLDERS = st.sampled_from([1, 2, 4])
"""Devices of four, two or one expert."""


@settings(deadline=None, max_examples=200)
@given(COUNTS, st.integers(1, 50), OVERFLOW, st.booleans(), st.floats(0, 1), HOLDERS)
def test_assigned_is_processed_plus_dropped(
    counts: Counts, limit: int, overflow: Any, pad: bool, exempt: float, holders: int
) -> None:
    outcome = capacities.apply(counts, limit, overflow=overflow, pad=pad, exempt=exempt, holders=holders)
    processed, computed = (
        each.reshape(len(counts), holders, -1).sum(-1) for each in (outcome.processed, outcome.computed)
    )

    assert (outcome.processed.sum(-1) + outcome.dropped.sum(-1) == counts.sum(-1)).all()
    assert (outcome.processed >= 0).all()
    assert ((outcome.dropped >= 0) & (outcome.dropped <= counts)).all()
    assert (outcome.computed >= outcome.processed).all()
    if overflow != "none" and not exempt:
        assert (processed <= limit).all()
    if overflow == "reroute":
        full = (processed >= limit).all(-1)
        assert (full | (outcome.dropped.sum(-1) == 0)).all()  # nothing is dropped while there is room
    if pad:
        assert (computed >= limit).all()
    else:
        assert (outcome.computed == outcome.processed).all()


@settings(deadline=None, max_examples=200)
@given(COUNTS, COUNTS, st.integers(1, 90), OVERFLOW, st.booleans(), st.floats(0, 1), HOLDERS)
def test_a_part_of_the_tokens_that_share_a_capacity_loses_nothing_else(
    part: Counts, others: Counts, limit: int, overflow: Any, pad: bool, exempt: float, holders: int
) -> None:
    """Conserved for a part as for the whole; if the part is the whole, its fate is that of the whole."""
    whole = part + others[:1]
    outcome = capacities.apply(whole, limit, overflow=overflow, pad=pad, exempt=exempt, holders=holders)
    found, same = capacities.in_part(part, whole, outcome), capacities.in_part(whole, whole, outcome)

    assert (found.processed.sum(-1) + found.dropped.sum(-1) == part.sum(-1)).all()
    assert ((found.dropped >= 0) & (found.dropped <= part)).all()
    assert (found.processed >= 0).all()
    assert (found.computed >= found.processed).all()
    assert (same.processed == outcome.processed).all()
    assert (same.dropped == outcome.dropped).all()
    assert (same.computed == outcome.computed).all()
    if overflow == "none":
        assert (found.processed == part).all()


@settings(deadline=None, max_examples=100)
@given(COUNTS, st.integers(1, 49), OVERFLOW, st.floats(0, 1))
def test_one_more_slot_never_drops_more(counts: Counts, limit: int, overflow: Any, exempt: float) -> None:
    few, many = (capacities.apply(counts, limit + more, overflow=overflow, exempt=exempt) for more in (0, 1))

    assert (many.dropped.sum(-1) <= few.dropped.sum(-1)).all()


@settings(deadline=None, max_examples=100)
@given(st.floats(0.01, 8), st.floats(0.01, 8), st.integers(1, 10_000), st.integers(1, 8), st.integers(8, 256))
def test_slots_grow_with_the_factor_and_hold_the_mean_at_one(
    a: float, b: float, tokens: int, top_k: int, experts: int
) -> None:
    low, high = (capacities.slots(factor, tokens, top_k, experts) for factor in sorted((a, b)))

    assert 1 <= low <= high
    assert capacities.slots(1.0, tokens, top_k, experts) * experts >= tokens * top_k


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 5), st.integers(0, 3), st.integers(1, 8))
def test_a_token_reaches_no_more_groups_than_it_has_choices_and_more_when_they_are_smaller(
    d: int, more: int, top_k: int
) -> None:
    experts, groups = 256, 2**d
    few, many = distinct_groups(experts, groups, top_k), distinct_groups(experts, groups * 2**more, top_k)

    assert 1.0 - 1e-9 <= few <= min(groups, top_k) + 1e-9
    assert few <= many + 1e-9


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["rank", "group", "global", 700]),
    st.sampled_from([0.7, 1.0, 1.3, 4.0]),
    OVERFLOW,
    st.booleans(),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from(["expert", "device"]),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 3),
)
def test_a_scenarios_load_is_conserved(
    scope: str | int, factor: float, overflow: str, pad: bool, exempt: float, over: str, domain: float, seed: int
) -> None:
    """For every scope of a capacity; 700 tokens are one expert group and a part of the other."""
    scenario = load_scenario(
        {
            "name": "conserved",
            "model": {
                "name": "small",
                "layers": 2,
                "hidden_size": 64,
                "vocabulary_size": 100,
                "context": 128,
                "mixer": {"kind": "mha", "heads": 4, "head_dim": 16},
                "moe": {"experts": 8, "top_k": 2, "expert_ffn_size": 64, "router": {"groups": 4}},
            },
            "cluster": {"profile": "h100-sxm", "accelerators": 8},
            "parallelism": {"expert": 4},
            "training": {"tokens": "1B", "sequence_length": 128, "global_batch_sequences": 16},
            "routing": {
                "load": {"kind": "logits", "population": 0.7, "domain": domain},
                "capacity_factor": factor,
                "capacity_scope": scope if isinstance(scope, str) else "group",
                "capacity_group_tokens": "auto" if isinstance(scope, str) else scope,
                "capacity_over": over,
                "overflow": overflow,
                "pad_to_capacity": pad,
                "exempt_sequence_fraction": exempt,
                "seed": seed,
            },
        }
    )
    load = expert_load(scenario, resolve(scenario))

    assert load is not None
    assert (load.assigned.sum(-1) == load.tokens * load.top_k).all()
    assert (load.computed >= load.processed).all()
    assert 0.0 <= load.dropped_fraction < 1.0
    assert 0.0 <= load.padding_fraction < 1.0
    assert abs(load.drop_profile.mean() - load.dropped_fraction) < 1e-9
    assert 0.0 <= load.lost_fraction <= load.dropped_fraction + 1e-9
    if overflow == "none":
        assert (load.processed == load.assigned).all()
    if overflow == "drop":
        assert (load.processed <= load.assigned).all()
