"""Routers: from the logits of a layer's tokens to their experts and combine weights, all tokens at once.

Each kind of :class:`simulator.spec.model.Router` follows the publication that introduced it. Selection is by falling
score; of equal scores the lower expert number wins.

Weights ``before_top_k`` are the selected scores as they are. Divided by their sum (``renormalized``), softmax scores
are the softmax over the selected logits (``after_top_k``; Mixtral, arXiv 2401.04088), and sigmoids are the gates of
DeepSeek-V3 (arXiv 2412.19437, equation 13). Noisy top-k always normalises over the kept experts (arXiv 1701.06538),
a switch router takes the probability of its one expert (arXiv 2101.03961).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from simulator.routing.load import FloatArray, IntArray
from simulator.spec.model import Router

HASH_SEED = 210604426
"""Seed of the one table that all hash routers share."""


@dataclass(frozen=True)
class Choices:
    """What a router decides for every token.

    ``experts`` [tokens, k]: chosen experts in falling order of selection score, -1 = no expert. ``weights``
    [tokens, k]: factors on the experts' outputs, 0 where there is no expert. ``scores`` [tokens, experts]: affinities
    before any selection bias (softmax probabilities or sigmoids; a hash router: equal shares of the chosen experts).
    """

    experts: IntArray
    weights: FloatArray
    scores: FloatArray

    @property
    def counts(self) -> IntArray:
        """Assignments of each expert [experts]."""
        return np.bincount(self.experts[self.experts >= 0], minlength=self.scores.shape[1]).astype(np.int64)


def choose(
    router: Router,
    logits: FloatArray,
    top_k: int,
    *,
    bias: FloatArray | None = None,
    noise_logits: FloatArray | None = None,
    group_logits: FloatArray | None = None,
    token_ids: IntArray | None = None,
    rng: np.random.Generator | None = None,
) -> Choices:
    """Let every token (or, in expert choice, every expert) choose from ``logits`` [tokens, experts].

    ``bias`` [experts] is added to the scores for the selection only (V3, arXiv 2412.19437, equation 16).
    ``noise_logits`` [tokens, experts] and ``rng`` make noisy top-k noisy; without ``rng`` it evaluates.
    ``group_logits`` [tokens, branching] is the first level of two-level gating, taken as it is; by default the
    logsumexp of each group. ``token_ids`` [tokens] is what a hash router hashes. Weights are multiplied by
    ``router.scaling``.

    >>> mixtral = Router(weights="after_top_k")
    >>> chosen = choose(mixtral, np.log([[4.0, 1.0, 12.0, 3.0]]), 2)
    >>> chosen.experts.tolist(), chosen.weights.round(6).tolist(), chosen.counts.tolist()
    ([[2, 0]], [[0.75, 0.25]], [1, 0, 1, 0])

    Raises:
        ValueError: an input that this router needs is missing, or its numbers do not fit together.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or not np.isfinite(logits).all():
        raise ValueError("logits must be a finite array [tokens, experts]")
    check(router, logits.shape[1], top_k, None if bias is None else np.shape(bias))
    if router.kind == "hash":
        return _by_token_id(router, logits.shape, top_k, token_ids)
    if router.kind == "expert_choice":
        return _by_expert(router, logits, top_k)
    if router.kind == "noisy_top_k" and rng is not None:
        if noise_logits is None:
            raise ValueError("noisy_top_k with rng needs noise_logits [tokens, experts]; leave rng out to evaluate")
        logits = noisy(logits, noise_logits, rng)
    if router.branching is not None:
        return _two_levels(router, router.branching, logits, top_k, group_logits)
    scores = np.asarray(special.expit(logits)) if router.kind == "sigmoid" else softmax(logits)
    selection = scores if bias is None else scores + bias
    keys = logits if bias is None else selection  # logits have the order of their scores, without ties by rounding
    experts = top(_limited(router, selection, keys), top_k)
    weights = _weights(router, np.take_along_axis(logits, experts, axis=1), np.take_along_axis(scores, experts, axis=1))
    if router.second_choice == "random":
        experts, weights = _second_at_random(experts, weights, rng)
    return Choices(experts, weights * router.scaling, scores)


