"""How far an estimate may be off: an 80 % interval from the signed errors of published runs.

Each published layout has a log error e = ln(predicted / measured step time), formed while the layout itself was left
out of everything that whole runs may set (``moesim validate --runs --write`` stores them beside this module). For a
new scenario they count with a weight that falls with distance: other hardware, dense instead of MoE, another
number of accelerators. The interval holds the middle 80 % of that weighted distribution, and grows with the distance of
the evidence:

    w_i = 1/2^d_i,     d_i = d_hardware + d_kind + |log2(N / N_i)| / 4
    measured in predicted x [exp(-q_90), exp(-q_10)], widened about its middle by 1 + d / 4,   d = weighted mean of d_i

It does not cover what no published run shows: failures and restarts, another data pipeline, a layout that its authors
did not care to tune, bugs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from simulator.spec.scenario import Scenario

FILE = Path(__file__).with_name("signed_errors.json")
LEVEL = 0.8
LEAST_LAYOUTS = 10
"""Fewer layouts of evidence give no interval."""

OTHER_CHIP, OTHER_VENDOR, OTHER_KIND = 2.0, 4.0, 1.0
"""Distances: another chip of the same vendor, of another vendor, and dense against MoE."""


@dataclass(frozen=True)
class SignedError:
    """Mean log error of the rows of one published layout."""

    layout: str
    hardware: str
    vendor: str
    moe: bool
    accelerators: int
    log_error: float

    def distance(self, other: SignedError) -> float:
        """How little this layout says about another one."""
        hardware = 0.0 if self.hardware == other.hardware else OTHER_CHIP
        if self.vendor != other.vendor:
            hardware = OTHER_VENDOR
        kind = OTHER_KIND if self.moe != other.moe else 0.0
        return hardware + kind + abs(float(np.log2(self.accelerators / other.accelerators))) / 4.0


@cache
def signed_errors() -> tuple[SignedError, ...]:
    """The shipped evidence; empty if there is none."""
    if not FILE.exists():
        return ()
    return tuple(SignedError(**row) for row in json.loads(FILE.read_text("utf-8"))["layouts"])


def factors(asked: SignedError, evidence: tuple[SignedError, ...]) -> tuple[float, float] | None:
    """Lower and upper factor on a predicted time; None without enough evidence.

    >>> some = tuple(SignedError(str(n), "chip", "maker", True, 64, e) for n, e in enumerate([-0.1, 0.1] * 10))
    >>> [round(each, 3) for each in factors(SignedError("new", "chip", "maker", True, 64, 0.0), some)]
    [0.905, 1.105]
    """
    if len(evidence) < LEAST_LAYOUTS:
        return None
    distances = np.array([each.distance(asked) for each in evidence])
    weights = 0.5**distances
    errors = np.array([each.log_error for each in evidence])
    tail = (1.0 - LEVEL) / 2.0
    low, high = (_quantile(errors, weights, share) for share in (tail, 1.0 - tail))
    middle, half = (low + high) / 2.0, (high - low) / 2.0
    half *= 1.0 + float((weights * distances).sum() / weights.sum()) / 4.0
    return float(np.exp(-(middle + half))), float(np.exp(-(middle - half)))


def interval(scenario: Scenario, value: float) -> tuple[float, float] | None:
    """80 % interval of a time-like number of a scenario; None without enough evidence."""
    profile = scenario.cluster.profile
    asked = SignedError(
        scenario.name,
        profile.name,
        profile.vendor,
        scenario.model.moe is not None,
        scenario.cluster.accelerators,
        0.0,
    )
    found = factors(asked, signed_errors())
    return None if found is None else (value * found[0], value * found[1])


def coverage(evidence: tuple[SignedError, ...], layouts: frozenset[str] | None = None) -> tuple[int, int]:
    """Layouts whose measurement lies in the interval that all others give, and layouts asked; of some layouts only."""
    inside = asked = 0
    for each in evidence:
        if layouts is not None and each.layout not in layouts:
            continue
        found = factors(each, tuple(other for other in evidence if other.layout != each.layout))
        if found is not None:
            asked += 1
            inside += found[0] <= np.exp(-each.log_error) <= found[1]
    return inside, asked


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """Weighted quantile: linear between the middles of the weights of sorted values."""
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order]) - weights[order] / 2.0
    return float(np.interp(share * weights.sum(), cumulative, values[order]))


__all__ = ["LEVEL", "SignedError", "coverage", "factors", "interval", "signed_errors"]
