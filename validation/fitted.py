"""What a fit leaves: a profile for each implementation of the experts, how each curve was fitted, and predictions.

Implementations share everything but the expert products. A prediction is NaN where nothing of the kind was fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from simulator.spec.hardware import HardwareProfile
from simulator.timing.kernels import FloatArray
from validation.compose import expert_parallel_seconds, layer_seconds, step_seconds
from validation.forms import Form, with_values
from validation.least_squares import Solution
from validation.predict import ROUTING, Case, attention_kind, piece_seconds, seconds_by_profile
from validation.samples import Sample


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
            where = [index for index in members if profile is not None and known(profile, samples[index])]
            if profile is not None and where:
                result[where] = _predicted(profile, kind, [samples[index] for index in where])
        return result


def known(profile: HardwareProfile, sample: Sample) -> bool:
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


__all__ = ["Curve", "Fitted", "known"]
