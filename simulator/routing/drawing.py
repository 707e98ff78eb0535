"""From a scenario to its :class:`ExpertLoad`: tendencies, remedies, counts, capacity, placement, in this order.

Every part has its own stream of random numbers, so that scenarios that differ in capacity or placement are compared on
the same draw of the load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from simulator import errors
from simulator.layout import Layout
from simulator.routing import load as loads
from simulator.routing import placement as placements
from simulator.routing import tokens as blocks
from simulator.routing.expert_load import ExpertLoad
from simulator.routing.load import FloatArray, IntArray
from simulator.routing.overflow import Limited, Sampler, capacity_groups, limited
from simulator.routing.remedies import Batch, Treated, trajectory
from simulator.routing.replay import recorded
from simulator.routing.sizes import documents, group_tokens
from simulator.routing.tendencies import Tendencies, chances_of, draw_tendencies, logits_of
from simulator.spec.routing import LogitLoad, ReplayLoad
from simulator.spec.scenario import Scenario

BLOCK_LAYERS, BLOCK_TOKENS = 4, 2048
"""Layers and tokens of each that are routed one by one, for what counts cannot say."""


@dataclass(frozen=True)
class _Part:
    """One stack of layers: its router, and its counts under capacity."""

    treated: Treated
    counts: Limited
    replayed: bool


def expert_load(scenario: Scenario, layout: Layout) -> ExpertLoad | None:
    """Draw the load of one expert group for every microbatch and MoE layer; None for a dense model.

    Raises:
        InvalidInput: a recorded load that does not fit.
        NotSimulated: a capacity factor for experts that choose their tokens.
    """
    moe, routing = scenario.model.moe, scenario.routing
    stacks = [block.stack for block in layout.blocks if block.is_moe]
    if moe is None or not stacks:
        return None
    if moe.router.kind == "expert_choice" and routing.capacity_factor is not None:
        raise errors.NotSimulated(
            "routing.capacity_factor: experts that choose their tokens take the same number each (arXiv 2202.09368); "
            "use capacity_factor: null"
        )
    present = [stack for stack in ("encoder", "decoder") if stack in stacks]  # the encoder's layers come first
    counts = sum(stacks.count(stack) * capacity_groups(scenario, layout, stack)[0] for stack in present) * moe.experts
    distinct = max(1, min(layout.microbatches, loads.MAX_COUNTS // max(1, counts)))
    streams = {stack: _streams(routing.seed, stack) for stack in present}
    parts = [_draw(scenario, layout, stack, stacks.count(stack), distinct, streams[stack]) for stack in present]
    placement = _placed(scenario, layout, parts)
    picks, lost = _tokens(scenario, parts, placement, [streams[stack][2] for stack in present])
    profile = np.sum([part.counts.profile for part in parts], axis=0)
    evaluation = np.sum([part.counts.evaluation for part in parts], axis=0)
    return ExpertLoad(
        assigned=np.concatenate([part.counts.assigned for part in parts], axis=1),
        processed=np.concatenate([part.counts.outcome.processed for part in parts], axis=1),
        computed=np.concatenate([part.counts.outcome.computed for part in parts], axis=1),
        tokens=np.array([group_tokens(scenario, stack) for stack in sorted(stacks, reverse=True)]),
        top_k=moe.top_k,
        placement=placement,
        drop_profile=profile[0] / np.maximum(profile[1], 1.0),
        lost_fraction=lost,
        dropped_fraction_evaluation=float(evaluation[0] / max(evaluation[1], 1.0)),
        picks=picks,
    )


def over_steps(scenario: Scenario, layout: Layout, steps: Sequence[int | None]) -> Iterator[tuple[Treated, Tendencies]]:
    """Tendencies of the decoder's MoE layers at training steps, under the remedies, and the untreated ones."""
    moe, routing = scenario.model.moe, scenario.routing
    layers = sum(block.is_moe and block.stack == "decoder" for block in layout.blocks)
    if moe is None or not layers or isinstance(routing.load, ReplayLoad):
        raise errors.NotSimulated("routing.load: only a load model of a MoE model changes over the steps")
    streams = _streams(routing.seed, "decoder")
    plain = draw_tendencies(routing.load, layers, moe.experts, moe.top_k, streams[0])
    for treated in _trajectory(scenario, layout, "decoder", plain, steps, streams[1]):
        yield treated, plain


