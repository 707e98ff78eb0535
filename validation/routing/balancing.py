"""Balancing: the shrink law of the losses against published loads, and the bias controller in closed loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.optimize import brentq, least_squares

from simulator.routing import closed_forms
from simulator.routing.balance import bias_step, violation
from simulator.routing.load import FloatArray, biased_inclusion
from simulator.routing.remedies import EXPONENT, STRENGTH, Batch, Treated, shrunk, trajectory
from simulator.routing.tendencies import Tendencies, chances_of
from simulator.spec.model import MixtureOfExperts, Router
from simulator.spec.routing import Remedy
from validation.checks import Check, at_least, at_most, covers, inside, near, within

UNTREATED = 1.93
"""Popularity of a router without balancing, in logit units: CV 3.01 of 256 experts (1701.06538, table 6)."""
TABLE_6: dict[tuple[float, float], tuple[float, float]] = {
    (0.0, 0.0): (3.01, 17.80),
    (0.2, 0.0): (0.17, 1.47),
    (0.0, 0.2): (0.04, 1.15),
    (0.1, 0.1): (0.05, 1.14),
    (0.01, 0.01): (0.11, 1.37),
    (1.0, 1.0): (0.02, 1.07),
}
"""(importance weight, load weight): CV of the load and busiest over mean, 256 experts (1701.06538, table 6)."""
SHAZEER = "Shazeer et al. 2017, arXiv 1701.06538, table 6"
WANG = "Wang et al. 2024, arXiv 2408.15664, table 2"
OWN_LOOP = "one closed-loop run of ours: E 64, k 6, 8192 tokens per step, sigma 1, sigmoid, Gaussian token noise"
EXPERTS, TOP_K, TOKENS, LAYERS = 64, 6, 8192, 40


def checks() -> Iterator[Check]:
    """Checks of losses and bias."""
    yield from _table_6()
    yield from _shrink_law()
    yield from _wang()
    yield from _controller()
    yield from _by_our_router()


def popularity_under(
    weights: Mapping[str, float], experts: int, top_k: int, rng: np.random.Generator, layers: int = 200
) -> FloatArray:
    """Chances [layers, experts] of a router that would collapse, under balancing losses of given weights."""
    plain = Tendencies(UNTREATED * rng.standard_normal((layers, experts)), top_k)
    remedies = [Remedy.model_validate({"kind": kind, "weight": weight}) for kind, weight in weights.items() if weight]
    return chances_of(shrunk(plain, remedies, 1).logits, top_k)


def fitted_strengths() -> dict[str, float]:
    """Exponent and strengths of the shrink law from the published loads, by least squares on logarithms.

    Table 6 gives the exponent and the strengths of importance and load loss; the load-balance loss has the mean of the
    two published MaxVio at weight 1e-3.
    """
    rows = [(pair, cv) for pair, (cv, _) in TABLE_6.items() if any(pair)]

    def misses(parameters: FloatArray) -> FloatArray:
        exponent, importance, load = parameters[0], np.exp(parameters[1]), np.exp(parameters[2])
        predicted = [
            UNTREATED / (1.0 + importance * first**exponent + load * second**exponent) for (first, second), _ in rows
        ]
        return np.log(predicted) - np.log([cv for _, cv in rows])

    exponent, importance, load = least_squares(misses, np.array([0.4, 3.0, 5.0])).x
    noise = np.random.default_rng(13).standard_normal((2000, 64))

    def off(sigma: float) -> float:
        return float(violation(chances_of(sigma * noise, 6)).mean()) - 0.5 * (0.72 + 0.52)

    shrink = UNTREATED / brentq(off, 0.05, 1.0) - 1.0
    return {
        "exponent": float(exponent),
        "importance": float(np.exp(importance)),
        "load": float(np.exp(load)),
        "load_balance": float(shrink / 1e-3**exponent),
    }


def _table_6() -> Iterator[Check]:
    """Busiest over mean from the published CV (a law of extreme values), not from our shrink law."""
    for (importance, load), (cv, busiest) in TABLE_6.items():
        tolerance = 0.08 if cv <= 0.17 else None
        small = closed_forms.max_over_mean_of_normals(cv, 256)
        reached = small if cv <= 0.17 else closed_forms.max_over_mean(cv, 256)
        name = f"busiest over mean from CV {cv}, weights {importance:g} and {load:g}"
        yield near("losses", name, busiest, reached, "", tolerance, SHAZEER)


def _shrink_law() -> Iterator[Check]:
    """The law's constants as shipped against a new fit, and each row of the table under the law (in-sample)."""
    fitted = fitted_strengths()
    source = f"{SHAZEER}; {WANG}; least squares"
    yield within("losses", "shrink law: exponent as shipped", fitted["exponent"], EXPONENT, "", 0.05, source)
    for kind in ("importance", "load", "load_balance"):
        # Strengths as they act at a weight of 0.1, where the exponent's rounding plays no part.
        scale = 0.1 ** (fitted["exponent"] - EXPONENT)
        yield within(
            "losses",
            f"shrink law: strength of {kind} as shipped",
            fitted[kind] * scale,
            STRENGTH[kind],
            "",
            0.15,
            source,
        )
    rng = np.random.default_rng(7)
    for (importance, load), (cv, _) in TABLE_6.items():
        if not importance and not load:
            continue
        chances = popularity_under({"importance": importance, "load": load}, 256, 4, rng)
        reached = float((chances.std(-1) / chances.mean(-1)).mean())
        name = f"CV of the load under weights {importance:g} and {load:g} (in-sample)"
        yield within("losses", name, cv, reached, "", 0.25, SHAZEER)


