"""The bias controller in closed loop: published global loads, and loops in which every token is routed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from simulator.routing import balance, closed_forms
from simulator.routing.balance import bias_step, violation
from simulator.routing.chances import chances_of
from simulator.routing.evolution import Batch, Treated
from simulator.routing.load import FloatArray, biased_inclusion
from simulator.routing.remedies import trajectory
from simulator.routing.tendencies import Tendencies
from simulator.routing.tokens import block
from simulator.spec.model import MixtureOfExperts, Router
from simulator.spec.routing import Remedy
from validation.checks import Check, at_least, at_most, covers, inside, near, within
from validation.routing.balancing import WANG, WANG_SOFTMAX

OWN_LOOP = "one closed-loop run of ours: E 64, k 6, 8192 tokens per step, sigma 1, sigmoid, Gaussian token noise"
EXPERTS, TOP_K, TOKENS, LAYERS = 64, 6, 8192, 40


def checks() -> Iterator[Check]:
    """Checks of the bias."""
    yield from _wang()
    yield from _controller()
    yield from _by_our_router()
    yield from _by_token()


def _wang() -> Iterator[Check]:
    """MaxVio of the whole evaluation of routers that a bias has balanced."""
    rng = np.random.default_rng(8)
    (state,) = _loop(1e-3, [None], tokens=1152 * 2048, layers=26, kind="softmax", sigma=0.3)
    reached = float(violation(state.chances(1, 1e9, rng)[0]).mean())
    name = "global MaxVio without auxiliary loss, softmax gate, sigma 0.3 and gamma 1e-3 (neither is published)"
    yield near("bias", name, 0.027, reached, "", None, WANG_SOFTMAX)
    settled: tuple[tuple[str, int, float, float | None], ...] = (
        ("1B, popularity drifts 0.5 % per step", 1152 * 2048, 0.005, 0.02),
        ("3B, popularity drifts 0.5 % per step", 1728 * 2048, 0.005, 0.02),
        ("1B, popularity at rest", 1152 * 2048, 0.0, None),
    )
    for name, tokens, drift, allowed in settled:
        states = _loop(1e-3, [None], tokens=tokens, drift=drift, layers=26)
        reached = float(violation(states[0].chances(1, 1e9, rng)[0]).mean())
        yield near("bias", f"global MaxVio without auxiliary loss, {name}", 0.04, reached, "", allowed, WANG)


def _loop(
    gamma: float,
    steps: list[int | None],
    *,
    tokens: int = TOKENS,
    drift: float = 0.0,
    layers: int = LAYERS,
    kind: Literal["sigmoid", "softmax"] = "sigmoid",
    sigma: float = 1.0,
) -> list[Treated]:
    """The product's own loop: E 64, k 6, Gumbel token noise."""
    rng = np.random.default_rng(9)
    plain = Tendencies(sigma * rng.standard_normal((layers, EXPERTS)), TOP_K)
    moe = MixtureOfExperts(
        experts=EXPERTS, top_k=TOP_K, expert_ffn_size=1, router=Router(kind=kind, selection_bias=True)
    )
    remedies = [Remedy(kind="bias", gamma=gamma)]
    return list(trajectory(plain, steps, remedies=remedies, moe=moe, batch=Batch(tokens, 1.0), drift=drift, rng=rng))


def _batch_violation(state: Treated, rng: np.random.Generator) -> FloatArray:
    counts = rng.binomial(TOKENS, np.minimum(state.chances(1, 1.0, rng)[0], 1.0))
    return violation(counts)


def _by_our_router() -> Iterator[Check]:
    """Convergence in the product's loop, the slowest of eight layers; the floor is what even tokens scatter."""
    rng = np.random.default_rng(10)
    source = f"{WANG} and figure 4: 1e-3 converges, 1e-2 fluctuates late, 1e-4 is slow at first"
    floor = closed_forms.largest_of_normals(EXPERTS) * np.sqrt((1 - TOP_K / EXPERTS) / (TOKENS * TOP_K / EXPERTS))
    steps = list(range(0, 601, 10))
    converged = np.full(LAYERS, 601)
    for step, state in zip(steps, _loop(1e-3, list(steps)), strict=True):
        balanced = _batch_violation(state, rng) < 1.75 * floor
        converged = np.where(balanced, np.minimum(converged, step), converged)
    yield near(
        "bias",
        "gamma 1e-3, Gumbel noise: slowest layer is balanced after",
        200,
        int(converged.max()),
        "steps",
        None,
        source,
    )
    coarse = float(np.mean([_batch_violation(state, rng).mean() for state in _loop(1e-2, list(range(200, 300, 10)))]))
    yield at_least("bias", "gamma 1e-2: MaxVio of batches stays over", 2 * floor, coarse, "", source)
    slow = float(_batch_violation(_loop(1e-4, [600])[0], rng).mean())
    yield at_least("bias", "gamma 1e-4: MaxVio after 600 steps is still over", 1.0, slow, "", source)


