"""Where tokens travel: distinct nodes and ranks that a token reaches, who sends how much to whom, and payloads.

A token sends one copy to each node that holds one of its experts; the copy is forwarded inside the node to each rank
(DeepSeek-V3, arXiv 2412.19437, section 3.2.2). For uniform top-k without replacement over D equal groups,

    E[distinct groups] = D (1 - C(E - E/D, k) / C(E, k)).

With a limit on the groups (V2: top devices, V3: best two per node) or uneven popularity the number is sampled from
independent affinities U^(1 / (E p_e)), U uniform: the k largest are a draw without replacement with weights p_e
(Efraimidis and Spirakis 2006), and even weights leave U itself.

Where it matters which rank sends to which, two matrices [source, destination] tell it: of assignments, from counts by
source, and of merged copies, from a block of tokens.
"""

from __future__ import annotations

from functools import lru_cache
from math import lgamma

import numpy as np
import numpy.typing as npt

from simulator.routing.placement import Placement
from simulator.spec.fields import ELEMENT_BYTES
from simulator.spec.model import MixtureOfExperts

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def distinct_groups(experts: int, groups: int, top_k: int) -> float:
    """Expected number of groups that hold one of a token's experts, uniform routing without limit.

    >>> round(distinct_groups(256, 8, 8), 4)
    5.2947
    """
    rest = experts - experts // groups
    if top_k > rest:
        return float(groups)
    log_miss = lgamma(rest + 1) - lgamma(rest - top_k + 1) - lgamma(experts + 1) + lgamma(experts - top_k + 1)
    return groups * (1.0 - float(np.exp(log_miss)))


@lru_cache(maxsize=64)
def limited_groups(
    experts: int, limit_groups: int, limit: int, score: str, parts: int, top_k: int, tokens: int = 8192
) -> float:
    """The same when a token may use only its best ``limit`` of ``limit_groups`` groups; sampled with a fixed seed.

    ``parts`` is the number of equal parts (nodes or ranks) that are counted.
    """
    rng = np.random.default_rng(20241227)
    return sampled_distinct(np.ones(experts), parts, top_k, tokens, rng, groups=limit_groups, limit=limit, score=score)


