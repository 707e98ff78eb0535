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
from dataclasses import replace
from typing import Any

import numpy as np

from simulator.errors import invalid
from simulator.spec.hardware import HardwareProfile
from validation import forms
from validation.compose import expert_parallel_seconds, layer_seconds, ranks_stack
from validation.fitted import Curve, Fitted, known
from validation.forms import Form, with_values
from validation.least_squares import RESAMPLES, Data, composition_factor, cross_validated, solution
from validation.machine import blank, with_composition, with_product
from validation.predict import ROUTING, UPDATES, attention_kind, seconds_by_profile
from validation.records import Environment
from validation.samples import Sample, routing_samples

SIMPLER = 1.02
"""A form may be this much worse than the best and still be taken for having fewer parameters."""

FEWEST_SHAPES = 3
"""Layers with expert products of an implementation, below which these are left out of the profile."""


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
    updates = any(each.case["op"] in UPDATES for each in found["memory"])
    fastest = max(each.case["bytes"] / each.seconds for each in found["memory"])
    profile = _fitted(
        profile, "kernels.memory", found["memory"], forms.memory(fastest, updates=updates), curves, intervals
    )
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


# --- composition and stacks -------------------------------------------------------------------------------------------


def _compose(fitted: Fitted, found: Mapping[str, Sequence[Sample]], draws: int) -> None:
    """Factors of whole layers over their kernels, then of ranks side by side over one rank alone."""
    layers = [each for each in found.get("layer", ()) if _known_in(fitted, each)]
    if layers:
        sums = np.array([layer_seconds(each.case, fitted.profiles[each.case["implementation"]]) for each in layers])
        alone = np.array([each.case["which"] == "F" for each in layers])
        seconds = np.array([each.seconds for each in layers])
        forward = composition_factor(seconds[alone], sums[alone, 0], np.zeros(int(alone.sum())), draws)
        backward = composition_factor(seconds[~alone], sums[~alone, 1], forward[0] * sums[~alone, 0], draws)
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
        factor = composition_factor(np.array([each.seconds for each in shared]), compute, moved, draws)
        fitted.factors[ranks_stack(ranks)] = factor
        for name, profile in fitted.profiles.items():
            stack = profile.stacks["pytorch"]
            gap = stack.gap_fraction.model_copy(update={"value": max(0.0, factor[0] - 1.0), "kind": "fitted"})
            beside = stack.model_copy(update={"gap_fraction": gap})
            stacks = {**profile.stacks, ranks_stack(ranks): beside}
            fitted.profiles[name] = profile.model_copy(update={"stacks": stacks})


def _known_in(fitted: Fitted, sample: Sample) -> bool:
    profile = fitted.profiles.get(sample.case["implementation"])
    return profile is not None and known(profile, sample)


__all__ = ["by_kind", "fit"]