def _by_token() -> Iterator[Check]:
    """The product's loop against one in which every token is routed, from the same bias: sigma 1 and softmax's 2.

    A step of 1e-3 is coarse against the softmax scores of 128 experts: the bias swings, as far as by token.
    """
    shapes: tuple[tuple[Literal["sigmoid", "softmax"], float, int, int, float], ...] = (
        ("sigmoid", 1.0, 64, 6, 0.2),
        ("softmax", 0.3, 64, 6, 0.25),
        ("softmax", 2.0, 128, 8, 0.2),
    )
    for kind, sigma, experts, top_k, tolerance in shapes:
        rng = np.random.default_rng(15)
        router = Router(kind=kind, selection_bias=True)
        plain = Tendencies(sigma * rng.standard_normal((1, experts)), top_k, softmax=kind == "softmax")
        moe = MixtureOfExperts(experts=experts, top_k=top_k, expert_ffn_size=1, router=router)
        remedies, batch = [Remedy(kind="bias", gamma=1e-3)], Batch(TOKENS, 1.0)
        (start,) = trajectory(plain, [None], remedies=remedies, moe=moe, batch=batch, rng=rng)
        assert start.bias is not None
        biases = [start.bias[0].copy(), start.bias[0].copy()]
        found = np.empty((250, 2))
        for step in range(len(found)):
            picks = block(plain, 0, TOKENS, rng).picks(router, top_k, biases[0])
            chances = chances_of(plain.logits[0], top_k, biases[1], softmax=plain.softmax)
            counts = [np.bincount(picks.ravel(), minlength=experts), rng.binomial(TOKENS, np.minimum(chances, 1.0))]
            biases = [bias_step(bias, each, 1e-3) for bias, each in zip(biases, counts, strict=True)]
            found[step] = [float(balance.cv(each)) for each in counts]
        by_token, ours = found[100:].mean(0)
        name = f"{kind} gate, sigma {sigma}, E {experts}, k {top_k}, gamma 1e-3: CV of a batch"
        yield within("bias", name, by_token, ours, "", tolerance, "the same loop, token by token")


def _controller() -> Iterator[Check]:
    """The same loop with Gaussian token noise, against one run by token of the same set-up.

    That run began at MaxVio 4.6, less than most draws of popularity: its way is that of layers that begin alike.
    """
    start = _gaussian_loop(1e-3, 500)
    floor = 0.08  # z_E sqrt((1 - k/E) / mu)
    yield from _gaussian_tokens(start[0])
    settled = start[400].tolist()
    yield covers("bias", "gamma 1e-3, Gaussian noise: MaxVio at step 400", 0.09, settled, "", OWN_LOOP)
    balanced = (start < 1.75 * floor).argmax(0)  # first step of each layer
    yield inside(
        "bias", "gamma 1e-3, Gaussian noise: balanced after", (200, 400), float(balanced.mean()), "steps", WANG
    )
    coarse = _gaussian_loop(1e-2, 300)[200:].mean(0)
    yield at_least("bias", "gamma 1e-2, Gaussian noise: MaxVio stays over", 0.26, float(coarse.mean()), "", OWN_LOOP)
    slow = _gaussian_loop(1e-4, 601)[600][np.abs(start[0] - 4.6).argsort()[:10]]
    name = "gamma 1e-4, Gaussian noise: MaxVio after 600 steps, from near 4.6"
    yield covers("bias", name, 3.4, slow.tolist(), "", OWN_LOOP)
    for drift, expected in ((0.01, 0.13), (0.02, 0.35)):
        ends = _gaussian_loop(1e-3, 1000, drift=drift)[600::40].ravel().tolist()
        yield covers("bias", f"popularity drift {drift:.0%} per step: MaxVio of a batch", expected, ends, "", OWN_LOOP)
    lost = float(_gaussian_loop(1e-3, 1000, drift=0.05)[600::40].mean())
    yield at_least("bias", "popularity drift 5% per step: the bias cannot follow, MaxVio over", 1.0, lost, "", OWN_LOOP)
    jitter = _gaussian_loop(1e-3, 700, jitter=0.3)[500:]
    yield within("bias", "domain jitter 0.3 per batch: MaxVio of a batch", 1.6, float(jitter.mean()), "", 0.2, OWN_LOOP)
    yield at_most(
        "bias", "gamma 1e-3, settled: MaxVio of a batch", 1.5 * floor, float(start[450:].mean()), "", OWN_LOOP
    )


def _gaussian_tokens(reached: FloatArray) -> Iterator[Check]:
    """Chances without a bias against tokens routed by their noisy logits, in the first layers."""
    rng = np.random.default_rng(11)
    popularity = rng.standard_normal((LAYERS, EXPERTS))[:8]
    found = []
    for logits in popularity:
        chosen = np.argpartition(-logits - rng.standard_normal((TOKENS, EXPERTS)), TOP_K, axis=1)[:, :TOP_K]
        found.append(float(violation(np.bincount(chosen.ravel(), minlength=EXPERTS))))
    name = "no bias, Gaussian noise: MaxVio of eight layers"
    yield within("bias", name, float(np.mean(found)), float(reached[:8].mean()), "", 0.05, "tokens one by one")


def _gaussian_loop(gamma: float, steps: int, *, drift: float = 0.0, jitter: float = 0.0) -> FloatArray:
    """MaxVio of every batch [steps, layers]; popularity walks at random by ``drift`` per step."""
    rng = np.random.default_rng(11)
    popularity, bias = rng.standard_normal((LAYERS, EXPERTS)), np.zeros((LAYERS, EXPERTS))
    found = np.empty((steps, LAYERS))
    for step in range(steps):
        moved = popularity + jitter * rng.standard_normal(popularity.shape) if jitter else popularity
        counts = rng.binomial(TOKENS, biased_inclusion(moved, bias, TOP_K, "normal"))
        found[step] = violation(counts)
        bias = bias_step(bias, counts, gamma)
        if drift:
            popularity = popularity + drift * rng.standard_normal(popularity.shape)
    return found


__all__ = ["checks"]
