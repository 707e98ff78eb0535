"""Balancing losses: the shrink law against published loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.optimize import brentq, least_squares

from simulator.routing import closed_forms
from simulator.routing.balance import violation
from simulator.routing.chances import chances_of
from simulator.routing.load import FloatArray
from simulator.routing.remedies import EXPONENT, STRENGTH, shrunk
from simulator.routing.tendencies import Tendencies
from simulator.spec.routing import Remedy
from validation.checks import Check, near, within

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
WANG_SOFTMAX = "Wang et al. 2024, arXiv 2408.15664, appendix on the softmax gate (loss weight 3e-4)"


def checks() -> Iterator[Check]:
    """Checks of losses."""
    yield from _table_6()
    yield from _shrink_law()
    yield from _wang()


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
    """MaxVio of the whole evaluation: auxiliary loss (0.72 and 0.52 are in-sample), and another weight."""
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
    for what, weight, published, tolerance, source in (
        ("1e-3, mean of 1B and 3B (in-sample)", 1e-3, 0.62, 0.05, WANG),
        ("3e-4, softmax gate", 3e-4, 0.937, 0.2, WANG_SOFTMAX),
    ):
        reached = float(violation(popularity_under({"load_balance": weight}, 64, 6, rng, layers=1000)).mean())
        name = f"global MaxVio under the shrink law, weight {what}"
        yield near("losses", name, published, reached, "", tolerance, source)


__all__ = ["WANG", "WANG_SOFTMAX", "checks", "fitted_strengths", "popularity_under"]
