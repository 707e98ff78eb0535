"""From a recording of a machine to its hardware profile, and whether that profile may be believed.

The profile is fitted to all shapes. What it is worth is said by the fits to half of them: the errors on the other half
(:mod:`validation.holdout`), beside the noise floor and two simple rules that know nothing but FLOPs. A profile that
does not beat those rules on whole layers is not written unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simulator import errors
from validation.fit import fit
from validation.fitted import Fitted
from validation.holdout import Errors, Held, by_category, held_out
from validation.holdout import errors as errors_of
from validation.records import Recording
from validation.samples import Sample, samples
from validation.steadiness import Noise, noise, steadier
from validation.suites import Name, launch

LAYERS = ("layer forward", "layer forward and backward")
"""What a profile must predict better than the simple rules."""


@dataclass(frozen=True)
class Row:
    """A category: errors of the profile, of one fixed rate and of a rate with overhead, and what two passes differ."""

    name: str
    profile: Errors | None
    rate: Errors | None
    overhead: Errors | None
    noise: float | None

    def as_dict(self) -> dict[str, Any]:
        """Errors as shares."""
        found = {name: getattr(self, name) for name in ("profile", "rate", "overhead")}
        mape = {name: None if each is None else each.mape for name, each in found.items()}
        cases = 0 if self.profile is None else self.profile.cases
        median = None if self.profile is None else self.profile.median
        bias = None if self.profile is None else self.profile.bias
        return {"name": self.name, "cases": cases, "median": median, "bias": bias, "noise": self.noise, **mape}


@dataclass(frozen=True)
class Calibration:
    """A recorded machine, what was fitted to it, and what was predicted of held-out shapes."""

    recording: Recording
    samples: Sequence[Sample]
    fitted: Fitted
    held: Sequence[Held]

    def rows(self) -> list[Row]:
        """Errors by category."""
        floor = {kind: each.mape for kind, each in self.noise().items()}
        return [
            Row(
                name,
                errors_of(each.error() for each in members),
                errors_of(each.error("rate") for each in members),
                errors_of(each.error("overhead") for each in members),
                floor.get(name, floor.get(members[0].sample.kind)),
            )
            for name, members in sorted(by_category(self.held).items())
        ]

    def noise(self) -> dict[str, Noise]:
        """Differences of the second pass from the first, by kind."""
        return noise(steadier(self.recording.records))

    def beaten_by(self) -> list[str]:
        """Categories of whole layers (without any: of products over 1 ms) that a simple rule predicts better."""
        rows = {row.name: row for row in self.rows()}
        judged = [rows[name] for name in LAYERS if name in rows] or [
            rows[n] for n in ("products over 1 ms",) if n in rows
        ]
        return [
            row.name
            for row in judged
            for simple in (row.rate, row.overhead)
            if row.profile is None or (simple is not None and simple.mape <= row.profile.mape)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Environment, errors, forms and parameters as plain data."""
        curves = [
            {
                "curve": curve.name,
                "form": curve.form.name,
                "left_out_error": dict(curve.errors),
                "parameters": {
                    path: {"value": value, "low": low, "high": high}
                    for path, (value, low, high) in curve.intervals().items()
                },
            }
            for curve in self.fitted.curves
        ]
        factors = {
            name: {"value": each[0], "low": each[1], "high": each[2]} for name, each in self.fitted.factors.items()
        }
        rows = [row.as_dict() for row in self.rows()]
        environment = vars(self.recording.environment)
        return {
            "environment": environment,
            "errors": rows,
            "curves": curves,
            "factors": factors,
            "beaten_by": self.beaten_by(),
        }


def require_torch() -> None:
    """Refuse to measure without PyTorch.

    Raises:
        InvalidInput: it is not installed.
    """
    if find_spec("torch") is None:
        raise errors.invalid("measuring needs PyTorch: pip install 'moesim[validation]'")


def measure(suite: Name, records: Path, *, passes: int = 2) -> None:
    """Time a suite on this machine; what the file of records already has is not measured again.

    Raises:
        InvalidInput: PyTorch is missing, or the measurement failed; its own message is on stderr.
    """
    require_torch()
    if code := launch(suite, records, passes=passes):
        if code == 130:
            raise KeyboardInterrupt
        raise errors.invalid("the measurement stopped; the message is above", origin=errors.Origin(str(records)))


def calibrated(recording: Recording) -> Calibration:
    """Fit and judge a recording.

    Raises:
        InvalidInput: it holds too little to fit a profile.
    """
    found = samples(recording.records)
    fitted = fit(found, recording.environment)
    return Calibration(recording, found, fitted, held_out(found, recording.environment))


__all__ = ["LAYERS", "Calibration", "Row", "calibrated", "measure", "require_torch"]
