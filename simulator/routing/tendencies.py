"""What a router does by itself: how much it likes each expert in each layer, for each document and token.

Logit of expert e for token t with token id v in document d:

    l_te = sigma_pop a_e + sigma_dom D_de + sigma_tok V_ve + G_te,      a, D, V ~ N(0, 1),  G ~ Gumbel(0, 1)

The Gumbel noise sets the unit: top-k of the noisy logits is sampling without replacement with weights softmax(logits).
Popularity a is fixed per layer; V is fixed per layer and token id, with token frequencies after Zipf (f_v ~ 1 / v); D
is drawn for every document. For counts, document and token effects are folded into one logit per expert:

* n documents in a microbatch average out: sigma_dom becomes the sigma whose CV^2 is the n-th part (variance law), and
  what is averaged away acts as noise of single tokens;
* a token id that is a large share of the text carries its experts with it: the chances of the most frequent ids are
  averaged with their frequencies and written back as popularity.

Independent Gaussian noise of single tokens on top of the Gumbel noise evens the chances out: :func:`smoothed`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from simulator.routing.load import FloatArray, biased_inclusion, in_proportion, inclusion, threshold_inclusion
from simulator.spec.routing import DirichletLoad, HotExperts, Load, LogitLoad

HEAD = 256
"""Token ids whose preferences are drawn one by one; the rest of the vocabulary is averaged."""
VOCABULARY = 32_768
_SAMPLES = 64


@dataclass(frozen=True)
class Tendencies:
    """Expert preferences of the layers of one stack.

    ``logits`` [layers, experts]: popularity, with what the token ids add to it (``shift`` alone [layers, experts]).
    ``pinned`` [layers, experts]: hot experts, which documents do not move. ``domain``: sigma_dom of one document;
    ``identity`` [layers, HEAD, experts]: preferences of the most frequent token ids, sigma_tok included.
    """

    logits: FloatArray
    top_k: int
    domain: float = 0.0
    shift: FloatArray | None = None
    pinned: npt.NDArray[np.bool_] | None = None
    identity: FloatArray | None = None
    token: float = 0.0
    context_correlation: float = 0.0
    sticky: float = 0.0

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.logits.shape[-1])

    @property
    def even(self) -> bool:
        """Whether every token likes every expert alike."""
        return not (self.logits.any() or self.domain or self.token or self.context_correlation or self.sticky)

    def document_logits(self, draws: int, documents: float, rng: np.random.Generator) -> FloatArray:
        """Logits of ``draws`` microbatches that mix ``documents`` documents each [draws or 1, layers, experts]."""
        if not self.domain:
            return self.logits[None]
        sigma = mixed_domain(self.domain, documents, self.experts, self.top_k)
        noise = sigma * rng.standard_normal((draws, *self.logits.shape))
        if self.pinned is not None:
            noise = np.where(self.pinned, 0.0, noise)
        return np.asarray(smoothed(self.logits, self.domain**2 - sigma**2, self.top_k) + noise)

    def chances(
        self, draws: int, documents: float, rng: np.random.Generator, bias: FloatArray | None = None
    ) -> FloatArray:
        """Probability that a token of a microbatch chooses an expert [draws or 1, layers, experts]; rows sum to k."""
        logits = self.document_logits(draws, documents, rng)
        if self.pinned is None or not self.domain or bias is not None:
            return chances_of(logits, self.top_k, bias)
        return _sharing_the_rest(logits, self.pinned, chances_of(self.logits, self.top_k), self.top_k)


def draw_tendencies(load: Load, layers: int, experts: int, top_k: int, rng: np.random.Generator) -> Tendencies:
    """Draw the preferences of ``layers`` MoE layers."""
    if isinstance(load, DirichletLoad):
        shares = rng.dirichlet(np.full(experts, load.concentration), size=layers).clip(1e-12)
        chances = in_proportion(shares, 10**9, top_k) / 1e9  # what an expert cannot take beyond 1 goes to the others
        return Tendencies(logits_of(chances, top_k), top_k)
    if not isinstance(load, LogitLoad):
        return Tendencies(np.zeros((layers, experts)), top_k)
    logits = load.population * rng.standard_normal((layers, experts))
    result = Tendencies(
        logits,
        top_k,
        domain=load.domain,
        token=load.token,
        context_correlation=load.context_correlation,
        sticky=load.sticky,
    )
    if load.token:
        result = _with_identity(result, rng)
    return _with_hot(result, load.hot_experts, rng) if load.hot_experts is not None else result


def chances_of(logits: FloatArray, top_k: int, bias: FloatArray | None = None) -> FloatArray:
    """Probability that an expert is among the k choices [..., experts], with or without a selection bias."""
    if bias is not None:
        return biased_inclusion(logits, bias, top_k)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return inclusion((weights / weights.sum(-1, keepdims=True)).clip(1e-12), top_k)


def logits_of(chances: FloatArray, top_k: int) -> FloatArray:
    """Logits that lead to given chances [..., experts]: the inverse of :func:`chances_of`, up to a constant.

    >>> logits = logits_of(np.array([0.9, 0.5, 0.3, 0.3]), 2)
    >>> chances_of(logits, 2).round(6).tolist()
    [0.9, 0.5, 0.3, 0.3]
    """
    chances = np.clip(chances, 1e-12, 1.0 - 1e-9)
    logits = np.log(chances) if top_k == 1 else np.log(-np.log1p(-chances))
    if top_k == 2:  # the exact chances of two choices have no closed inverse
        for _ in range(200):
            found = chances_of(logits, top_k).clip(1e-12, 1.0 - 1e-9)
            step = np.log(chances / found) - np.log((1.0 - chances) / (1.0 - found))
            logits = np.clip(logits + 0.7 * step, -60.0, 60.0)
            if np.abs(step).max() < 1e-9:
                break
    return np.asarray(logits)


def smoothed(logits: FloatArray, variance: float, top_k: int) -> FloatArray:
    """Logits with the chances that ``logits`` have when each token adds Gaussian noise of a variance to them.

    pi_e = E[1 - exp(-w_e t exp(noise))], t solved as in :mod:`simulator.routing.load`, the mean by quadrature.

    >>> smoothed(np.array([0.0, 2.0, 0.0, -2.0]), 1.0, 1).round(2).tolist()
    [0.07, 1.67, 0.07, -1.81]
    """
    experts = logits.shape[-1]
    if variance <= 0.0 or top_k >= experts:
        return logits
    nodes, parts = np.polynomial.hermite_e.hermegauss(16)
    parts /= parts.sum()
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[..., None] * np.exp(np.sqrt(variance) * nodes)
    t = np.full((*logits.shape[:-1], 1), -experts * np.log1p(-top_k / experts) * np.exp(-0.5 * variance))
    for _ in range(60):  # Newton from the left, as for the chances without noise
        survive = np.exp(-weights * t[..., None])
        gap = experts - top_k - (survive @ parts).sum(-1, keepdims=True)
        t = np.maximum(t - gap / ((weights * survive) @ parts).sum(-1, keepdims=True), 0.5 * t)
        if np.abs(gap).max() < 1e-9:
            break
    passing = 1.0 - np.exp(-weights * t[..., None]) @ parts
    result = np.log(-np.log1p(-np.clip(passing, 1e-12, 1.0 - 1e-9)))
    return np.asarray(result + (logits - result).mean(-1, keepdims=True))


def mixed_domain(domain: float, documents: float, experts: int, top_k: int) -> float:
    """Sigma of a mixture of documents: the one with CV^2(load) = CV^2(load of one document) / documents."""
    if documents <= 1.0 or not domain:
        return domain
    noise = np.random.default_rng(1).standard_normal((_SAMPLES, experts))

    def spread(sigma: float) -> float:
        return float(np.square(chances_of(sigma * noise, top_k) * experts / top_k - 1.0).mean())

    target, low, high = spread(domain) / documents, 0.0, domain
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if spread(middle) < target else (low, middle)
    return 0.5 * (low + high)


def frequencies() -> tuple[FloatArray, float]:
    """Zipf's law: shares of the :data:`HEAD` most frequent token ids, and of all others together."""
    ranks = np.arange(1, VOCABULARY + 1)
    shares = 1.0 / ranks / np.sum(1.0 / ranks)
    return shares[:HEAD], float(shares[HEAD:].sum())