def _streams(seed: int, stack: str) -> list[np.random.Generator]:
    """Random numbers of a stack: for tendencies, remedies, tokens and counts."""
    return np.random.default_rng([seed, stack == "encoder"]).spawn(4)


# --- one stack --------------------------------------------------------------------------------------------------------


def _trajectory(
    scenario: Scenario,
    layout: Layout,
    stack: str,
    plain: Tendencies,
    steps: Sequence[int | None],
    rng: np.random.Generator,
) -> Iterator[Treated]:
    """Apply the scenario's remedies to tendencies."""
    moe, routing, load = scenario.model.moe, scenario.routing, scenario.routing.load
    assert moe is not None
    groups = layout.expert_data * layout.microbatches
    batch = Batch(group_tokens(scenario, stack) * groups, documents(scenario, stack) * groups)
    return trajectory(
        plain,
        steps,
        remedies=routing.balance,
        moe=moe,
        batch=batch,
        growth=load.growth if isinstance(load, LogitLoad) else None,
        drift=load.drift if isinstance(load, LogitLoad) else 0.0,
        rng=rng,
    )


def _draw(
    scenario: Scenario, layout: Layout, stack: str, layers: int, distinct: int, streams: Sequence[np.random.Generator]
) -> _Part:
    """Draw the counts of one stack and apply capacity."""
    moe, routing = scenario.model.moe, scenario.routing
    assert moe is not None  # the caller has looked
    of_tendencies, of_remedies, _, rng = streams
    if isinstance(routing.load, ReplayLoad):
        mtp = scenario.model.mtp_depth if stack == "decoder" else 0
        chances = recorded(routing.load, layers, moe.experts, moe.top_k, mtp=mtp)
        treated = Treated(None, Tendencies(logits_of(chances[0], moe.top_k), moe.top_k), None)
        chances = chances[np.arange(distinct) % len(chances), :, None]
        sampled = routing.load.sampled
    else:
        plain = draw_tendencies(routing.load, layers, moe.experts, moe.top_k, of_tendencies)
        treated = next(_trajectory(scenario, layout, stack, plain, [routing.at_step], of_remedies))
        chances = _by_documents(scenario, layout, stack, treated, distinct, of_tendencies)
        sampled = True
    if moe.router.kind == "expert_choice":
        chances, sampled = np.full((distinct, layers, 1, moe.experts), moe.top_k / moe.experts), False
    sampler = Sampler(moe, sampled, blocks.dispersion(treated.tendencies, of_remedies), rng)
    replayed = not sampled or isinstance(routing.load, ReplayLoad)
    return _Part(treated, limited(scenario, layout, stack, chances, sampler), replayed)


