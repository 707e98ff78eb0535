"""Routing token by token: blocks of tokens with their noisy logits and choices.

Counts (:mod:`simulator.routing.load`) are thousands of times faster and are what a scenario uses; a block answers what
counts cannot: which experts one token chooses together (distinct nodes, tokens that lose all their experts) and how
neighbouring tokens follow each other. It is also the reference against which the counts are tested.

Along a sequence the noise of an expert is an AR(1) process z_t = rho z_(t-1) + sqrt(1 - rho^2) e_t in Gaussian units,
mapped to Gumbel noise; with probability q a token repeats the first choice of the token before it. Both together
reproduce how often Mixtral's neighbouring tokens share experts (arXiv 2401.04088, Table 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr

from simulator.routing.load import FloatArray, IntArray
from simulator.routing.routers import choose, top
from simulator.routing.tendencies import HEAD, VOCABULARY, Tendencies
from simulator.spec.model import Router

_LAGS = 64


@dataclass(frozen=True)
class Block:
    """Tokens of one layer: their noisy logits [tokens, experts] (without bias) and token ids [tokens]."""

    logits: npt.NDArray[np.floating[Any]]
    ids: IntArray | None

    def picks(self, router: Router, top_k: int, bias: FloatArray | None = None) -> IntArray:
        """Experts of every token [tokens, k], by the model's router.

        The noise stands for the tokens, so that a noisy router adds none of its own; -1 where there is no choice.
        """
        limit = {"groups": router.groups, "group_limit": router.group_limit, "group_score": router.group_score}
        if bias is None and router.group_limit is None and router.branching is None:
            return top(self.logits, top_k)  # whatever the scores, they have the order of the logits
        if router.branching is not None and bias is None:
            return choose(Router(branching=router.branching), self.logits.astype(np.float64), top_k).experts
        kind = "sigmoid" if router.kind == "sigmoid" else "softmax"
        return choose(
            Router.model_validate({"kind": kind, **limit}), self.logits.astype(np.float64), top_k, bias=bias
        ).experts


def block(
    tendencies: Tendencies,
    layer: int,
    tokens: int,
    rng: np.random.Generator,
    *,
    document_tokens: int | None = None,
) -> Block:
    """Draw the tokens of one layer; documents of ``document_tokens`` tokens follow each other (default: one)."""
    each = document_tokens or tokens
    document = np.arange(tokens) // each
    logits = np.asarray(tendencies.logits[layer], dtype=np.float32)
    if tendencies.domain:
        moved = tendencies.domain * rng.standard_normal((int(document[-1]) + 1, tendencies.experts))
        if tendencies.pinned is not None:
            moved = np.where(tendencies.pinned[layer], 0.0, moved)
        values = logits + moved.astype(np.float32)[document]
    else:
        values = np.broadcast_to(logits, (tokens, tendencies.experts)).copy()
    ids = None
    if tendencies.identity is not None and tendencies.shift is not None:
        ids = token_ids(tokens, rng)
        values += _identity(tendencies, layer, ids, rng) - tendencies.shift[layer].astype(np.float32)
    values += gumbel(tokens, tendencies.experts, tendencies.context_correlation, each, rng)
    if tendencies.sticky:
        _stick(values, tendencies.sticky, each, rng)
    return Block(values, ids)


def gumbel(
    tokens: int, experts: int, correlation: float, document_tokens: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Gumbel noise [tokens, experts], correlated between neighbouring tokens of a document."""
    if not correlation:
        noise = rng.standard_exponential((tokens, experts), dtype=np.float32)
        return np.asarray(-np.log(np.maximum(noise, 1e-30)))
    steps = np.sqrt(1.0 - correlation**2) * rng.standard_normal((tokens, experts))
    for token in range(tokens):
        if token % document_tokens:
            steps[token] += correlation * steps[token - 1]
        else:  # the first of a document follows nothing
            steps[token] /= np.sqrt(1.0 - correlation**2)
    return np.asarray(-np.log(-log_ndtr(steps)), dtype=np.float32)


def token_ids(tokens: int, rng: np.random.Generator) -> IntArray:
    """Token ids by Zipf's law; the most frequent is 0."""
    edges = np.cumsum(1.0 / np.arange(1, VOCABULARY + 1))
    return np.asarray(np.searchsorted(edges, rng.random(tokens) * edges[-1]), dtype=np.int64)


