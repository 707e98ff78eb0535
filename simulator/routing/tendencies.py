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

A hash router has no logits: a table says which experts a token id has, and Zipf's law how often that id comes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from simulator.routing.chances import chances_of, logits_of, smoothed
from simulator.routing.load import FloatArray, in_proportion, threshold_inclusion
from simulator.routing.routers import hash_table
from simulator.spec.model import Router
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
    ``identity`` [layers, HEAD, experts]: preferences of the most frequent token ids, sigma_tok included. ``softmax``:
    whether a selection bias meets softmax scores or sigmoids.
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
    softmax: bool = False

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
            return chances_of(logits, self.top_k, bias, softmax=self.softmax)
        return _sharing_the_rest(logits, self.pinned, chances_of(self.logits, self.top_k), self.top_k)


def draw_tendencies(
    load: Load, layers: int, experts: int, top_k: int, rng: np.random.Generator, router: Router | None = None
) -> Tendencies:
    """Draw the preferences of ``layers`` MoE layers; a hash router's are those of its table, whatever the load."""
    if router is not None and router.kind == "hash":
        logits = logits_of(hashed(experts, top_k), top_k)
        return Tendencies(np.broadcast_to(logits - logits.mean(), (layers, experts)).copy(), top_k)
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


def hashed(experts: int, top_k: int) -> FloatArray:
    """Chances of the experts of a hash router [experts]: the frequencies of the token ids that its table gives them."""
    runs = -(-VOCABULARY // experts)
    table = hash_table(runs, experts)
    shares = np.zeros(runs * experts)
    shares[:VOCABULARY] = 1.0 / np.arange(1, VOCABULARY + 1)
    shares = (shares / shares.sum()).reshape(runs, experts)
    return np.asarray(
        sum(np.bincount(np.roll(table, -choice, 1).ravel(), shares.ravel(), experts) for choice in range(top_k))
    )


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
    "draw_tendencies",
    "frequencies",
    "hashed",
    "mixed_domain",
]