def _wang() -> Iterator[Check]:
    """MaxVio of the whole evaluation: auxiliary loss (0.72 and 0.52 are in-sample), another weight, and the bias."""
    rng = np.random.default_rng(8)
    for name, population, published in (("1B", 0.25, 0.72), ("3B", 0.19, 0.52)):
        chances = chances_of(population * rng.standard_normal((400, 64)), 6)
        reached = float(violation(chances).mean())
        yield near(
            "losses",
            f"global MaxVio with auxiliary loss, {name}: population {population}",
            published,
            reached,
            "",
            0.1,
            WANG,
        )
    for name, weight, published, tolerance in (
        ("1e-3, mean of 1B and 3B (in-sample)", 1e-3, 0.62, 0.05),
        ("3e-4, softmax gate", 3e-4, 0.937, 0.2),
    ):
        reached = float(violation(popularity_under({"load_balance": weight}, 64, 6, rng, layers=1000)).mean())
        yield near(
            "losses", f"global MaxVio under the shrink law, weight {name}", published, reached, "", tolerance, WANG
        )
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
    gamma: float, steps: list[int | None], *, tokens: int = TOKENS, drift: float = 0.0, layers: int = LAYERS
) -> list[Treated]:
    """The product's own loop: E 64, k 6, sigma 1, sigmoid scores, Gumbel token noise."""
    rng = np.random.default_rng(9)
    plain = Tendencies(rng.standard_normal((layers, EXPERTS)), TOP_K)
    moe = MixtureOfExperts(
        experts=EXPERTS, top_k=TOP_K, expert_ffn_size=1, router=Router(kind="sigmoid", selection_bias=True)
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


def _controller() -> Iterator[Check]:
    """The same loop with Gaussian token noise, against one run by token of the same set-up."""
    start = _gaussian_loop(1e-3, 500)
    floor = 0.08  # z_E sqrt((1 - k/E) / mu)
    for step, expected in ((0, 4.6), (400, 0.09)):
        yield covers(
            "bias", f"gamma 1e-3, Gaussian noise: MaxVio at step {step}", expected, start[step].tolist(), "", OWN_LOOP
        )
    balanced = (start < 1.75 * floor).argmax(0)  # first step of each layer
    yield inside(
        "bias", "gamma 1e-3, Gaussian noise: balanced after", (200, 400), float(balanced.mean()), "steps", WANG
    )
    coarse = _gaussian_loop(1e-2, 300)[200:].mean(0)
    yield at_least("bias", "gamma 1e-2, Gaussian noise: MaxVio stays over", 0.26, float(coarse.mean()), "", OWN_LOOP)
    slow = _gaussian_loop(1e-4, 601)[600]
    yield covers("bias", "gamma 1e-4, Gaussian noise: MaxVio after 600 steps", 3.4, slow.tolist(), "", OWN_LOOP)
    for drift, expected in ((0.01, 0.13), (0.02, 0.35), (0.05, 3.1)):
        ends = _gaussian_loop(1e-3, 1000, drift=drift)[600::40]
        yield covers(
            "bias",
            f"popularity drift {drift:.0%} per step: MaxVio of a batch",
            expected,
            ends.ravel().tolist(),
            "",
            OWN_LOOP,
        )
    jitter = _gaussian_loop(1e-3, 700, jitter=0.3)[500:]
    yield within("bias", "domain jitter 0.3 per batch: MaxVio of a batch", 1.6, float(jitter.mean()), "", 0.2, OWN_LOOP)
    yield at_most(
        "bias", "gamma 1e-3, settled: MaxVio of a batch", 1.5 * floor, float(start[450:].mean()), "", OWN_LOOP
    )


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


__all__ = ["checks", "fitted_strengths", "popularity_under"]
