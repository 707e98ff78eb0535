"""The stack term: what whole runs take beyond their kernels, one number for each profile and software stack.

Kernel curves are measured on a chip that does nothing else. Training adds launch gaps, synchronisation, casts and
copies that no op list has, and the lower clock of a hot chip. All of it enters as one share of compute time, the
stack's ``gap_fraction`` g; it is the only number that is ever estimated from whole runs.

The step is close to linear in g, T(g) = T(g0) (1 + s (g - g0)), with s from the max-plus reader. g minimises the mean
absolute log error over the layouts that share a stack, and a layout is always judged with the g of the *others*, so
that nothing is judged on what it was fitted on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from validation.predictions import Prediction

LEAST_LAYOUTS = 3
"""Other layouts that a fit needs; with fewer, the number of the profile stands."""

WIDEST = (-0.05, 1.5)


@dataclass(frozen=True)
class Observation:
    """One run: log of its predicted over its measured step time at the profile's g, and d ln T / d g."""

    stack: str
    layout: str
    log_error: float
    growth: float
    gap: float

    def at(self, gap: float) -> float:
        """Log error with another g."""
        return self.log_error + math.log(max(1e-3, 1.0 + self.growth * (gap - self.gap)))


def fitted(observations: Sequence[Observation]) -> float | None:
    """The g that fits some runs best, layouts weighing equally; None if there are too few layouts."""
    by_layout: dict[str, list[Observation]] = defaultdict(list)
    for each in observations:
        by_layout[each.layout].append(each)
    if len(by_layout) < LEAST_LAYOUTS:
        return None

    def misses(gap: float) -> float:
        return float(np.mean([np.mean([abs(each.at(gap)) for each in rows]) for rows in by_layout.values()]))

    return float(minimize_scalar(misses, bounds=WIDEST, method="bounded").x)


def observed(prediction: Prediction) -> Observation | None:
    """What a run says of its stack: the middle of its predictions over what was measured; None without a time."""
    logs = [math.log(point.step_s / point.published_s) for point in prediction.points if point.published_s]
    if not logs:
        return None
    growth = float(np.mean([point.growth for point in prediction.points]))
    return Observation(prediction.stack, prediction.layout, (min(logs) + max(logs)) / 2.0, growth, prediction.gap)


def as_the_others_say(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Every prediction with the g that all other layouts of its stack give; unchanged where they are too few."""
    seen = [(each, observed(each)) for each in predictions]
    known: dict[tuple[str, str], float | None] = {}
    found = []
    for each, _ in seen:
        key = (each.stack, each.layout)
        if key not in known:
            known[key] = fitted([o for p, o in seen if o and (p.stack, p.layout != each.layout) == (each.stack, True)])
        gap = known[key]
        found.append(each if gap is None else each.with_gap(gap))
    return found


def by_stack(predictions: Sequence[Prediction]) -> Mapping[str, float]:
    """The g of every stack from all of its runs: what profiles carry."""
    seen = [each for each in map(observed, predictions) if each is not None]
    gaps = {name: fitted([each for each in seen if each.stack == name]) for name in sorted({o.stack for o in seen})}
    return {name: gap for name, gap in gaps.items() if gap is not None}


__all__ = ["LEAST_LAYOUTS", "Observation", "as_the_others_say", "by_stack", "fitted", "observed"]
