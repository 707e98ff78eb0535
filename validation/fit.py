"""From measured cases to a hardware profile in the simulator's own forms.

In this order, since later curves lean on earlier ones:

    peaks and bandwidth   the best rates that were measured
    memory                launch, share of the bandwidth, cache; choosing experts and planning rows
    gemm, grouped_gemm    by format (:mod:`validation.forms`); expert products also by implementation
    attention             by kind
    all_to_all            latency, bandwidth, knee
    composition           what whole layers take over the sum of their kernels, forward and backward
    stacks                what ranks side by side on one machine cost each other

Forms are chosen by cross-validation over shapes: of those within 2 % of the best, the one with fewest parameters.
A machine has one profile for each implementation of the experts, which share everything but the expert products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from simulator.errors import invalid
from simulator.spec.hardware import HardwareProfile
from simulator.timing.kernels import FloatArray
from validation import forms
from validation.compose import expert_parallel_seconds, layer_seconds, ranks_stack, step_seconds
from validation.forms import Form, with_values
from validation.least_squares import RESAMPLES, SCALE, Data, Solution, cross_validated, solution
from validation.machine import blank, with_composition, with_product
from validation.predict import ROUTING, Case, attention_kind, piece_seconds, seconds_by_profile
from validation.records import Environment
from validation.samples import Sample, routing_samples

SIMPLER = 1.02
"""A form may be this much worse than the best and still be taken for having fewer parameters."""

FEWEST_SHAPES = 3
"""Layers with expert products of an implementation, below which these are left out of the profile."""


@dataclass(frozen=True)
class Curve:
    """One fitted curve: where it stands, the form that was chosen, and the error of every form when left out."""

    path: str
    form: Form
    errors: Mapping[str, float]
    solution: Solution
    samples: Sequence[Sample]
    implementation: str | None = None

    def intervals(self) -> dict[str, tuple[float, float, float]]:
        """Value, and the bounds that hold 90 % of the resampled values, by path."""
        low, high = np.percentile(self.solution.resampled, [5.0, 95.0], axis=0)
        rows = zip(self.form.parameters, self.solution.values, low, high, strict=True)
        return {each.path: (float(value), float(least), float(most)) for each, value, least, most in rows}

    @property
    def name(self) -> str:
        """The path without what all have in common, and the implementation of experts."""
        short = self.path.removeprefix("kernels.")
        return short if self.implementation is None else f"{short} ({self.implementation})"


@dataclass
class Fitted:
    """What was fitted to a machine; ``profiles`` by implementation of the experts, ``main`` the usual one."""

    profiles: dict[str, HardwareProfile]
    main: str
    curves: list[Curve] = field(default_factory=list)
    factors: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def profile(self) -> HardwareProfile:
        """The profile of the usual implementation."""
        return self.profiles[self.main]

    def band(self, curve: Curve, cases: Sequence[Case], draws: int = 100) -> FloatArray:
        """Seconds of cases of a curve: fitted, and the bounds of 90 % of the resampled fits [3, cases]."""
        rule = seconds_by_profile(curve.samples[0].kind, cases)
        profile = self.profiles[curve.implementation or self.main]
        names = [each.path for each in curve.form.parameters]
        found = [
            rule(with_values(profile, dict(zip(names, map(float, values), strict=True))))
            for values in (curve.solution.values, *curve.solution.resampled[:draws])
        ]
        low, high = np.percentile(found, [5.0, 95.0], axis=0)
        return np.array([found[0], low, high])

    def seconds(self, samples: Sequence[Sample]) -> FloatArray:
        """Predicted seconds [samples]; NaN where nothing of the kind was fitted."""
        result = np.full(len(samples), np.nan)
        groups: dict[tuple[str, str], list[int]] = {}
        for index, sample in enumerate(samples):
            groups.setdefault((sample.kind, sample.case.get("implementation", self.main)), []).append(index)
        for (kind, implementation), members in groups.items():
            profile = self.profiles.get(implementation)
            where = [index for index in members if profile is not None and _known(profile, samples[index])]
            if profile is not None and where:
                result[where] = _predicted(profile, kind, [samples[index] for index in where])
        return result


def fit(samples: Sequence[Sample], environment: Environment, *, intervals: bool = True) -> Fitted:
    """Fit a profile to training samples; without ``intervals`` nothing is resampled.

    Raises:
        InvalidInput: there are no matrix products or no memory-bound ops among them.
    """
    found = by_kind(samples)
    if "gemm" not in found or "memory" not in found:
        raise invalid("a fit needs matrix products and memory-bound ops of several shapes; measure more of them")
    implementations = [each.case["implementation"] for each in found.get("layer", []) + found.get("grouped_gemm", [])]
    main = max(sorted(set(implementations)), key=implementations.count, default="batched")
    profile, curves = blank(found, environment), list[Curve]()
    fastest = max(each.case["bytes"] / each.seconds for each in found["memory"])
    profile = _fitted(profile, "kernels.memory", found["memory"], forms.memory(fastest), curves, intervals)
    if choices := routing_samples(samples):
        profile = _fitted(profile, "kernels.memory.routing", choices, forms.routing(), curves, intervals)
    for form in profile.kernels.gemm:
        chosen = [each for each in found["gemm"] if each.case["form"] == form]
        path = f"kernels.gemm.{form}"
        listed = forms.products(path, grouped=False, device=environment.kind)
        profile = _fitted(profile, path, chosen, listed, curves, intervals)
    for kind in profile.kernels.attention:
        chosen = [each for each in found["attention"] if attention_kind(each.case) == kind]
        path = f"kernels.attention.{kind}"
        listed = forms.attention(path, profile.accelerator.peak["bf16"].value)
        profile = _fitted(profile, path, chosen, listed, curves, intervals)
    if exchanges := found.get("all_to_all"):
        ranks = [each.case["ranks"] for each in exchanges]
        profile = _fitted(profile, "all_to_all", exchanges, forms.all_to_all(ranks), curves, intervals)
    profiles = {}
    for name in sorted(set(implementations) | {main}):
        profiles[name] = _with_experts(profile, name, found.get("grouped_gemm", []), environment, curves, intervals)
    fitted = Fitted(profiles, main, curves)
    _compose(fitted, found, 100 if intervals else 1)
    return fitted


def by_kind(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples by kind, without the choice of experts: it is bound by launches and rows, not by bytes."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.case.get("op") not in ROUTING:
            found.setdefault(sample.kind, []).append(sample)
    return found


def _fitted(
    profile: HardwareProfile,
    path: str,
    samples: Sequence[Sample],
    listed: Sequence[Form],
    curves: list[Curve],
    intervals: bool,
) -> HardwareProfile:
    """The profile with one curve fitted, in the form that predicts left-out shapes best."""
    seconds = seconds_by_profile(samples[0].kind, [each.case for each in samples])
    data = Data(
        np.array([each.seconds for each in samples]),
        np.array([each.weight for each in samples]),
        [each.shape for each in samples],
    )

    def predict_in(form: Form) -> Any:
        fixed = with_values(profile, form.fixed)
        names = [each.path for each in form.parameters]
        return lambda at: seconds(with_values(fixed, dict(zip(names, at, strict=True))))

    errors = {form.name: cross_validated(form.parameters, predict_in(form), data) for form in listed}
    if len(listed) > 1:
        limit = min(errors.values()) * SIMPLER
        form = min((each for each in listed if errors[each.name] <= limit), key=lambda each: len(each.parameters))
    else:
        form = listed[0]
    found = solution(form.parameters, predict_in(form), data, resamples=RESAMPLES if intervals else 0)
    curves.append(Curve(path, form, errors, found, samples))
    values = dict(zip([each.path for each in form.parameters], map(float, found.values), strict=True))
    return with_values(with_values(profile, form.fixed), values)


def _with_experts(
    profile: HardwareProfile,
    name: str,
    products: Sequence[Sample],
    environment: Environment,
    curves: list[Curve],
    intervals: bool,
) -> HardwareProfile:
    """The profile with the expert products of one implementation."""
    chosen = [each for each in products if each.case["implementation"] == name]
    for form in sorted({each.case["form"] for each in chosen}):
        path = f"kernels.grouped_gemm.{form}"
        listed = forms.products(path, grouped=True, device=environment.kind)
        own = [each for each in chosen if each.case["form"] == form]
        if len({each.shape for each in own}) < FEWEST_SHAPES:
            continue
        curves_here: list[Curve] = []
        profile = _fitted(with_product(profile, form), path, own, listed, curves_here, intervals)
        curves += [replace(each, implementation=name) for each in curves_here]
    return profile


def _known(profile: HardwareProfile, sample: Sample) -> bool:
    """Whether the profile has the curves that a case needs."""
    form, kernels = sample.case.get("form"), profile.kernels
    experts = form in kernels.grouped_gemm
    return {
        "gemm": form in kernels.gemm,
        "grouped_gemm": experts,
        "attention": sample.kind == "attention" and attention_kind(sample.case) in kernels.attention,
        "memory": sample.case.get("op") not in ROUTING,
        "all_to_all": "all_to_all" in profile.tiers[0].collectives,
        "layer": experts and form in kernels.gemm,
        "step": experts and form in kernels.gemm and "mha" in kernels.attention,
        "expert_parallel_layer": experts and "all_to_all" in profile.tiers[0].collectives,
    }[sample.kind]


def _predicted(profile: HardwareProfile, kind: str, samples: Sequence[Sample]) -> FloatArray:
    cases = [each.case for each in samples]
    if kind == "layer":
        return np.array([sum(layer_seconds(case, profile)) for case in cases])
    if kind == "step":
        return np.array([step_seconds(case, profile) for case in cases])
    if kind == "expert_parallel_layer":
        return np.array([sum(expert_parallel_seconds(case, profile)) for case in cases])
    return piece_seconds(profile, kind, cases)


# --- composition and stacks -------------------------------------------------------------------------------------------


def _compose(fitted: Fitted, found: Mapping[str, Sequence[Sample]], draws: int) -> None:
    """Factors of whole layers over their kernels, then of ranks side by side over one rank alone."""
    layers = [each for each in found.get("layer", ()) if _known_in(fitted, each)]
    if layers:
        sums = np.array([layer_seconds(each.case, fitted.profiles[each.case["implementation"]]) for each in layers])
        alone = np.array([each.case["which"] == "F" for each in layers])
        seconds = np.array([each.seconds for each in layers])
        forward = _factor(seconds[alone], sums[alone, 0], np.zeros(int(alone.sum())), draws)
        backward = _factor(seconds[~alone], sums[~alone, 1], forward[0] * sums[~alone, 0], draws)
        fitted.factors.update({"composition.forward": forward, "composition.backward": backward})
        values = {"kernels.composition.forward": forward[0], "kernels.composition.backward": backward[0]}
        for name, profile in fitted.profiles.items():
            fitted.profiles[name] = with_values(with_composition(profile), values)
    for ranks in sorted({int(each.case["ranks"]) for each in found.get("expert_parallel_layer", ())}):
        shared = [each for each in found["expert_parallel_layer"] if each.case["ranks"] == ranks]
        shared = [each for each in shared if _known_in(fitted, each)]
        if not shared:
            continue
        parts = [expert_parallel_seconds(each.case, fitted.profiles[each.case["implementation"]]) for each in shared]
        compute, moved = np.array(parts).T
        factor = _factor(np.array([each.seconds for each in shared]), compute, moved, draws)
        fitted.factors[ranks_stack(ranks)] = factor
        for name, profile in fitted.profiles.items():
            stack = profile.stacks["pytorch"]
            gap = stack.gap_fraction.model_copy(update={"value": max(0.0, factor[0] - 1.0), "kind": "fitted"})
            beside = stack.model_copy(update={"gap_fraction": gap})
            stacks = {**profile.stacks, ranks_stack(ranks): beside}
            fitted.profiles[name] = profile.model_copy(update={"stacks": stacks})


def _known_in(fitted: Fitted, sample: Sample) -> bool:
    profile = fitted.profiles.get(sample.case["implementation"])
    return profile is not None and _known(profile, sample)


def _factor(seconds: FloatArray, scaled: FloatArray, fixed: FloatArray, draws: int) -> tuple[float, float, float]:
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


__all__ = ["Curve", "Fitted", "by_kind", "fit"]
