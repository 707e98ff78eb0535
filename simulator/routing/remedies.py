"""What balancing does to the router's tendencies, over the steps of training.

A balancing loss shrinks popularity: sigma -> sigma / (1 + sum_i A_i weight_i^p) over the losses in force. p and the
strengths A are read off published loads (validation/routing/balancing.py fits them again):

* importance and load loss: p = 0.388, A = 18.8 and 80.3, from 1701.06538, Table 6 (untreated: the sigma with its CV
  of 3.01, 1.93 in logit units);
* load-balance loss: A = 109, from MaxVio 0.72 and 0.52 at weight 1e-3 (2408.15664, Table 2); it then gives CV 0.10 at
  Switch's weight of 1e-2, which drops less than 1 % at capacity factor 1.25 as published;
* sequence-wise loss: the same on popularity, and A = 35 on the preferences of documents, from the loads by domain of
  DeepSeek-V3's Appendix C, if their loss had weight 1e-3 (not published);
* device and communication losses (2405.04434) act on the mean popularity of a device's experts, with A = 109: at even
  loads they have the same size as the load-balance loss;
* the router z-loss limits the size of logits and leaves the load as it is.

The bias of DeepSeek-V3 is simulated in closed loop: each step it falls by gamma for experts over the mean load and
rises for those under it (2412.19437, section 2.1.2). Popularity that grows is driven by the loads themselves (favoured
experts learn faster), so that a bias that evens the loads out also slows the growth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from simulator.routing.balance import bias_step, cv
from simulator.routing.load import FloatArray, balancing_bias
from simulator.routing.tendencies import Tendencies, chances_of, mixed_domain, smoothed
from simulator.spec.model import MixtureOfExperts
from simulator.spec.routing import Growth, Remedy

EXPONENT = 0.388
STRENGTH = {"importance": 18.8, "load": 80.3, "load_balance": 109.0, "sequence": 109.0}
SEQUENCE_STRENGTH_ON_DOCUMENTS = 35.0
DEVICE_STRENGTH = 109.0
DEFAULT_WEIGHT = {
    "importance": 0.1,
    "load": 0.1,
    "load_balance": 0.01,
    "z": 0.001,
    "device": 0.05,
    "communication": 0.02,
    "sequence": 0.0001,
}
"""Weights of the papers: 1701.06538 (Table 6), 2101.03961, 2202.08906, 2405.04434 and 2412.19437."""
DEFAULT_GAMMA = 0.001
SETTLING_STEPS = 100
GROWTH_TIMES = 10
"""Time constants of growth after which a biased router counts as settled."""
LONGEST_LOOP = 4000
"""Steps that a bias is followed one by one; later ones start from the bias that balances."""


@dataclass(frozen=True)
class Batch:
    """What one optimizer step shows the balancing mechanisms: tokens, and independent documents among them."""

    tokens: int
    documents: float


@dataclass(frozen=True)
class Treated:
    """Tendencies at one training step under the remedies: shrunk logits, and the selection bias if there is one."""

    step: int | None
    tendencies: Tendencies
    bias: FloatArray | None

    def chances(self, draws: int, documents: float, rng: np.random.Generator) -> FloatArray:
        """Probability that a token of a microbatch chooses an expert [draws or 1, layers, experts]."""
        return self.tendencies.chances(draws, documents, rng, self.bias)


def shrunk(plain: Tendencies, remedies: Sequence[Remedy], devices: int) -> Tendencies:
    """Tendencies under the balancing losses; the bias is not one of them."""
    force = dict.fromkeys(("experts", "devices", "documents"), 0.0)
    for remedy in remedies:
        if remedy.kind == "bias":
            continue
        size = (DEFAULT_WEIGHT[remedy.kind] if remedy.weight is None else remedy.weight) ** EXPONENT
        force["experts"] += STRENGTH.get(remedy.kind, 0.0) * size
        force["devices"] += DEVICE_STRENGTH * size if remedy.kind in ("device", "communication") else 0.0
        force["documents"] += SEQUENCE_STRENGTH_ON_DOCUMENTS * size if remedy.kind == "sequence" else 0.0
    logits = plain.logits
    layers, experts = logits.shape
    if force["devices"] and experts % devices == 0:
        by_device = logits.reshape(layers, devices, -1)
        mean = by_device.mean(-1, keepdims=True)
        logits = (by_device - mean + mean / (1.0 + force["devices"])).reshape(layers, experts)
    logits = logits / (1.0 + force["experts"])
    return replace(plain, logits=logits, domain=plain.domain / (1.0 + force["documents"]))


def grown(growth: Growth | None, step: int | None) -> float:
    """Share of its final popularity that the router has at a step: logistic from growth.start.

    >>> from simulator.spec.routing import Growth
    >>> [round(grown(Growth(start=0.5, steps=10), step), 2) for step in (0, 10, 20)]
    [0.5, 0.73, 0.88]
    """
    if growth is None or step is None:
        return 1.0
    return 1.0 / (1.0 + (1.0 / min(growth.start, 1.0) - 1.0) * float(np.exp(-min(step / growth.steps, 700.0))))


def trajectory(
    plain: Tendencies,
    steps: Sequence[int | None],
    *,
    remedies: Sequence[Remedy],
    moe: MixtureOfExperts,
    batch: Batch,
    growth: Growth | None = None,
    drift: float = 0.0,
    rng: np.random.Generator,
) -> Iterator[Treated]:
    """The tendencies at each of the training steps, in the order given; None stands for the settled state.

    Popularity grows (:func:`grown`; under a bias, slower by CV(load) over CV(load without bias)) and wanders, a <-
    sqrt(1 - drift^2) a + drift xi; the losses shrink it; the bias answers the loads of a global batch.
    """
    gamma = next((DEFAULT_GAMMA if r.gamma is None else r.gamma for r in remedies if r.kind == "bias"), None)
    biased = bool(gamma) and not plain.even
    treated = shrunk(plain, remedies, moe.router.groups)
    world = _World(treated, moe, batch, growth, drift, gamma if biased else None, rng)
    known: dict[int | None, Treated] = {}
    for step in sorted({step for step in steps if step is not None}):
        known[step] = world.at(step)
    if None in steps:
        known[None] = world.settled()
    yield from (known[step] for step in steps)


@dataclass
class _World:
    """Popularity and bias as they evolve."""

    plain: Tendencies
    moe: MixtureOfExperts
    batch: Batch
    growth: Growth | None
    drift: float
    gamma: float | None
    rng: np.random.Generator
    step: int = 0

    def __post_init__(self) -> None:
        plain = self.plain
        self.sigma = plain.logits.std(-1, keepdims=True)
        self.full = plain.logits
        self.share = grown(self.growth, 0)
        self.bias = np.zeros_like(plain.logits)
        self.jitter = mixed_domain(plain.domain, self.batch.documents, plain.experts, plain.top_k)
        self.moves = 0
        self.seen: tuple[float, int, FloatArray] | None = None
        softmax = self.moe.router.kind != "sigmoid"
        # A softmax score e^l / sum is a sigmoid of l minus the log of the others' sum, about log E + log log E here.
        self.offset = np.log(plain.experts) + np.log(np.log(plain.experts) + 1.0) if softmax else 0.0

    def at(self, step: int) -> Treated:
        """Follow the loop to a step."""
        if step - self.step > LONGEST_LOOP:
            self.step = step - LONGEST_LOOP
            if not self.gamma:
                self.share = grown(self.growth, self.step)
            self._balance()
            reach = (self.gamma or 0.0) * self.step  # how far steps of gamma have come by then
            self.bias = np.clip(self.bias, -reach, reach)
        if not self.gamma and not self.drift:
            self.step, self.share = step, grown(self.growth, step)
        while self.step < step:
            self._advance()
        return self._treated(step)

    def settled(self) -> Treated:
        """The state that the loop keeps to: from the balancing bias, a few steps of gamma, noise and drift."""
        if self.growth is None or not self.gamma:
            self.share = 1.0
            self._balance()
        elif self.step < LONGEST_LOOP:
            self.at(min(LONGEST_LOOP, round(GROWTH_TIMES * self.growth.steps)))
        if self.gamma or self.drift:
            for _ in range(SETTLING_STEPS):
                self._advance()
        return self._treated(None)

    def _balance(self) -> None:
        self.bias = balancing_bias(self._of_batch() - self.offset, self.plain.top_k)
        if self.gamma:  # all experts move at every step: two steps of gamma, or four, or none, stay between them
            self.bias = 2.0 * self.gamma * np.round(self.bias / (2.0 * self.gamma))

    def _of_batch(self) -> FloatArray:
        """Logits of a global batch: its many documents are noise of single tokens."""
        if self.seen is None or self.seen[:2] != (self.share, self.moves):
            averaged = self.plain.domain**2 - self.jitter**2
            self.seen = self.share, self.moves, smoothed(self.full * self.share, averaged, self.plain.top_k)
        return self.seen[2]

    def _advance(self) -> None:
        """One optimizer step."""
        drive = 1.0
        if self.gamma:
            logits = self._of_batch()
            if self.jitter:
                logits = logits + self.jitter * self.rng.standard_normal(logits.shape)
            chances = chances_of(logits - self.offset, self.plain.top_k, self.bias)
            counts = self.rng.binomial(self.batch.tokens, np.minimum(chances.round(12), 1.0))
            self.bias = bias_step(self.bias, counts, self.gamma)
            if self.growth is not None:  # experts that are not chosen more do not learn faster
                drive = min(1.0, float(cv(chances).mean() / cv(chances_of(logits, self.plain.top_k)).mean()))
        if self.growth is not None:
            self.share += drive * self.share * (1.0 - self.share) / self.growth.steps
        if self.drift:
            noise = self.rng.standard_normal(self.full.shape)
            self.full = np.sqrt(1.0 - min(self.drift, 1.0) ** 2) * self.full + self.drift * self.sigma * noise
            self.moves += 1
        self.step += 1

    def _treated(self, step: int | None) -> Treated:
        plain = self.plain
        logits = self.full * self.share
        if self.gamma is None:
            return Treated(step, replace(plain, logits=logits), None)
        return Treated(step, replace(plain, logits=logits - self.offset), self.bias)


__all__ = [
    "DEFAULT_GAMMA",
    "DEFAULT_WEIGHT",
    "EXPONENT",
    "STRENGTH",
    "Batch",
    "Treated",
    "grown",
    "shrunk",
    "trajectory",
]
