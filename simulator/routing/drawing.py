"""From a scenario to its :class:`ExpertLoad`: tendencies, remedies, counts, capacity, placement, in this order.

Every part has its own stream of random numbers, so that scenarios that differ in capacity or placement are compared on
the same draw of the load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from simulator import errors
from simulator.layout import Layout
from simulator.routing import load as loads
from simulator.routing import placement as placements
from simulator.routing import tokens as blocks
from simulator.routing.chances import logits_of
from simulator.routing.expert_load import ExpertLoad
from simulator.routing.load import FloatArray
from simulator.routing.overflow import Sampler, capacity_groups, limited, other_parts
from simulator.routing.remedies import Batch, Treated, trajectory
from simulator.routing.replay import recorded, steps_as_microbatches
from simulator.routing.sizes import documents, group_tokens
from simulator.routing.tendencies import Tendencies, draw_tendencies
from simulator.routing.together import Part, chosen_slots, lost_fraction
from simulator.spec.routing import LogitLoad, ReplayLoad
from simulator.spec.scenario import Scenario


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
    of_tokens = [streams[stack][2] for stack in present]
    picks = chosen_slots(scenario, parts, placement, of_tokens)
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
        lost_fraction=lost_fraction(scenario, parts, of_tokens),
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
    plain = draw_tendencies(routing.load, layers, moe.experts, moe.top_k, streams[0], moe.router)
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
) -> Part:
    """Draw the counts of one stack and apply capacity."""
    moe, routing = scenario.model.moe, scenario.routing
    assert moe is not None  # the caller has looked
    of_tendencies, of_remedies, _, rng = streams
    if isinstance(routing.load, ReplayLoad):
        known, record = _recorded(scenario, routing.load, layout, stack)
        expected = known.mean(0)
        treated = Treated(None, Tendencies(logits_of(record[0], moe.top_k), moe.top_k), None)
        chances = others = record[steps_as_microbatches(len(record), distinct), :, None]
        sampled = routing.load.sampled
    else:
        plain = draw_tendencies(routing.load, layers, moe.experts, moe.top_k, of_tendencies, moe.router)
        treated = next(_trajectory(scenario, layout, stack, plain, [routing.at_step], of_remedies))
        chances, others = _by_documents(scenario, layout, stack, treated, distinct, of_tendencies)
        expected = treated.chances(1, 1e9, np.random.default_rng(0))[0]  # documents differ from step to step
        sampled = True
    if moe.router.kind == "expert_choice":
        expected, sampled = np.full((layers, moe.experts), moe.top_k / moe.experts), False
        chances = others = np.broadcast_to(expected[:, None], (distinct, layers, 1, moe.experts))
    sampler = Sampler(moe, sampled, blocks.dispersion(treated.tendencies, of_remedies), rng)
    return Part(stack, treated, limited(scenario, layout, stack, chances, sampler, others), expected)


def _recorded(scenario: Scenario, load: ReplayLoad, layout: Layout, stack: str) -> tuple[FloatArray, FloatArray]:
    """Chances [steps, layers, experts] of one stack that a placement knows beforehand, and those that are run."""
    moe = scenario.model.moe
    assert moe is not None
    stacks = [block.stack for block in layout.blocks if block.is_moe]
    encoder = stacks.count("encoder")
    record = recorded(load, len(stacks), moe.experts, moe.top_k, encoder=encoder, mtp=scenario.model.mtp_depth)
    record = record[:, :encoder] if stack == "encoder" else record[:, encoder:]
    known = known_steps(scenario, len(record))
    return record[: known or None], record[known:]


def known_steps(scenario: Scenario, steps: int) -> int:
    """Steps at the start of a recording to which a placement is fitted and which are not run.

    A placement after the load follows what was seen before: it has the first half. Of one step alone it knows all. A
    placement by number needs none.
    """
    return steps // 2 if scenario.routing.placement.kind == "balanced" else 0


def _by_documents(
    scenario: Scenario, layout: Layout, stack: str, treated: Treated, distinct: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Chances [microbatches, layers, parts, experts] of the parts of an expert group, and of the expert groups beside.

    Capacity groups inside the expert group hold different documents, so that each has its own preferences, and so do
    the expert groups that share a wider capacity. Where nothing tells them apart there is one part.
    """
    plain, inside = treated.tendencies, documents(scenario, stack)
    groups, _ = capacity_groups(scenario, layout, stack)
    beside, of_each = other_parts(scenario, layout, stack)
    layers, experts = plain.logits.shape
    most = max(1, loads.MAX_COUNTS // (distinct * layers * experts))

    def drawn(parts: int, held: float) -> FloatArray:
        found = treated.chances(distinct * parts, max(1.0, held), rng)
        if len(found) == 1:
            return np.broadcast_to(found[:, :, None], (distinct, layers, 1, experts))
        return np.moveaxis(found.reshape(distinct, parts, layers, experts), 1, 2)

    parts = min(groups, round(inside), most) if plain.domain else 1
    own = drawn(parts, inside / parts)
    if not (beside and plain.domain):
        return own, own
    parts = min(beside, most)
    return own, drawn(parts, inside * of_each * beside / parts)


# --- all stacks together ----------------------------------------------------------------------------------------------


def _placed(scenario: Scenario, layout: Layout, parts: Sequence[Part]) -> placements.Placement:
    """Place the experts of all MoE layers: by number, or after what is known of the load beforehand."""
    moe, wanted, ranks = scenario.model.moe, scenario.routing.placement, scenario.parallelism.expert
    assert moe is not None
    layers = sum(part.counts.assigned.shape[1] for part in parts)
    if wanted.kind == "contiguous":
        return placements.contiguous(layers, moe.experts, ranks)
    expected = np.concatenate([part.expected for part in parts])
    ways = layout.spans["expert"].ways
    nodes = int(np.prod(ways[1:])) if len(ways) > 1 else 1
    try:
        return placements.balanced(
            expected, ranks, redundant=wanted.redundant_experts, nodes=nodes, groups=moe.router.groups
        )
    except ValueError as error:  # more copies than ranks that could hold one
        raise errors.invalid(str(error), path="routing.placement.redundant_experts") from None


__all__ = ["expert_load", "known_steps", "over_steps"]
