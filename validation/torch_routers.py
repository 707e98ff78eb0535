"""The routers of :mod:`simulator.routing.routers` in PyTorch: the same choices, and weights with gradients.

Choosing experts is discrete and has no gradient; what is learnt flows through the combine weights and the losses. So a
router selects first, without gradients, and then forms the weights of the selected experts from their logits. Selection
is by falling score, of equal scores the lower expert number wins, as in the simulator. Where a selection key must be
computed (a bias, limited groups, two levels, experts that choose), it is computed in float64, as the simulator does:
the same logits then choose the same experts, in whatever format they come.

Randomness is drawn beforehand (:func:`draw`), so that a choice is a function of its inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from simulator.routing.routers import check, hash_table, tokens_taken
from simulator.spec.model import Router


@dataclass(frozen=True)
class Choices:
    """What a router decides for every token, in the layout of :class:`simulator.routing.routers.Choices`.

    ``experts`` [tokens, k]: chosen experts in falling order of selection score, -1 = no expert. ``weights``
    [tokens, k]: factors on the experts' outputs, 0 where there is no expert. ``scores`` [tokens, experts]: affinities
    before any selection bias. Weights and scores carry gradients to the logits, except for a hash router.
    """

    experts: Tensor
    weights: Tensor
    scores: Tensor

    @property
    def counts(self) -> Tensor:
        """Assignments of each expert [experts]."""
        return counted(self.experts, self.scores.shape[1])


@dataclass(frozen=True)
class Draws:
    """Random numbers of a router.

    ``normal`` [tokens, experts] and, for the first of two levels, ``group_normal`` [tokens, branching] are the noise of
    noisy top-k; ``uniform`` [tokens] in [0, 1) decides over second choices.
    """

    normal: Tensor | None = None
    group_normal: Tensor | None = None
    uniform: Tensor | None = None


def draw(router: Router, logits: Tensor, generator: torch.Generator | None = None, *, noise: bool = True) -> Draws:
    """Draw what the router needs for logits [tokens, experts]; ``noise=False`` evaluates noisy top-k without noise."""
    (tokens, experts), like = logits.shape, {"dtype": logits.dtype, "device": logits.device}

    def normal(width: int | None) -> Tensor | None:
        wanted = noise and router.kind == "noisy_top_k" and width is not None
        return torch.randn(tokens, width, generator=generator, **like) if wanted else None

    uniform = torch.rand(tokens, generator=generator, **like) if router.second_choice == "random" else None
    return Draws(normal(experts), normal(router.branching), uniform)


def choose(
    router: Router,
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    group_logits: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Choices:
    """Let every token (or, in expert choice, every expert) choose from ``logits`` [tokens, experts].

    ``bias`` [experts] is added to the scores for the selection only. ``group_logits`` [tokens, branching] is the first
    level of two-level gating, by default the logsumexp of each group. ``token_ids`` [tokens] is what a hash router
    looks up in ``table`` [runs, experts], by default :func:`simulator.routing.routers.hash_table`. ``uniform`` [tokens]
    decides over random second choices. The logits of noisy top-k come with their noise: :func:`noisy`.

    Raises:
        ValueError: an input that this router needs is missing, or its numbers do not fit together.
    """
    check(router, logits.shape[1], top_k, None if bias is None else tuple(bias.shape))
    if router.kind == "hash":
        return _by_token_id(router, logits, top_k, token_ids, table)
    if router.kind == "expert_choice":
        return _by_expert(router, logits, top_k)
    if router.branching is not None:
        return _two_levels(router, router.branching, logits, top_k, group_logits)
    scores = logits.sigmoid() if router.kind == "sigmoid" else logits.softmax(-1)
    with torch.no_grad():
        experts = top(_keys(router, logits, bias), top_k)
    weights = _weights(router, logits.gather(1, experts), scores.gather(1, experts))
    if router.second_choice == "random":
        experts, weights = _second_at_random(experts, weights, uniform)
    return Choices(experts, weights * router.scaling, scores)


def noisy(logits: Tensor, noise_logits: Tensor, normal: Tensor) -> Tensor:
    """Noisy logits H = x + N(0, 1) softplus(n), all [tokens, experts] (arXiv 1701.06538, section 2.1)."""
    return logits + normal * functional.softplus(noise_logits)


def top(keys: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` largest keys of each row [rows, count], in falling order; ties: the lower position.

    ``torch.topk`` leaves open which of equal keys it takes; rows in which that matters are sorted instead.
    """
    if count == 0:
        return torch.empty(len(keys), 0, dtype=torch.int64, device=keys.device)
    values, chosen = keys.topk(count, dim=1, sorted=False)
    tied = (keys >= values.amin(1, keepdim=True)).sum(1) > count
    if bool(tied.any()):
        chosen[tied] = keys[tied].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return _in_order(chosen, keys)


def counted(experts: Tensor, total: int) -> Tensor:
    """How often each of ``total`` experts occurs in numbers of which -1 is no expert [total]."""
    flat = torch.where(experts < 0, total, experts).flatten()
    return flat.new_zeros(total + 1).index_add(0, flat, torch.ones_like(flat))[:total]


def _in_order(chosen: Tensor, keys: Tensor) -> Tensor:
    """Each row of ``chosen`` by falling key, and by number where keys are equal."""
    chosen = chosen.sort(dim=1).values
    return chosen.gather(1, keys.gather(1, chosen).sort(dim=1, descending=True, stable=True).indices)


