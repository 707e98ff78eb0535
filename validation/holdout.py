"""Predictions of shapes that the fit has not seen, beside those of the baselines.

Shapes are divided in halves several times; each time a profile and the baselines are fitted to one half and predict the
other. A case is in a category by its kind and pass; errors are relative and pooled over the divisions. The ratio of two
training steps of one model (stride 2 or 4 against 1, a capacity factor against the smallest) is a category of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from simulator.timing.kernels import FloatArray
from validation import baselines
from validation.compose import measured_seconds
from validation.fit import fit
from validation.least_squares import composition_factor
from validation.records import Environment
from validation.samples import Sample, halves

SEEDS = (0, 1, 2, 3)
LONG_S = 1e-3
"""Products of this length and more are a category: shorter ones are a matter of launches."""


@dataclass(frozen=True)
class Held:
    """One held-out case: what it took, and the predictions in seconds.

    ``pieces``: the sum of its pieces that were timed alone, where all of them were, times what wholes of the training
    half take over such sums. NaN: cannot be predicted.
    """

    sample: Sample
    seed: int
    predicted: float
    rate: float
    overhead: float
    pieces: float

    def error(self, which: str = "predicted") -> float:
        """Relative error of one of the predictions."""
        return float(getattr(self, which)) / self.sample.seconds - 1.0


@dataclass(frozen=True)
class Errors:
    """Relative errors of a category."""

    cases: int
    mape: float
    median: float
    bias: float


def held_out(samples: Sequence[Sample], environment: Environment, seeds: Iterable[int] = SEEDS) -> list[Held]:
    """Predictions of every division's held-out half."""
    found: list[Held] = []
    alone = {sample.key: sample.seconds for sample in samples}
    for seed in seeds:
        training, left = halves(samples, seed)
        fitted = fit(training, environment, intervals=False)
        predicted = fitted.seconds(left)
        simple = {rule: _baseline(rule, training, left) for rule in baselines.RULES}
        composed = _composed(training, left, alone)
        for index, sample in enumerate(left):
            rate, overhead = (float(simple[rule][index]) for rule in baselines.RULES)
            found.append(Held(sample, seed, float(predicted[index]), rate, overhead, float(composed[index])))
    return found


def _composed(training: Sequence[Sample], left: Sequence[Sample], alone: Mapping[str, float]) -> FloatArray:
    """Sums of measured pieces, times one factor for each category of wholes that is fitted to the training half."""
    result = np.full(len(left), np.nan)
    sums = {sample.key: measured_seconds(sample.case, alone) for sample in (*training, *left)}
    for group in {category(sample)[0] for sample in left if sums[sample.key] is not None}:
        known = [each for each in training if category(each)[0] == group and sums[each.key] is not None]
        where = [index for index, each in enumerate(left) if category(each)[0] == group and sums[each.key] is not None]
        if known:
            seconds, total = np.array([(each.seconds, sums[each.key]) for each in known], dtype=np.float64).T
            factor, _, _ = composition_factor(seconds, total, np.zeros(len(known)), 1)
            result[where] = [factor * float(sums[left[index].key] or 0.0) for index in where]
    return result


def category(sample: Sample) -> tuple[str, ...]:
    """Categories of a case."""
    case, kind = sample.case, sample.kind
    if kind in ("layer", "expert_parallel_layer"):
        return (f"{kind} {'forward' if case['which'] == 'F' else 'forward and backward'}",)
    if kind == "all_to_all":
        return ("all_to_all 2 ranks" if case["ranks"] == 2 else "all_to_all 3 ranks and more",)
    if kind in ("gemm", "grouped_gemm"):
        return (kind, *(("products over 1 ms",) if sample.seconds >= LONG_S else ()))
    return (kind,)


def by_category(held: Iterable[Held]) -> dict[str, list[Held]]:
    """Held-out cases by category."""
    found: dict[str, list[Held]] = {}
    for each in held:
        for name in category(each.sample):
            found.setdefault(name, []).append(each)
    return found


def errors(values: Iterable[float]) -> Errors | None:
    """Mean absolute, median absolute and mean relative error; None where nothing was predicted."""
    array = np.array([value for value in values if np.isfinite(value)])
    if not len(array):
        return None
    size = np.abs(array)
    return Errors(len(array), float(size.mean()), float(np.median(size)), float(array.mean()))


def ratios(held: Iterable[Held], what: str) -> Iterator[tuple[Held, Held]]:
    """Pairs of steps of one division that differ in ``stride`` or ``capacity_factor`` alone, the smaller first."""
    groups: dict[tuple[int, str], list[Held]] = {}
    for each in held:
        if each.sample.kind == "step":
            groups.setdefault((each.seed, _without(each.sample, what)), []).append(each)
    for members in groups.values():
        members.sort(key=lambda each: _design(each.sample)[what])
        for first, second in combinations(members, 2):
            smallest = _design(first.sample)[what] == _design(members[0].sample)[what]
            if smallest and _design(second.sample)[what] != _design(first.sample)[what]:
                yield first, second


def ratio_error(first: Held, second: Held, which: str = "predicted") -> float:
    """Relative error of the ratio of two steps."""
    predicted = float(getattr(second, which)) / float(getattr(first, which))
    return predicted / (second.sample.seconds / first.sample.seconds) - 1.0


def _design(sample: Sample) -> dict[str, float]:
    case = sample.case
    return {"stride": case["model"]["moe"].get("stride", 1), "capacity_factor": case["capacity_factor"] or 0.0}


def _without(sample: Sample, what: str) -> str:
    """A step without its stride or capacity factor."""
    case = {name: value for name, value in sample.case.items() if name != "pieces"}
    if what == "capacity_factor":
        return json.dumps({**case, what: None}, sort_keys=True)
    moe = {**case["model"]["moe"], "stride": 1}
    return json.dumps({**case, "model": {**case["model"], "moe": moe}}, sort_keys=True)


def _baseline(rule: str, training: Sequence[Sample], left: Sequence[Sample]) -> FloatArray:
    """Seconds of the held-out cases by one of the simple rules, fitted for each category apart."""
    result = np.full(len(left), np.nan)
    for group in {category(sample)[0] for sample in left}:
        known = [sample for sample in training if category(sample)[0] == group]
        where = [index for index, sample in enumerate(left) if category(sample)[0] == group]
        if known:
            amounts = np.array([baselines.work(sample) for sample in known])
            values = baselines.fitted(rule, amounts, known)
            wanted = np.array([baselines.work(left[index]) for index in where])
            result[where] = baselines.predicted(values, wanted)
    return result


__all__ = [
    "Errors", "Held", "by_category", "category", "errors", "held_out", "ratio_error", "ratios",
]  # fmt: skip
