"""What counts cannot say: the slots that a token's choices reach together, and tokens that lose all their choices.

Both are told from blocks of tokens that are routed one by one. Lost tokens are counted where capacity is applied to the
tokens of the block in the scenario's order (:mod:`.admission`), in capacity groups of the scenario's size, each with
as many documents as it has in the scenario. A capacity group larger than a block is represented by a block with its
number of documents and its share of the slots. The counts of the whole run say more exactly how many assignments are
dropped, so that the block contributes a ratio:

    lost tokens / tokens = dropped / assigned (counts) x [lost tokens / tokens] / [dropped / assigned] (block)

Exempt sequences take the same share off both sides, so that the block needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from simulator.routing import tokens as blocks
from simulator.routing.admission import admit
from simulator.routing.chances import chances_of, logits_of
from simulator.routing.load import FloatArray, IntArray
from simulator.routing.overflow import Limited, holders
from simulator.routing.placement import Placement
from simulator.routing.remedies import Treated
from simulator.routing.routers import softmax
from simulator.routing.sizes import documents, group_tokens
from simulator.routing.tendencies import Tendencies
from simulator.spec.model import MixtureOfExperts
from simulator.spec.scenario import Scenario

BLOCK_LAYERS, BLOCK_TOKENS = 4, 2048
"""Layers and tokens of each that are routed one by one, for what tokens choose together."""

MOST_TOKENS, MOST_LOGITS = 8192, 2**19
"""Tokens of a layer, and logits, in which lost tokens are counted; never fewer tokens than :data:`BLOCK_TOKENS`."""


@dataclass(frozen=True)
class Part:
    """One stack of layers: its router, its counts under capacity, and the loads [layers, experts] known beforehand."""

    stack: str
    treated: Treated
    counts: Limited
    expected: FloatArray


def chosen_slots(
    scenario: Scenario, parts: Sequence[Part], placement: Placement, streams: Sequence[np.random.Generator]
) -> IntArray | None:
    """Slots that tokens choose together [tokens, k]; None if the number of ranks they reach has a closed form.

    It has where experts are alike, unless a limit on groups meets experts that are not in contiguous order.
    """
    moe = scenario.model.moe
    assert moe is not None
    even = all(part.treated.tendencies.even for part in parts)
    limited = moe.router.group_limit is not None and moe.router.group_limit < moe.router.groups
    if moe.router.kind == "expert_choice" or (even and (placement.in_order or not limited)):
        return None
    found, first_layer = [], 0
    for part, stream in zip(parts, streams, strict=True):
        plain = _unbiased(part.treated)
        for layer in _some_layers(part):
            block = blocks.block(plain, layer, BLOCK_TOKENS, stream, document_tokens=BLOCK_TOKENS // 16)
            slot = np.empty(moe.experts, dtype=np.int64)
            order = placement.expert_of_slot[first_layer + layer]
            slot[order[::-1]] = np.arange(len(order))[::-1]  # an expert's first slot stands for its copies
            found.append(slot[block.picks(moe.router, moe.top_k)])
        first_layer += part.counts.assigned.shape[1]
    return np.concatenate(found)


def lost_fraction(scenario: Scenario, parts: Sequence[Part], streams: Sequence[np.random.Generator]) -> float:
    """Share of the tokens that lose all their experts, over all layers."""
    moe = scenario.model.moe
    assert moe is not None
    lost, assigned = 0.0, 0
    for part, stream in zip(parts, streams, strict=True):
        counts = part.counts
        assigned += int(counts.assigned.sum())
        dropped = int(counts.outcome.dropped.sum())
        if dropped and counts.slots is not None and moe.router.kind != "expert_choice":
            lost += dropped * _lost_per_drop(scenario, part, counts.slots, stream)
    return lost / max(1, assigned)


def _lost_per_drop(scenario: Scenario, part: Part, slots: int, rng: np.random.Generator) -> float:
    """Fraction of tokens lost over fraction of assignments dropped, in blocks of some layers."""
    moe, routing, shared = scenario.model.moe, scenario.routing, part.counts.shared
    assert moe is not None
    most = int(np.clip(MOST_LOGITS // moe.experts, BLOCK_TOKENS, MOST_TOKENS))
    tokens, groups = min(shared, most), max(1, most // shared)
    slots = max(1, round(slots * tokens / shared))
    inside = max(1, round(documents(scenario, part.stack) * shared / group_tokens(scenario, part.stack)))
    plain, device = _unbiased(part.treated), moe.experts // holders(scenario)
    lost, dropped, reroutes = 0.0, 0.0, routing.overflow == "reroute"
    for layer in _some_layers(part):
        block = blocks.block(plain, layer, groups * tokens, rng, document_tokens=-(-tokens // inside))
        picks = block.picks(moe.router, moe.top_k)
        result = admit(
            np.where(picks < 0, -1, picks // device),
            slots,
            order=routing.drop_order,
            scores=_scores(block, picks, moe) if routing.drop_order == "score" else None,
            rng=rng,
            overflow=routing.overflow,
            alternatives=block.logits.reshape(len(picks), -1, device).max(-1) if reroutes else None,
            total=moe.experts // device,
            groups=groups,
        )
        lost, dropped = lost + result.lost_fraction, dropped + result.dropped_fraction
    return lost / dropped if dropped else 0.0


def _scores(block: blocks.Block, picks: IntArray, moe: MixtureOfExperts) -> FloatArray:
    """Affinities of the choices [tokens, k]."""
    logits = block.logits.astype(np.float64)
    scores = np.asarray(expit(logits)) if moe.router.kind == "sigmoid" else softmax(logits)
    return np.take_along_axis(scores, np.maximum(picks, 0), axis=-1)


def _some_layers(part: Part) -> Iterator[int]:
    layers = part.counts.assigned.shape[1]
    yield from np.unique(np.linspace(0, layers - 1, BLOCK_LAYERS).round().astype(int)).tolist()


def _unbiased(treated: Treated) -> Tendencies:
    """Tendencies that lead without a bias to the loads that the biased ones lead to."""
    plain, bias = treated.tendencies, treated.bias
    if bias is None:
        return plain
    logits = logits_of(chances_of(plain.logits, plain.top_k, bias, softmax=plain.softmax), plain.top_k)
    return replace(plain, logits=logits - logits.mean(-1, keepdims=True))


__all__ = ["BLOCK_LAYERS", "BLOCK_TOKENS", "Part", "chosen_slots", "lost_fraction"]
