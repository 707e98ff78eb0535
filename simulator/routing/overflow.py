"""What a scenario's capacity makes of the counts of one stack: groups, slots, drops by position.

Tokens that share one capacity are a capacity group: a part of the expert group, the whole of it, or several of them
together. Counts are drawn per capacity group, so that small groups overflow more often, as they do.

A capacity that several expert groups share meets the documents of all of them. The other groups are drawn in up to
:data:`OTHERS` parts with documents of their own; where there are more groups, a part mixes the documents of several
(variance law, :mod:`.tendencies`). The expert group that is looked at has the fate of the whole in proportion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from simulator import errors
from simulator.layout import Layout
from simulator.routing import capacity as capacities
from simulator.routing import load as loads
from simulator.routing.expert_load import POSITIONS
from simulator.routing.load import FloatArray, IntArray
from simulator.routing.sizes import group_tokens
from simulator.spec.model import MixtureOfExperts
from simulator.spec.scenario import Scenario
from simulator.workload.slots import capacity_factor, one_hot_mask

OTHERS = 8
"""Parts in which the expert groups that share a capacity with the one looked at are drawn."""
_PROFILE_COUNTS = 400_000


@dataclass(frozen=True)
class Limited:
    """Counts of one stack of layers [microbatches, layers, experts] before and after capacity.

    ``profile`` [2, positions]: dropped and all assignments by position; ``evaluation`` [2]: dropped and all assignments
    at the evaluation's capacity factor. ``slots``: of one holder (expert or device) for the ``shared`` tokens of a
    capacity group; None for no limit.
    """

    assigned: IntArray
    outcome: capacities.Outcome
    profile: FloatArray
    evaluation: FloatArray
    slots: int | None
    shared: int


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


def limited(
    scenario: Scenario, layout: Layout, stack: str, chances: FloatArray, sampler: Sampler, others: FloatArray
) -> Limited:
    """Draw counts from chances [microbatches, layers, parts, experts] and apply the scenario's capacity.

    The capacity groups are divided over the parts, which hold different documents. ``others``: chances in the parts of
    the further expert groups, if any, that share the capacity.
    """
    routing = scenario.routing
    tokens = group_tokens(scenario, stack)
    groups, shared = capacity_groups(scenario, layout, stack)
    parts, whole = chances.shape[2], chances.mean(2)
    drawn = max(1, min(groups, loads.MAX_COUNTS // max(1, whole.size)))
    assigned = sampler.counts(
        chances[:, :, np.arange(drawn) * parts // drawn], _as_equal(tokens, groups, drawn)[:, None]
    )
    together = assigned
    if shared > tokens:
        further = others.shape[2]
        beside = sampler.counts(others, _as_equal(shared - tokens, further, further)[:, None])
        together = assigned + beside.sum(2, keepdims=True)
    limit, evaluated = (
        slots(scenario, factor, shared) for factor in (capacity_factor(scenario), _evaluation_factor(scenario))
    )
    outcome = _applied(assigned, together, limit, scenario, pad=routing.pad_to_capacity)
    profile = _profile(assigned, outcome.dropped, scenario)
    lost = _applied(assigned, together, evaluated, scenario).dropped
    evaluation = np.array([lost.sum(), assigned.sum()], dtype=np.float64)
    seen, total = assigned.sum(2), capacities.Outcome(*(each.sum(2) for each in _arrays(outcome)))
    if drawn < groups:  # from some capacity groups to all
        all_ = sampler.counts(whole, tokens)
        seen, total = all_, capacities.in_part(all_, seen, total)
    return Limited(seen, total, profile, evaluation, limit, shared)


def _as_equal(tokens: int, groups: int, some: int) -> IntArray:
    """Tokens of ``some`` of the groups, as equal as they can be: if they are all groups, no token is lost."""
    sizes = np.full(some, tokens // groups)
    sizes[: tokens % groups if some == groups else 0] += 1
    return sizes


def _arrays(outcome: capacities.Outcome) -> tuple[IntArray, IntArray, IntArray]:
    return outcome.processed, outcome.computed, outcome.dropped


def _applied(
    assigned: IntArray, together: IntArray, limit: int | None, scenario: Scenario, *, pad: bool = False
) -> capacities.Outcome:
    """Capacity applied to the counts of all who share it, and the part in it of those who are looked at."""
    routing = scenario.routing
    outcome = capacities.apply(
        together,
        limit,
        overflow=routing.overflow,
        pad=pad,
        exempt=routing.exempt_sequence_fraction,
        holders=holders(scenario),
    )
    return outcome if together is assigned else capacities.in_part(assigned, together, outcome)


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
    open_ = np.maximum(assigned * (1.0 - scenario.routing.exempt_sequence_fraction), 1e-9)
    from_ = np.maximum(1.0 - dropped / open_, 0.0)  # whole counts round the exempt ones off
    share = dropped / np.maximum(1.0 - from_, 1e-9)  # what a whole group of positions would drop
    edges = np.linspace(0.0, 1.0, POSITIONS + 1)
    late = [float((share * np.maximum(end - np.maximum(from_, begin), 0.0)).sum()) for begin, end in pairwise(edges)]
    return np.stack([np.array(late), total])


def _evaluation_factor(scenario: Scenario) -> float | None:
    """The capacity factor at evaluation; None when it drops nothing or is not stated."""
    moe, wanted = scenario.model.moe, scenario.routing.capacity_factor_evaluation
    return moe.capacity_factor_evaluation if wanted == "model" and moe is not None else wanted  # type: ignore[return-value]


def capacity_groups(scenario: Scenario, layout: Layout, stack: str) -> tuple[int, int]:
    """Capacity groups inside one expert group, and the tokens that share one capacity (more than its own if wider)."""
    routing, moe = scenario.routing, scenario.model.moe
    assert moe is not None
    tokens = group_tokens(scenario, stack)
    if capacity_factor(scenario) is None and _evaluation_factor(scenario) is None:
        return 1, tokens
    mask = one_hot_mask(scenario, stack)
    if mask is not None:  # groups lie on one rank
        return max(1, round(tokens / mask.tokens)), mask.tokens
    if routing.capacity_group_tokens == "model":
        assert moe.capacity_group_tokens is not None  # a law of the scenario
        shared = moe.capacity_group_tokens
    elif routing.capacity_group_tokens != "auto":
        shared = routing.capacity_group_tokens
    elif routing.capacity_scope == "rank":
        shared = max(1, tokens // (scenario.parallelism.expert * scenario.parallelism.expert_tensor))
    else:
        shared = tokens if routing.capacity_scope == "group" else tokens * layout.expert_data
    groups = max(1, round(tokens / shared))
    return groups, shared if shared > tokens else round(tokens / groups)


def other_parts(scenario: Scenario, layout: Layout, stack: str) -> tuple[int, float]:
    """Parts in which the expert groups beside the one looked at are drawn, and expert groups in each; 0 if none."""
    tokens = group_tokens(scenario, stack)
    further = max(0.0, capacity_groups(scenario, layout, stack)[1] / tokens - 1.0)
    parts = min(OTHERS, math.ceil(further))
    return parts, further / max(1, parts)


def holders(scenario: Scenario) -> int:
    """How many share the capacity of a layer: its experts, or the devices (router groups) that they are on.

    Raises:
        InvalidInput: a capacity of devices for a router without groups.
    """
    moe, over = scenario.model.moe, scenario.routing.capacity_over
    assert moe is not None
    if (moe.capacity_over if over == "model" else over) == "expert":
        return moe.experts
    if moe.router.groups == 1:
        raise errors.invalid(
            "a device is one of model.moe.router.groups, and this router has no groups", path="routing.capacity_over"
        )
    return moe.router.groups


def slots(scenario: Scenario, factor: float | None, tokens: int) -> int | None:
    """Capacity of one holder for the tokens of a capacity group; None without a limit."""
    moe = scenario.model.moe
    if factor is None or moe is None:
        return None
    routing, sharing = scenario.routing, holders(scenario)
    least = routing.min_expert_capacity * (moe.experts // sharing)
    return capacities.slots(factor, tokens, moe.top_k, sharing, counts_top_k=routing.capacity_counts_top_k, least=least)


__all__ = ["OTHERS", "Limited", "Sampler", "capacity_groups", "holders", "limited", "other_parts", "slots"]