def _keys(router: Router, logits: Tensor, bias: Tensor | None) -> Tensor:
    """What the selection sorts by [tokens, experts]; -inf outside of the token's best groups.

    Without a bias these are the logits, which have the order of their scores, without ties by rounding.
    """
    limit = router.group_limit if (router.group_limit or router.groups) < router.groups else None
    if bias is None and limit is None:
        return logits
    exact = logits.double()
    selection = exact.sigmoid() if router.kind == "sigmoid" else exact.softmax(-1)
    if bias is not None:
        selection = selection + bias
    keys = exact if bias is None else selection
    if limit is None:
        return keys
    grouped = selection.unflatten(1, (router.groups, -1))
    best = 1 if router.group_score == "max" else min(2, grouped.shape[-1])
    groups = top(grouped.topk(best, dim=-1).values.sum(-1), limit)
    barred = torch.ones(grouped.shape[:2], dtype=torch.bool, device=keys.device).scatter(1, groups, False)
    return keys.masked_fill(barred.repeat_interleave(grouped.shape[-1], dim=1), -math.inf)


def _weights(router: Router, logits: Tensor, scores: Tensor) -> Tensor:
    """Combine weights [tokens, k] from the selected logits and scores, before scaling."""
    if router.kind == "switch" or (router.weights == "before_top_k" and router.kind != "noisy_top_k"):
        return scores
    # Scores over their sum, from logarithms: for softmax scores this is the softmax over the selected logits.
    return (functional.logsigmoid(logits) if router.kind == "sigmoid" else logits).softmax(-1)


def _second_at_random(experts: Tensor, weights: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keep the second of two experts with probability min(1, 2 w2 / (w1 + w2)) (GShard, 2006.16668, section 2.2)."""
    if uniform is None:
        raise ValueError("second_choice: random needs uniform [tokens]")
    chance = 2.0 * weights[:, 1] / weights.sum(1).clamp_min(torch.finfo(weights.dtype).tiny)
    kept = torch.stack([torch.ones_like(uniform, dtype=torch.bool), uniform < chance], dim=1)
    return experts.masked_fill(~kept, -1), weights.masked_fill(~kept, 0.0)


def _two_levels(router: Router, branching: int, logits: Tensor, top_k: int, group_logits: Tensor | None) -> Choices:
    """Gate of group times gate in the group, sqrt(k) choices at each level (arXiv 1701.06538, appendix B)."""
    tokens, each = len(logits), math.isqrt(top_k)
    grouped = logits.unflatten(1, (branching, -1))
    size = grouped.shape[-1]
    if group_logits is not None and group_logits.shape != (tokens, branching):
        raise ValueError(f"group_logits must have the shape [{tokens}, {branching}]")

    def gates(first: Tensor, second: Tensor) -> Tensor:
        return first.softmax(-1)[..., None] * second.softmax(-1)

    first = grouped.logsumexp(-1) if group_logits is None else group_logits
    scores = gates(first, grouped).flatten(1)
    with torch.no_grad():
        exact = grouped.double()
        level = exact.logsumexp(-1) if group_logits is None else group_logits.double()
        groups = top(level, each)
        inside = exact.gather(1, groups[..., None].expand(-1, -1, size))  # [tokens, sqrt(k), size]
        members = top(inside.flatten(0, 1), each).unflatten(0, (tokens, each))
        chosen = (groups[..., None] * size + members).flatten(1)
        experts = _in_order(chosen, gates(level, exact).flatten(1))
    if router.kind == "noisy_top_k" or router.weights == "after_top_k":  # softmax over the kept ones, at each level
        kept = gates(first.gather(1, groups), logits.gather(1, chosen).unflatten(1, (each, each))).flatten(1)
        weights = torch.zeros_like(scores).scatter(1, chosen, kept).gather(1, experts)
    else:
        weights = scores.gather(1, experts)
    if router.weights == "renormalized":
        weights = weights / weights.sum(1, keepdim=True)
    return Choices(experts, weights * router.scaling, scores)


def _by_expert(router: Router, logits: Tensor, top_k: int) -> Choices:
    """Each expert takes its best tokens x k / experts tokens by softmax over the experts (arXiv 2202.09368, 3.2)."""
    scores = logits.softmax(-1)
    tokens, experts = scores.shape
    with torch.no_grad():
        # Logarithms of the scores; tokens that differ in the last bits tie.
        keys = logits.double().log_softmax(-1).t().contiguous().round(decimals=9)
        taken = torch.zeros(tokens, experts, dtype=torch.bool, device=logits.device)
        taken.t().scatter_(1, top(keys, tokens_taken(tokens, top_k, experts)), True)
        most = int(taken.sum(1).max()) if tokens else 0  # a token has as many places as the best served one needs
        order = top(logits.masked_fill(~taken, -math.inf), most)
        held = taken.gather(1, order)
    weights = scores.gather(1, order).masked_fill(~held, 0.0)
    return Choices(order.masked_fill(~held, -1), weights * router.scaling, scores)


def _by_token_id(router: Router, logits: Tensor, top_k: int, token_ids: Tensor | None, table: Tensor | None) -> Choices:
    """Experts by a fixed random table of token ids (arXiv 2106.04426)."""
    tokens, experts = logits.shape
    if token_ids is None:
        raise ValueError("a hash router needs token_ids [tokens]")
    if token_ids.shape != (tokens,):
        raise ValueError(f"token_ids must be {tokens} numbers of zero or more")
    if table is None:
        runs = int(token_ids.max()) // experts + 1 if tokens else 1
        table = torch.from_numpy(hash_table(runs, experts)).to(logits.device)
    ranks = torch.arange(top_k, device=logits.device)
    chosen = table[(token_ids // experts)[:, None], (token_ids[:, None] % experts + ranks) % experts]
    scores = torch.zeros_like(logits).scatter(1, chosen, 1.0 / top_k)
    return Choices(chosen, torch.full_like(chosen, router.scaling, dtype=logits.dtype), scores)


__all__ = ["Choices", "Draws", "choose", "counted", "draw", "noisy", "top"]
