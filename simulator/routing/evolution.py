"""How a router's popularity and selection bias evolve over the steps of training.

Three things move. Popularity grows, since favoured experts learn faster: its share of the final popularity is logistic
in time, and time counts only as far as loads are uneven, CV(load) over CV(load without the bias). Popularity wanders:
a <- sqrt(1 - drift^2) a + drift xi at each step. The bias of DeepSeek-V3 answers the loads of a global batch: each step
it falls by gamma for experts over the mean load and rises for those under it (2412.19437, section 2.1.2).

A bias balances in some hundred steps what grows and wanders in many thousands. So the loop is followed step by step for
:data:`WALK` steps at a time, and in between the slow things leap while the bias keeps its distance from the one that
balances (coarse projective integration; Gear and Kevrekidis 2003, SIAM J. Sci. Comput. 24). A bias that is still on
its way does not leap: it takes steps of several gamma at once, no coarser than :data:`COARSEST`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import expit

from simulator.routing.balance import bias_step, cv
from simulator.routing.chances import LANDAU, chances_of, others, smoothed
from simulator.routing.load import FloatArray, balancing_bias
from simulator.routing.tendencies import Tendencies, mixed_domain
from simulator.spec.routing import Growth

WALK = 50
"""Steps followed one by one between leaps."""
STRIDE = 0.1
"""Share of itself by which popularity may grow in one leap, and between two shares that are smoothed."""
COARSEST = 1e-3
"""Largest step of a bias that is led to its place by several steps at once, in units of the score."""
LONGEST_WAY = 2.0
"""Way in units of the score, which is 1 at most, after which a bias has arrived wherever it can."""
_ANCHORED = 20


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


def grown(growth: Growth | None, time: float = np.inf) -> float:
    """Share of its final popularity that a router has after a time in steps: logistic from growth.start.

    >>> from simulator.spec.routing import Growth
    >>> [round(grown(Growth(start=0.5, steps=10), step), 2) for step in (0, 10, 20)]
    [0.5, 0.73, 0.88]
    """
    if growth is None or growth.start >= 1.0:
        return 1.0
    return float(expit(np.log(growth.start) - np.log1p(-growth.start) + time / growth.steps))


@dataclass
class World:
    """Popularity and bias at a training step, and their way on; without ``gamma`` there is no bias."""

    plain: Tendencies
    batch: Batch
    growth: Growth | None
    drift: float
    gamma: float
    rng: np.random.Generator
    step: int = 0
    time: float = 0.0  # steps of growth: those of training, each times its drive
    drive: float = 1.0
    ahead: int = 0  # steps of the next leap
    arrived: bool = False
    moves: int = 0
    walk: int = WALK
    nodes: dict[int, tuple[FloatArray, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = self.plain
        self.sigma = plain.logits.std(-1, keepdims=True)
        self.full = self.anchor = plain.logits
        self.bias = np.zeros_like(plain.logits)
        if self.drift and self.gamma:  # the bias lags behind: it takes a while until a leap is forgotten
            self.walk = 10 * WALK
        self.jitter = mixed_domain(plain.domain, self.batch.documents, plain.experts, plain.top_k)

    @property
    def share(self) -> float:
        """Share of its final popularity that the router has."""
        return grown(self.growth, self.time)

    def at(self, step: int) -> Treated:
        """The state at a step. Walks and leaps until there do not depend on it, only the last ones are cut short."""
        while self.step + self.ahead + self.walk <= step:
            self._leap(self.ahead)
            self._walk()
        last = deepcopy(self)
        last._leap(min(last.ahead, max(0, step - last.step - last.walk)))
        while last.step < step:
            last._advance()
        return last._treated(step)

    def settled(self) -> Treated:
        """The state that the loop keeps to: all of popularity, and the balancing bias with the noise of the loop."""
        last = deepcopy(self)
        last.time = np.inf
        if self.gamma:
            last.bias = self._whole(last._balancing())
            for _ in range(10):  # until no expert's bias moves one way any more
                last._walk()
                if last.arrived:
                    break
        return last._treated(None)

    def _walk(self) -> None:
        """Follow some steps, and see from them how far the next leap may go: at most as far as the way so far.

        A bias has arrived when those of no expert all went one way (but for what all experts share, which has no
        effect), while the balancing one moved slower than it could follow.
        """
        bias, target = self.bias, self._balancing() if self.gamma else 0.0
        first = self.walk // 2  # the leap before has left the loads a little more uneven than they stay
        for _ in range(first):
            self._advance()
        time = self.time
        for _ in range(self.walk - first):
            self._advance()
        reach = float(self.step)
        if self.growth is not None and self.share < 1.0:
            self.drive = (self.time - time) / (self.walk - first)
            reach = min(reach, STRIDE * self.growth.steps / max(self.drive * (1.0 - self.share), 1e-12))
        if self.gamma:
            steps = self.gamma * self.walk
            moved = self.bias - bias - np.median(self.bias - bias, axis=-1, keepdims=True)
            steady = np.abs(moved).max() < 0.8 * steps and np.abs(self._balancing() - target).max() < 0.5 * steps
            self.arrived = bool(steady or self.step * self.gamma > LONGEST_WAY)
            if not self.arrived:
                reach = min(reach, WALK * COARSEST / self.gamma)
        self.ahead = int(reach) if reach >= 2 * self.walk else 0

    def _leap(self, steps: int) -> None:
        """Some steps at once."""
        if self.gamma and not self.arrived:
            for part in np.diff(np.linspace(0, steps, min(WALK, steps) + 1).round().astype(int)):
                self._advance(int(part))
        elif steps:
            before = self._balancing() if self.gamma else 0.0
            self._evolve(steps, self.drive)
            if self.gamma:
                self.bias = self.bias + self._whole(self._balancing() - before)

    def _advance(self, steps: int = 1) -> None:
        """One optimizer step, or several that push the bias the same way."""
        drive = 1.0
        if self.gamma:
            logits, without_bias = self._of_batch()
            if self.jitter:
                logits = logits + self.jitter * self.rng.standard_normal(logits.shape)
            chances = chances_of(logits, self.plain.top_k, self.bias, softmax=self.plain.softmax)
            counts = self.rng.binomial(self.batch.tokens, np.minimum(chances.round(12), 1.0))
            self.bias = bias_step(self.bias, counts, self.gamma * steps)
            if without_bias > 0.0:  # experts that are not chosen more do not learn faster
                drive = min(1.0, float(cv(chances).mean()) / without_bias)
        self._evolve(steps, drive)

    def _evolve(self, steps: int, drive: float) -> None:
        """Grow and wander."""
        self.step += steps
        self.time += steps * drive
        if self.drift and steps:
            kept = (1.0 - min(self.drift, 1.0) ** 2) ** (0.5 * steps)
            noise = self.sigma * self.rng.standard_normal(self.full.shape)
            self.full = kept * self.full + np.sqrt(1.0 - kept**2) * noise
            self.moves += 1
            if steps > 1 or self.moves % _ANCHORED == 0:
                self.anchor, self.nodes = self.full, {}

    def _of_batch(self) -> tuple[FloatArray, float]:
        """Logits of a global batch, and the CV of its loads without bias: its documents are noise of single tokens.

        What the noise does to logits changes slowly with popularity: it is interpolated between shares of popularity.
        """
        place = np.log(self.share) / np.log1p(STRIDE)
        upper = int(np.ceil(place))
        (low, low_cv), (high, high_cv) = self._node(upper - 1), self._node(upper)
        part = place - (upper - 1)
        added, without_bias = low + part * (high - low), low_cv + part * (high_cv - low_cv)
        return self.full * self.share + added, without_bias

    def _node(self, index: int) -> tuple[FloatArray, float]:
        """What noise of documents adds to logits at a share of popularity [layers, experts], and CV without bias."""
        if index not in self.nodes:
            logits, top_k = self.anchor * (1.0 + STRIDE) ** index, self.plain.top_k
            inside = smoothed(logits, self.plain.domain**2 - self.jitter**2, top_k)
            seen = inside + self.jitter * np.random.default_rng(1).standard_normal(logits.shape)
            self.nodes[index] = inside - logits, float(cv(chances_of(seen, top_k)).mean())
        return self.nodes[index]

    def _balancing(self) -> FloatArray:
        """The bias that evens out the loads of a global batch: of softmax scores nearly, from their median token."""
        logits = self._of_batch()[0]
        if self.plain.softmax:
            logits = logits - list(others(logits))[len(LANDAU) // 2]
        return balancing_bias(logits, self.plain.top_k)

    def _whole(self, bias: FloatArray) -> FloatArray:
        """In twos of gamma: all experts move at every step, so that two steps, or four, or none, stay between them."""
        return 2.0 * self.gamma * np.round(bias / (2.0 * self.gamma))

    def _treated(self, step: int | None) -> Treated:
        plain = replace(self.plain, logits=self.full * self.share)
        return Treated(step, plain, self.bias if self.gamma else None)


__all__ = ["Batch", "Treated", "World", "grown"]