def _with_identity(plain: Tendencies, rng: np.random.Generator) -> Tendencies:
    """Draw the preferences of the frequent token ids, and add to popularity what they do to the mean."""
    layers, experts = plain.logits.shape
    identity = plain.token * rng.standard_normal((layers, HEAD, experts))
    head, rest = frequencies()
    chances = rest * chances_of(smoothed(plain.logits, plain.token**2, plain.top_k), plain.top_k)
    for layer in range(layers):
        chances[layer] += head @ chances_of(plain.logits[layer] + identity[layer], plain.top_k)
    logits = logits_of(chances, plain.top_k)
    logits -= logits.mean(-1, keepdims=True)
    return replace(plain, logits=logits, shift=logits - plain.logits, identity=identity)


def _with_hot(plain: Tendencies, hot: HotExperts, rng: np.random.Generator) -> Tendencies:
    """Give some experts of each layer a fixed multiple of the mean load; the others share the rest as before."""
    layers, experts = plain.logits.shape
    count, top_k = min(hot.count, experts - 1), plain.top_k
    if top_k >= experts:  # every token chooses them all
        return plain
    order = np.argsort(rng.random((layers, experts)), axis=-1)
    pinned = np.zeros((layers, experts), dtype=bool)
    np.put_along_axis(pinned, order[:, :count], True, axis=-1)
    chance = min(hot.load * top_k / experts, (top_k - 1e-6) / count, 1.0 - 1e-6)
    chance = max(chance, (top_k - experts + count + 1e-6) / count)  # the others cannot have more than all tokens either
    logits = logits_of(_sharing_the_rest(plain.logits, pinned, np.full((layers, experts), chance), top_k), top_k)
    return replace(plain, logits=logits - logits.mean(-1, keepdims=True), pinned=pinned)


def _sharing_the_rest(logits: FloatArray, pinned: npt.NDArray[np.bool_], chances: FloatArray, top_k: int) -> FloatArray:
    """Chances of pinned experts as they are given; the others share what is left after their logits."""
    held = np.where(pinned, chances, 0.0)
    rest = top_k - held.sum(-1, keepdims=True)
    open_ = np.where(pinned, -np.inf, logits)
    weights = np.exp(open_ - open_.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.asarray(held + (weights * rest if top_k == 1 else threshold_inclusion(weights, rest)))


__all__ = [
    "HEAD",
    "Tendencies",
    "chances_of",
    "draw_tendencies",
    "frequencies",
    "logits_of",
    "mixed_domain",
    "smoothed",
]
