"""What a scenario's capacity makes of the counts of one stack: groups, slots, drops by position.

Tokens that share one capacity are a capacity group: a part of the expert group, the whole of it, or several of them
together. Counts are drawn per capacity group, so that small groups overflow more often, as they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from simulator.layout import Layout
from simulator.routing import capacity as capacities
from simulator.routing import load as loads
from simulator.routing.expert_load import POSITIONS
from simulator.routing.load import FloatArray, IntArray
from simulator.routing.sizes import group_tokens
from simulator.spec.model import MixtureOfExperts
from simulator.spec.scenario import Scenario

_PROFILE_COUNTS = 400_000


@dataclass(frozen=True)
class Limited:
    """Counts of one stack of layers [microbatches, layers, experts] before and after capacity.

    ``profile`` [2, positions]: dropped and all assignments by position; ``evaluation`` [2]: dropped and all assignments
    at the evaluation's capacity factor.
    """

    assigned: IntArray
    outcome: capacities.Outcome
    profile: FloatArray
    evaluation: FloatArray


@dataclass(frozen=True)
class Sampler:
    """Counts from chances: drawn, or in proportion where the load is a record."""

    moe: MixtureOfExperts
    sampled: bool
    dispersion: float
    rng: np.random.Generator

    def counts(self, chances: FloatArray, tokens: int | IntArray) -> IntArray:
        """Counts [..., experts] of ``tokens`` tokens."""
        if not self.sampled:
            return loads.in_proportion(chances, tokens, self.moe.top_k)
        return loads.draw(chances, tokens, self.moe.top_k, self.rng, dispersion=self.dispersion)


def limited(scenario: Scenario, layout: Layout, stack: str, chances: FloatArray, sampler: Sampler) -> Limited:
    """Draw counts from chances [microbatches, layers, parts, experts] and apply the scenario's capacity.

    The capacity groups are divided over the parts, which hold different documents.
    """
    routing, moe = scenario.routing, sampler.moe
    tokens = group_tokens(scenario, stack)
    groups, shared = capacity_groups(scenario, layout, stack)
    parts, whole = chances.shape[2], chances.mean(2)
    drawn = max(1, min(groups, loads.MAX_COUNTS // max(1, whole.size)))
    sizes = np.full(drawn, tokens // groups)
    sizes[: tokens % groups if drawn == groups else 0] += 1  # groups as equal as they can be; no token is lost
    assigned = sampler.counts(chances[:, :, np.arange(drawn) * parts // drawn], sizes[:, None])
    size = round(tokens / groups) if shared <= tokens else shared
    limit, limit_evaluation = (
        None
        if factor is None
        else capacities.slots(factor, size, moe.top_k, moe.experts, counts_top_k=routing.capacity_counts_top_k)
        for factor in (_capacity_factor(scenario), _evaluation_factor(scenario))
    )
    if limit is not None and shared > tokens:
        outcome = _shared_wider(assigned, whole, limit, shared, tokens, scenario, sampler)
    else:
        outcome = capacities.apply(
            assigned,
            limit,
            overflow=routing.overflow,
            pad=routing.pad_to_capacity,
            exempt=routing.exempt_sequence_fraction,
        )
    profile = _profile(assigned, outcome.dropped, scenario)
    if limit_evaluation is not None and shared > tokens:
        lost = _shared_wider(assigned, whole, limit_evaluation, shared, tokens, scenario, sampler).dropped
    else:
        lost = capacities.apply(
            assigned, limit_evaluation, overflow=routing.overflow, exempt=routing.exempt_sequence_fraction
        ).dropped
    evaluation = np.array([lost.sum(), assigned.sum()], dtype=np.float64)
    if drawn < groups:
        return Limited(*_extrapolated(outcome, sampler.counts(whole, tokens)), profile, evaluation)
    total = capacities.Outcome(outcome.processed.sum(2), outcome.computed.sum(2), outcome.dropped.sum(2))
    return Limited(assigned.sum(2), total, profile, evaluation)


def _profile(assigned: IntArray, dropped: IntArray, scenario: Scenario) -> FloatArray:
    """Dropped and all assignments by position in the capacity group [2, positions].

    In order of arrival an expert takes what comes until it is full: the drops of assignments [..., groups, experts] are
    the last ones. By score or at random they are anywhere.
    """
    some = max(1, _PROFILE_COUNTS // max(1, assigned[0].size))
    assigned, dropped = assigned[:some].astype(np.float64), dropped[:some].astype(np.float64)
    total = np.full(POSITIONS, assigned.sum() / POSITIONS)
    if scenario.routing.drop_order != "arrival" or not dropped.any():
        return np.stack([np.full(POSITIONS, dropped.sum() / POSITIONS), total])
    from_ = 1.0 - dropped / np.maximum(assigned * (1.0 - scenario.routing.exempt_sequence_fraction), 1e-9)
    share = dropped / np.maximum(1.0 - from_, 1e-9)  # what a whole group of positions would drop
    edges = np.linspace(0.0, 1.0, POSITIONS + 1)
    late = [float((share * np.maximum(end - np.maximum(from_, begin), 0.0)).sum()) for begin, end in pairwise(edges)]
    return np.stack([np.array(late), total])


def _extrapolated(sample: capacities.Outcome, assigned: IntArray) -> tuple[IntArray, capacities.Outcome]:
    """From some capacity groups to all: drop and pad the whole group's counts in the sample's proportion."""
    seen = (sample.processed + sample.dropped).sum(2)
    kept, rows = (
        np.where(seen > 0, each.sum(2) / np.maximum(seen, 1), 1.0) for each in (sample.processed, sample.computed)
    )
    processed = np.floor(assigned * np.minimum(1.0, kept) + 0.5).astype(np.int64)
    computed = np.floor(assigned * rows + 0.5).astype(np.int64)
    return assigned, capacities.Outcome(processed, np.maximum(computed, processed), assigned - processed)


def _capacity_factor(scenario: Scenario) -> float | None:
    """The capacity factor in force; None when no token is dropped."""
    moe, routing = scenario.model.moe, scenario.routing
    if routing.capacity_factor == "model":
        assert moe is not None  # a law of the scenario
        return moe.capacity_factor
    return routing.capacity_factor


def _evaluation_factor(scenario: Scenario) -> float | None:
    """The capacity factor at evaluation; None when it drops nothing or is not stated."""
    moe, wanted = scenario.model.moe, scenario.routing.capacity_factor_evaluation
    return moe.capacity_factor_evaluation if wanted == "model" and moe is not None else wanted  # type: ignore[return-value]


def capacity_groups(scenario: Scenario, layout: Layout, stack: str) -> tuple[int, int]:
    """Capacity groups inside one expert group, and the tokens that share one capacity (more than its own if wider)."""
    routing, moe = scenario.routing, scenario.model.moe
    assert moe is not None
    tokens = group_tokens(scenario, stack)
    if _capacity_factor(scenario) is None:
        return 1, tokens
    if routing.capacity_group_tokens == "model":
        assert moe.capacity_group_tokens is not None  # a law of the scenario
        shared = moe.capacity_group_tokens
    elif routing.capacity_group_tokens != "auto":
        shared = routing.capacity_group_tokens
    elif routing.capacity_scope == "rank":
        shared = max(1, tokens // (scenario.parallelism.expert * scenario.parallelism.expert_tensor))
    else:
        shared = tokens if routing.capacity_scope == "group" else tokens * layout.expert_data
    return max(1, round(tokens / shared)), shared


def _shared_wider(
    assigned: IntArray,
    chances: FloatArray,
    limit: int,
    shared: int,
    tokens: int,
    scenario: Scenario,
    sampler: Sampler,
) -> capacities.Outcome:
    """Capacity shared by several expert groups: draw the others too, and give each group its share of the slots."""
    routing = scenario.routing
    others = sampler.counts(chances, shared - tokens)[:, :, None]
    whole = capacities.apply(
        assigned + others, limit, overflow=routing.overflow, pad=False, exempt=routing.exempt_sequence_fraction
    )
    kept = np.floor(assigned * (whole.processed / np.maximum(assigned + others, 1)) + 0.5).astype(np.int64)
    kept = np.minimum(kept, assigned)
    if routing.overflow == "reroute":  # the group's tokens fill their share of what the whole holds
        filled = np.cumsum(whole.processed, -1) * (tokens / shared)
        kept = np.diff(np.floor(filled + 1e-9), axis=-1, prepend=0.0).astype(np.int64)
    room = max(1, limit * tokens // shared)
    computed = np.maximum(kept, room) if routing.pad_to_capacity else kept
    return capacities.Outcome(kept, computed, np.maximum(assigned - kept, 0))


__all__ = ["Limited", "Sampler", "capacity_groups", "limited"]