def dispersion(tendencies: Tendencies, rng: np.random.Generator, tokens: int = 8192) -> float:
    """Variance of an expert's count over that of independent tokens: 1 + 2 x the autocorrelations of its choice."""
    if not (tendencies.context_correlation or tendencies.sticky):
        return 1.0
    plain = Tendencies(
        tendencies.logits[:1],
        tendencies.top_k,
        context_correlation=tendencies.context_correlation,
        sticky=tendencies.sticky,
    )
    picks = block(plain, 0, tokens, rng).picks(Router(), tendencies.top_k)
    chosen = np.zeros((tokens, tendencies.experts))
    np.put_along_axis(chosen, picks, 1.0, axis=-1)
    chosen -= chosen.mean(0)
    variance = np.square(chosen).sum()
    if variance == 0.0:  # every token uses every expert
        return 1.0
    shared = [float((chosen[lag:] * chosen[:-lag]).sum() / variance) for lag in range(1, _LAGS)]
    last = next((lag for lag, value in enumerate(shared) if abs(value) < 2.0 / np.sqrt(chosen.size)), _LAGS)
    return max(0.1, 1.0 + 2.0 * sum(shared[:last]))


def repetition(picks: IntArray) -> tuple[float, float]:
    """Shares of neighbouring tokens with the same first choice, and with a common one among their first two."""
    first = float((picks[1:, 0] == picks[:-1, 0]).mean())
    pairs = picks[1:, :2, None] == picks[:-1, None, :2]
    return first, float(pairs.any((1, 2)).mean())


def overlap(correlation: float, experts: int, top_k: int, rng: np.random.Generator, tokens: int = 20_000) -> float:
    """Share of top-k choices that stay the same between two routers whose logits have a correlation.

    The logits of a trained router vary over tokens as a normal distribution. OLMoE's choices at 1 % of training agree
    with the final ones by about 60 %, those at 40 % by about 80 % (arXiv 2409.02060, Figure 20).
    """
    final = rng.standard_normal((tokens, experts), dtype=np.float32)
    noise = rng.standard_normal((tokens, experts), dtype=np.float32)
    early = np.float32(correlation) * final + np.float32(np.sqrt(1.0 - correlation**2)) * noise
    chosen = np.zeros((2, tokens, experts), dtype=bool)
    for index, logits in enumerate((final, early)):
        picks = np.argpartition(-logits, top_k - 1, axis=-1)[:, :top_k]
        np.put_along_axis(chosen[index], picks, True, axis=-1)
    return float((chosen[0] & chosen[1]).sum() / (tokens * top_k))


def map_correlation(progress: float) -> float:
    """Correlation of a router's logits with its final ones after a share of training: 1 + 0.041 ln(progress).

    One number for both published points: 0.81 at 1 % and 0.96 at 40 % (OLMoE, see :func:`overlap`).

    >>> round(map_correlation(0.01), 2), round(map_correlation(0.4), 2), map_correlation(1.0)
    (0.81, 0.96, 1.0)
    """
    return max(0.0, 1.0 + 0.041 * float(np.log(max(progress, 1e-9))))


def _identity(tendencies: Tendencies, layer: int, ids: IntArray, rng: np.random.Generator) -> FloatArray:
    """Preferences of each token's id [tokens, experts]; the rare ids are drawn as they appear."""
    assert tendencies.identity is not None
    rare = np.unique(ids[ids >= HEAD])
    drawn = tendencies.token * rng.standard_normal((len(rare), tendencies.experts))
    table = np.concatenate([tendencies.identity[layer], drawn]).astype(np.float32)
    position = np.where(ids < HEAD, ids, HEAD + np.searchsorted(rare, ids))
    return np.asarray(table[position])


def _stick(values: npt.NDArray[np.float32], probability: float, document_tokens: int, rng: np.random.Generator) -> None:
    """Lift the previous token's first choice to the top of the tokens that stick to it."""
    tokens = len(values)
    stuck = rng.random(tokens) < probability
    stuck[::document_tokens] = False
    source = np.maximum.accumulate(np.where(stuck, 0, np.arange(tokens)))
    first = values.argmax(-1)[source[stuck]]
    values[np.flatnonzero(stuck), first] = values[stuck].max(-1) + 1.0


__all__ = ["Block", "block", "dispersion", "gumbel", "map_correlation", "overlap", "repetition", "token_ids"]