def noisy(logits: FloatArray, noise_logits: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Noisy logits H = x + N(0, 1) softplus(n), all [tokens, experts] (arXiv 1701.06538, section 2.1)."""
    return np.asarray(logits + rng.standard_normal(np.shape(logits)) * np.logaddexp(0.0, noise_logits))


def softmax(logits: FloatArray) -> FloatArray:
    """Softmax along the last axis."""
    result = np.asarray(logits - logits.max(-1, keepdims=True))
    np.exp(result, out=result)
    result /= result.sum(-1, keepdims=True)
    return result


def top(keys: npt.NDArray[np.floating[Any]], count: int) -> IntArray:
    """Positions of the ``count`` largest keys of each row [rows, count], in falling order; ties: the lower position.

    >>> top(np.array([[1.0, 3.0, 3.0, 2.0, 3.0]]), 2).tolist()
    [[1, 2]]
    """
    rows, width = keys.shape
    if count == 0:
        return np.empty((rows, 0), dtype=np.int64)
    chosen = np.argpartition(keys, width - count, axis=1)[:, width - count :]
    least = np.take_along_axis(keys, chosen, axis=1).min(1, keepdims=True)
    tied = np.count_nonzero(keys >= least, axis=1) > count  # more keys as large as the last one: sort these rows
    chosen[tied] = np.argsort(-keys[tied], axis=1, kind="stable")[:, :count]
    return _in_order(chosen, keys)


def _in_order(chosen: IntArray, keys: npt.NDArray[np.floating[Any]]) -> IntArray:
    """Each row of ``chosen`` by falling key, and by number where keys are equal."""
    chosen = np.sort(chosen, axis=1)
    order = np.argsort(-np.take_along_axis(keys, chosen, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(chosen, order, axis=1), dtype=np.int64)


def check(router: Router, experts: int, top_k: int, bias: tuple[int, ...] | None = None) -> None:
    """Raise ValueError where a router, the numbers of its experts and the shape of its bias do not fit together."""
    by_itself = router.kind in ("hash", "expert_choice")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k = {top_k} is not between 1 and the {experts} experts")
    if router.kind == "switch" and top_k != 1:
        raise ValueError(f"a switch router chooses one expert, not top_k = {top_k} (arXiv 2101.03961)")
    if router.branching is not None and router.kind not in ("softmax", "noisy_top_k"):
        raise ValueError(f"branching: two-level gating is for softmax and noisy_top_k routers, not {router.kind}")
    if (bias is not None or router.group_limit is not None) and (by_itself or router.branching is not None):
        what = router.kind if by_itself else "two-level gating"
        raise ValueError(f"a selection bias or a group_limit has no effect on {what}")
    if bias is not None and bias != (experts,):
        raise ValueError(f"bias must have one value for each of the {experts} experts")
    if router.second_choice == "random" and (by_itself or top_k != 2):
        raise ValueError("second_choice: random is for routers by which a token chooses top_k = 2 experts")
    _check_groups(router, experts, top_k)


def _check_groups(router: Router, experts: int, top_k: int) -> None:
    limit, branching, each = router.group_limit, router.branching, math.isqrt(top_k)
    if limit is not None and limit < router.groups:
        size = _group_size(experts, router.groups, "groups")
        if limit * size < top_k:
            raise ValueError(f"group_limit: {limit} groups of {size} experts cannot hold top_k = {top_k}")
    if branching is not None:
        size = _group_size(experts, branching, "branching")
        if each**2 != top_k or each > min(branching, size):
            raise ValueError(f"branching: top_k = {top_k} is not the square of choices in {branching} groups of {size}")


def _group_size(experts: int, groups: int, field: str) -> int:
    if experts % groups:
        raise ValueError(f"{field}: {experts} experts do not divide into {groups} equal groups")
    return experts // groups


def _weights(router: Router, logits: FloatArray, scores: FloatArray) -> FloatArray:
    """Combine weights [tokens, k] from the selected logits and scores, before scaling."""
    if router.kind == "switch" or (router.weights == "before_top_k" and router.kind != "noisy_top_k"):
        return scores
    # Scores over their sum, from logarithms: for softmax scores this is the softmax over the selected logits.
    return softmax(-np.logaddexp(0.0, -logits) if router.kind == "sigmoid" else logits)


def _limited(router: Router, selection: FloatArray, keys: FloatArray) -> FloatArray:
    """Keys with -inf outside of the token's best groups (arXiv 2405.04434 section 2.2.2, 2412.19437 section 2.1.2)."""
    groups, limit = router.groups, router.group_limit
    if limit is None or limit >= groups:
        return keys
    size = selection.shape[1] // groups
    grouped = selection.reshape(-1, groups, size)
    if router.group_score == "max":
        score = grouped.max(-1)
    else:
        score = np.partition(grouped, max(0, size - 2), axis=-1)[..., -2:].sum(-1)
    allowed = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(allowed, top(score, limit), True, axis=1)
    return np.where(np.repeat(allowed, size, axis=1), keys, -np.inf)


def _second_at_random(
    experts: IntArray, weights: FloatArray, rng: np.random.Generator | None
) -> tuple[IntArray, FloatArray]:
    """Keep the second of two experts with probability min(1, 2 w2 / (w1 + w2)) (GShard, 2006.16668, section 2.2)."""
    if rng is None:
        raise ValueError("second_choice: random needs rng")
    chance = 2.0 * weights[:, 1] / np.maximum(weights.sum(1), 1e-300)
    kept = np.stack([np.ones(len(weights), dtype=bool), rng.random(len(weights)) < chance], axis=1)
    return np.where(kept, experts, -1), np.where(kept, weights, 0.0)


def _two_levels(
    router: Router, branching: int, logits: FloatArray, top_k: int, group_logits: FloatArray | None
) -> Choices:
    """Gate of group times gate in the group, sqrt(k) choices at each level (arXiv 1701.06538, appendix B)."""
    tokens, experts = logits.shape
    size, each = experts // branching, math.isqrt(top_k)
    grouped = logits.reshape(tokens, branching, size)
    first = special.logsumexp(grouped, axis=-1) if group_logits is None else np.asarray(group_logits, dtype=np.float64)
    if first.shape != (tokens, branching):
        raise ValueError(f"group_logits must have the shape [{tokens}, {branching}]")
    scores = (softmax(first)[..., None] * softmax(grouped)).reshape(tokens, experts)
    groups = top(first, each)
    inside = np.take_along_axis(grouped, groups[..., None], axis=1)  # [tokens, sqrt(k), size]
    members = top(inside.reshape(-1, size), each).reshape(tokens, each, each)
    chosen = (groups[..., None] * size + members).reshape(tokens, top_k)
    order = _in_order(chosen, scores)
    gates = scores
    if router.kind == "noisy_top_k" or router.weights == "after_top_k":  # softmax over the kept ones, at each level
        outer = softmax(np.take_along_axis(first, groups, axis=1))[..., None]
        kept = outer * softmax(np.take_along_axis(inside, members, axis=2))
        gates = np.zeros_like(scores)
        np.put_along_axis(gates, chosen, kept.reshape(tokens, top_k), axis=1)
    weights = np.take_along_axis(gates, order, axis=1)
    if router.weights == "renormalized":
        weights = weights / weights.sum(1, keepdims=True)
    return Choices(order, weights * router.scaling, scores)


def tokens_taken(tokens: int, top_k: int, experts: int) -> int:
    """Tokens that each expert takes in expert choice: tokens x k / experts, rounded."""
    return min(tokens, math.floor(tokens * top_k / experts + 0.5))


def _by_expert(router: Router, logits: FloatArray, top_k: int) -> Choices:
    """Each expert takes its best tokens x k / experts tokens by softmax over the experts (arXiv 2202.09368, 3.2)."""
    scores = softmax(logits)
    tokens, experts = scores.shape
    takes = tokens_taken(tokens, top_k, experts)
    total = logits.max(1) - np.log(scores.max(1))  # logarithm of the sum of exponentials
    keys = np.ascontiguousarray((logits.T - total).round(9))  # log scores; tokens that differ in the last bits tie
    taken = np.zeros((tokens, experts), dtype=bool)
    taken[top(keys, takes), np.arange(experts)[:, None]] = True
    held = taken.sum(1)
    place = np.arange(held.max(initial=0)) < held[:, None]  # [tokens, k]: as many places as the token has experts
    chosen, order, weights = np.full(place.shape, -1), np.full(place.shape, np.inf), np.zeros(place.shape)
    chosen[place], order[place], weights[place] = np.nonzero(taken)[1], -logits[taken], scores[taken]
    falling = np.argsort(order, axis=1, kind="stable")
    chosen, weights = np.take_along_axis(chosen, falling, axis=1), np.take_along_axis(weights, falling, axis=1)
    return Choices(chosen, weights * router.scaling, scores)


def hash_table(runs: int, experts: int) -> IntArray:
    """The table of all hash routers [runs, experts], for token ids up to runs x experts.

    Every run of ``experts`` consecutive ids is a random permutation of the experts, so that the table is balanced; a
    token's further experts are the next ones of its permutation. More runs continue the same table.
    """
    return np.argsort(np.random.default_rng(HASH_SEED).random((runs, experts)), axis=1)


def _by_token_id(router: Router, shape: tuple[int, ...], top_k: int, token_ids: IntArray | None) -> Choices:
    """Experts by a fixed random table of token ids: :func:`hash_table` (arXiv 2106.04426)."""
    if token_ids is None:
        raise ValueError("a hash router needs token_ids [tokens]")
    tokens, experts = shape
    ids = np.asarray(token_ids)
    if ids.shape != (tokens,) or (ids < 0).any():
        raise ValueError(f"token_ids must be {tokens} numbers of zero or more")
    runs = int(ids.max(initial=0)) // experts + 1
    table = hash_table(runs, experts)
    places = (ids[:, None] % experts + np.arange(top_k)) % experts
    chosen = table[ids[:, None] // experts, places].astype(np.int64)
    scores = np.zeros((tokens, experts))
    np.put_along_axis(scores, chosen, 1.0 / top_k, axis=1)
    return Choices(chosen, np.full(chosen.shape, router.scaling), scores)


__all__ = ["HASH_SEED", "Choices", "check", "choose", "hash_table", "noisy", "softmax", "tokens_taken", "top"]
