"""Robust least squares on the logarithm of times, with bounds, cross-validation and a bootstrap over shapes.

    minimise  sum_i w_i rho((log t_i(p) - log t_i) / s),    rho(z) = 2 (sqrt(1 + z^2) - 1),    s = 0.1

Relative errors count alike at a microsecond and at a second, and a disturbed measurement pulls only linearly
(soft-l1). Parameters are positive and are fitted by their logarithms between physical bounds.

The bootstrap draws shapes with replacement and moves the parameters by one bounded Gauss-Newton step from the fit:
what a refit would do to first order, at a thousandth of its cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares, lsq_linear, minimize_scalar

from simulator.timing.kernels import FloatArray

SCALE, RESAMPLES, FOLDS = 0.1, 300, 4
RIDGE = 1e-4
"""Keeps a parameter that the data say nothing about where it is."""

Predict = Callable[[FloatArray], FloatArray]
"""From parameters to seconds [samples]."""


@dataclass(frozen=True)
class Parameter:
    """A positive number to be fitted: where it stands in the profile, where the search starts, and its bounds."""

    path: str
    start: float
    low: float
    high: float


@dataclass(frozen=True)
class Data:
    """What a fit sees: seconds, weights and the shape of each sample."""

    seconds: FloatArray
    weights: FloatArray
    shapes: Sequence[str]

    def part(self, chosen: FloatArray) -> Data:
        """The samples in a mask."""
        where = np.flatnonzero(chosen)
        return Data(self.seconds[where], self.weights[where], [self.shapes[int(index)] for index in where])


@dataclass(frozen=True)
class Solution:
    """Fitted values [parameters] in the order of the parameters, and resampled ones [resamples, parameters]."""

    values: FloatArray
    resampled: FloatArray


def solve(parameters: Sequence[Parameter], predict: Predict, data: Data, *, starts: int = 3) -> FloatArray:
    """The values that fit best, from several starts."""
    return np.asarray(np.exp(_solved(parameters, predict, data, starts=starts).x))


def solution(
    parameters: Sequence[Parameter], predict: Predict, data: Data, *, starts: int = 3, resamples: int = RESAMPLES
) -> Solution:
    """The values that fit best, and where they would be on other draws of the shapes."""
    found = _solved(parameters, predict, data, starts=starts)
    return Solution(np.exp(found.x), np.exp(_bootstrap(parameters, predict, data, found.x, resamples)))


def cross_validated(parameters: Sequence[Parameter], predict: Predict, data: Data) -> float:
    """Weighted mean absolute log error on shapes that were left out, each shape once."""
    names = sorted(set(data.shapes))
    order = np.random.default_rng(len(names)).permutation(len(names))
    fold_of = {name: int(order[index]) % FOLDS for index, name in enumerate(names)}
    folds = np.array([fold_of[name] for name in data.shapes])
    start = _solved(parameters, predict, data, starts=2).x
    warm = [
        Parameter(each.path, float(np.exp(at)), each.low, each.high) for each, at in zip(parameters, start, strict=True)
    ]
    error = total = 0.0
    for fold in range(FOLDS):
        kept, left = folds != fold, folds == fold
        if not left.any() or not kept.any():
            continue
        values = _solved(warm, lambda at, kept=kept: predict(at)[kept], data.part(kept), starts=1).x  # type: ignore[misc]
        missed = np.abs(np.log(predict(np.exp(values))[left] / data.seconds[left]))
        error += float(data.weights[left] @ missed)
        total += float(data.weights[left].sum())
    return error / total if total else np.inf


def _solved(parameters: Sequence[Parameter], predict: Predict, data: Data, *, starts: int) -> Any:
    low, high = (np.log([getattr(each, name) for each in parameters]) for name in ("low", "high"))
    first = np.clip(np.log([each.start for each in parameters]), low + 1e-9, high - 1e-9)
    target, root = np.log(data.seconds), np.sqrt(data.weights / data.weights.mean())

    def residual(at: FloatArray) -> FloatArray:
        return np.asarray(root * (np.log(predict(np.exp(at))) - target))

    rng, found = np.random.default_rng(0), []
    for number in range(starts):
        away = np.zeros(len(first)) if number == 0 else rng.normal(size=len(first))
        start = np.clip(first + away, low + 1e-6, high - 1e-6)
        found.append(least_squares(residual, start, bounds=(low, high), loss="soft_l1", f_scale=SCALE, max_nfev=60))
    return min(found, key=lambda each: float(each.cost))


def _bootstrap(
    parameters: Sequence[Parameter], predict: Predict, data: Data, at: FloatArray, resamples: int
) -> FloatArray:
    """Logarithms of the parameters on resampled shapes [resamples, parameters]."""
    low, high = (np.log([getattr(each, name) for each in parameters]) for name in ("low", "high"))
    base = np.log(predict(np.exp(at)))
    slopes = np.empty((len(base), len(at)))
    for index in range(len(at)):
        step = 1e-4 if at[index] + 1e-4 <= high[index] else -1e-4
        moved = at.copy()
        moved[index] += step
        slopes[:, index] = (np.log(predict(np.exp(moved))) - base) / step
    missed = base - np.log(data.seconds)
    weights = data.weights / data.weights.mean() / np.sqrt(1.0 + (missed / SCALE) ** 2)
    names = sorted(set(data.shapes))
    where = np.array([names.index(name) for name in data.shapes])
    rng, drawn = np.random.default_rng(0), np.empty((resamples, len(at)))
    for number in range(resamples):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[where]
        drawn_weights = weights * times
        normal = (slopes.T * drawn_weights) @ slopes
        normal += np.eye(len(at)) * RIDGE * max(float(np.trace(normal)), 1e-12)
        upper = np.linalg.cholesky(normal).T
        move = np.linalg.solve(upper.T, -(slopes.T * drawn_weights) @ missed)
        room = (np.minimum(low - at, -1e-12), np.maximum(high - at, 1e-12))
        drawn[number] = at + lsq_linear(upper, move, bounds=room).x
    return np.clip(drawn, low, high)


def composition_factor(
    seconds: FloatArray, scaled: FloatArray, fixed: FloatArray, draws: int
) -> tuple[float, float, float]:
    """The factor f with which f x scaled + fixed is robustly nearest to seconds, and its 90 % interval."""
    if not len(seconds):
        return 1.0, 1.0, 1.0

    def best(chosen: Any) -> float:
        def cost(log: float) -> float:
            missed = np.log((np.exp(log) * scaled[chosen] + fixed[chosen]) / seconds[chosen]) / SCALE
            return float((np.sqrt(1.0 + missed**2) - 1.0).sum())

        return float(np.exp(minimize_scalar(cost, bounds=(-2.0, 2.0), method="bounded").x))

    rng, count = np.random.default_rng(0), len(seconds)
    low, high = np.percentile([best(rng.integers(count, size=count)) for _ in range(draws)], [5.0, 95.0])
    return best(np.arange(count)), float(low), float(high)


__all__ = [
    "Data", "Parameter", "Predict", "Solution", "composition_factor", "cross_validated", "solution", "solve",
]  # fmt: skip