def _by_documents(
    scenario: Scenario, layout: Layout, stack: str, treated: Treated, distinct: int, rng: np.random.Generator
) -> FloatArray:
    """Chances [microbatches, layers, parts, experts] of the parts of an expert group that share their documents.

    Capacity groups inside the expert group hold different documents, so that each has its own preferences. Where
    nothing tells them apart there is one part.
    """
    plain, inside = treated.tendencies, documents(scenario, stack)
    groups, _ = capacity_groups(scenario, layout, stack)
    layers, experts = plain.logits.shape
    parts = min(groups, round(inside), max(1, loads.MAX_COUNTS // (distinct * layers * experts))) if plain.domain else 1
    found = treated.chances(distinct * parts, max(1.0, inside / parts), rng)
    if len(found) == 1:
        return np.broadcast_to(found[:, :, None], (distinct, layers, 1, experts))
    return np.moveaxis(found.reshape(distinct, parts, layers, experts), 1, 2)


# --- all stacks together ----------------------------------------------------------------------------------------------


def _placed(scenario: Scenario, layout: Layout, parts: Sequence[_Part]) -> placements.Placement:
    """Place the experts of all MoE layers: by number, or after what is known of the load beforehand."""
    moe, wanted, ranks = scenario.model.moe, scenario.routing.placement, scenario.parallelism.expert
    assert moe is not None
    layers = sum(part.counts.assigned.shape[1] for part in parts)
    if wanted.kind == "contiguous":
        return placements.contiguous(layers, moe.experts, ranks)
    expected = np.concatenate([_expected(part) for part in parts])
    ways = layout.spans["expert"].ways
    nodes = int(np.prod(ways[1:])) if len(ways) > 1 else 1
    try:
        return placements.balanced(
            expected, ranks, redundant=wanted.redundant_experts, nodes=nodes, groups=moe.router.groups
        )
    except ValueError as error:  # more copies than ranks that could hold one
        raise errors.invalid(str(error), path="routing.placement.redundant_experts") from None


def _expected(part: _Part) -> FloatArray:
    """Load of each expert [layers, experts] as past steps show it: documents differ from step to step."""
    if part.replayed:
        return np.asarray(part.counts.assigned.mean(0))
    return np.asarray(part.treated.chances(1, 1e9, np.random.default_rng(0))[0])


def _tokens(
    scenario: Scenario, parts: Sequence[_Part], placement: placements.Placement, streams: Sequence[np.random.Generator]
) -> tuple[IntArray | None, float]:
    """Slots that tokens choose together [tokens, k], None if experts are alike; and tokens that lose them all."""
    moe, routing = scenario.model.moe, scenario.routing
    assert moe is not None
    dropping = any(part.counts.outcome.dropped.any() for part in parts)
    if (all(part.treated.tendencies.even for part in parts) and not dropping) or moe.router.kind == "expert_choice":
        return None, 0.0
    found, lost, first_layer = [], [], 0
    for part, stream in zip(parts, streams, strict=True):
        layers = part.counts.assigned.shape[1]
        plain = _unbiased(part.treated)
        for layer in np.unique(np.linspace(0, layers - 1, BLOCK_LAYERS).round().astype(int)):
            block = blocks.block(plain, layer, BLOCK_TOKENS, stream, document_tokens=BLOCK_TOKENS // 16)
            picks = block.picks(moe.router, moe.top_k)
            lost.append(_lost(picks, part.counts.assigned[0, layer], part.counts.outcome.dropped[0, layer], scenario))
            slot = np.empty(moe.experts, dtype=np.int64)
            order = placement.expert_of_slot[first_layer + layer]
            slot[order[::-1]] = np.arange(len(order))[::-1]  # an expert's first slot stands for its copies
            found.append(slot[picks])
        first_layer += layers
    even = all(part.treated.tendencies.even for part in parts)
    return (None if even else np.concatenate(found)), float(np.mean(lost)) if routing.overflow == "drop" else 0.0


def _unbiased(treated: Treated) -> Tendencies:
    """Tendencies that lead without a bias to the loads that the biased ones lead to."""
    plain, bias = treated.tendencies, treated.bias
    if bias is None:
        return plain
    logits = logits_of(chances_of(plain.logits, plain.top_k, bias), plain.top_k)
    return replace(plain, logits=logits - logits.mean(-1, keepdims=True))


def _lost(picks: IntArray, assigned: IntArray, dropped: IntArray, scenario: Scenario) -> float:
    """Share of tokens all of whose experts are full when it is their turn."""
    exempt = scenario.routing.exempt_sequence_fraction
    share = np.minimum(dropped / np.maximum(assigned * (1.0 - exempt), 1e-9), 1.0)[picks]  # [tokens, k]
    if scenario.routing.drop_order == "arrival":
        position = (np.arange(len(picks)) + 0.5)[:, None] / len(picks)
        lost = (position > 1.0 - share).all(-1).mean()
    else:
        lost = share.prod(-1).mean()
    return float(lost) * (1.0 - exempt)


__all__ = ["expert_load", "over_steps"]