def sampled_picks(
    weights: npt.ArrayLike,
    top_k: int,
    tokens: int,
    rng: np.random.Generator,
    *,
    groups: int = 1,
    limit: int | None = None,
    score: str = "max",
) -> IntArray:
    """Experts that each token chooses [tokens, top_k], in no order, -1 where its groups hold fewer experts.

    ``weights`` [experts]: popularity, in any unit. A token uses the ``limit`` best of its ``groups`` only; a group
    counts as much as its best affinity (score "max") or the sum of its best two ("top2_sum").
    """
    share = np.asarray(weights, dtype=np.float64)
    power = (share.mean() / np.maximum(share, 1e-12 * share.mean())).astype(np.float32)
    # Logarithms, since the affinities of unpopular experts are too small for a float. 1e-9 is below every other draw.
    keys = np.log(np.maximum(rng.random((tokens, groups, len(share) // groups), dtype=np.float32), 1e-9))
    keys *= power.reshape(groups, -1)
    if limit is not None and limit < groups:
        best = np.exp(np.sort(keys, axis=-1)[..., -2:])
        group_score = best[..., -1] if score == "max" else best.sum(-1)
        barred = np.argpartition(-group_score, limit - 1, axis=-1)[:, limit:]
        np.put_along_axis(keys, barred[..., None], -np.inf, axis=1)
    keys = keys.reshape(tokens, -1)
    picks = np.argpartition(-keys, top_k - 1, axis=-1)[:, :top_k]
    return np.where(np.isfinite(np.take_along_axis(keys, picks, axis=-1)), picks, -1)


def sampled_distinct(
    weights: npt.ArrayLike,
    parts: int,
    top_k: int,
    tokens: int,
    rng: np.random.Generator,
    *,
    groups: int = 1,
    limit: int | None = None,
    score: str = "max",
) -> float:
    """Mean number of equal parts that a token reaches under a popularity of experts, sampled.

    >>> round(sampled_distinct(np.ones(256), 8, 8, 4096, np.random.default_rng(0)), 1)
    5.3
    """
    picks = sampled_picks(weights, top_k, tokens, rng, groups=groups, limit=limit, score=score)
    return distinct(picks, np.size(weights), parts)


def distinct(picks: IntArray, experts: int, parts: int) -> float:
    """Mean number of distinct equal parts (nodes, ranks) of the experts that a token reaches.

    ``picks`` [tokens, k]: experts; -1 (a dropped choice) reaches nothing.

    >>> distinct(np.array([[0, 1, 7], [2, -1, -1]]), 8, 4)
    1.5
    """
    return float(_reached(picks, experts, parts)[1].sum() / max(1, len(picks)))


def _reached(picks: IntArray, experts: int, parts: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Parts of each token in ascending order [tokens, k], and which entries are the first of their part."""
    part = np.sort(np.where(picks < 0, -1, picks * parts // experts), axis=-1)
    return part, np.diff(part, axis=-1, prepend=-1) > 0


def merged_send_matrix(picks: IntArray, sources: int, experts: int, ranks: int) -> IntArray:
    """Copies that source i sends to rank j [sources, ranks]: one for all of a token's experts on the rank.

    ``picks`` [tokens, k]: the tokens of source 0, then as many of source 1, and so on; -1 sends nothing. Experts sit
    in contiguous blocks.

    >>> merged_send_matrix(np.array([[0, 1], [1, 3]]), 2, 4, 2).tolist()
    [[1, 0], [1, 1]]
    """
    if len(picks) % sources:
        raise ValueError(f"{len(picks)} tokens do not divide over {sources} sources")
    part, first = _reached(picks, experts, ranks)
    source = np.arange(len(picks))[:, None] // max(1, len(picks) // sources)
    return np.bincount((source * ranks + part)[first], minlength=sources * ranks).reshape(sources, ranks)


def send_matrix(counts_by_source: IntArray, where: Placement | IntArray) -> IntArray:
    """Assignments that source i sends to rank j [..., sources, ranks], each on its own.

    ``counts_by_source`` [..., sources, experts] with the rank of each expert [experts], as many on every rank, or
    [..., layers, sources, experts] with a placement. Row sums are what the source assigned, column sums what the rank
    receives (:meth:`Placement.rank_loads` of the sum over sources).

    >>> send_matrix(np.array([[1, 2, 3, 4], [0, 5, 0, 1]]), np.array([0, 0, 1, 1])).tolist()
    [[3, 7], [5, 1]]
    """
    if not isinstance(where, Placement):
        plain = Placement(np.argsort(where, kind="stable")[None], int(where.max()) + 1, len(where))
        if not np.array_equal(np.repeat(np.arange(plain.ranks), plain.slots_per_rank), np.sort(where)):
            raise ValueError("rank of expert: every rank holds the same number of experts")
        return send_matrix(counts_by_source[..., None, :, :], plain)[..., 0, :, :]
    # A token's place in the round of an expert's replicas is its number among all sources' tokens.
    through = np.moveaxis(np.cumsum(counts_by_source, axis=-2), -2, 0)
    return np.moveaxis(np.diff(where.rank_loads(through), axis=0, prepend=0), 0, -2)


def payload_bytes(hidden: int, form: str, scale_block: int = 128) -> float:
    """Bytes of one token on its way to an expert or back; FP8 with one FP32 scale per block of elements.

    >>> payload_bytes(7168, "fp8"), payload_bytes(7168, "bf16")
    (7392.0, 14336.0)
    """
    return hidden * (1.0 + 4.0 / scale_block) if form == "fp8" else hidden * ELEMENT_BYTES[form]


def copies(moe: MixtureOfExperts, parts: int, picks: IntArray | None = None, slots: int | None = None) -> float:
    """Mean number of equal parts of the experts (nodes, ranks) that one token reaches.

    ``picks`` [tokens, k]: what some tokens choose together, of ``slots`` slots in rank order (default: the experts);
    without them all experts are alike and, under a limit on groups, in contiguous order.
    """
    if parts <= 1:
        return 1.0
    slots = slots or moe.experts
    parts = min(parts, slots)
    if picks is not None:
        return distinct(picks, slots, parts)
    router = moe.router
    if router.groups > 1 and router.group_limit is not None and router.group_limit < router.groups:
        return limited_groups(moe.experts, router.groups, router.group_limit, router.group_score, parts, moe.top_k)
    return distinct_groups(moe.experts, min(parts, moe.experts), moe.top_k)


def copies_by_tier(
    moe: MixtureOfExperts,
    ways: tuple[int, ...],
    *,
    merged: bool = True,
    picks: IntArray | None = None,
    slots: int | None = None,
) -> tuple[tuple[int, float], ...]:
    """Copies of one token that its rank sends over each tier, for a group that joins ``ways`` members per tier.

    Inside the node one copy per other rank that holds an expert, between nodes one per other node. ``merged=False``
    (padded slots) sends every assignment on its own. ``picks`` and ``slots`` as in :func:`copies`.

    >>> from simulator.spec import load_model
    >>> moe = load_model("mixtral-8x7b").moe
    >>> [(tier, round(number, 3)) for tier, number in copies_by_tier(moe, (8, 1))]
    [(0, 1.75)]
    """
    size = int(np.prod(ways))
    result = []
    for tier, count in enumerate(ways):
        if count > 1:
            parts = size if tier == 0 else int(np.prod(ways[tier:]))  # ranks, nodes, or instances of the tier below
            others = (count - 1) / count if tier == 0 else (parts - 1) / parts
            number = copies(moe, parts, picks, slots) if merged else float(moe.top_k)
            result.append((tier, number * others))
    return tuple(result)
