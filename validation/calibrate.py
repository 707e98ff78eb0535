"""From a recording of a machine to its hardware profile, and whether that profile may be believed.

The profile is fitted to all shapes. What it is worth is said by the fits to half of them: the errors on the other half
(:mod:`validation.holdout`), beside the noise floor and two simple rules that know nothing but FLOPs. A profile that
does not beat those rules on whole layers is not written unless that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from simulator import errors
from validation.fit import Curve, Fitted, fit
from validation.forms import SOURCE
from validation.holdout import Errors, Held, by_category, held_out
from validation.holdout import errors as errors_of
from validation.machine import source_text
from validation.records import Noise, Recording, noise, steadier
from validation.samples import Sample, samples
from validation.suites import Name, launch

LAYERS = ("layer forward", "layer forward and backward")
"""What a profile must predict better than the simple rules."""

_QUANTITY = re.compile(r"([-+\d.eE]+) ([TGMkmun]?)(FLOP/s|B/s|B|s)")
_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


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


# --- the profile as a file --------------------------------------------------------------------------------------------


def document(calibration: Calibration) -> str:
    """The profile as YAML, every number with its provenance, fitted ones with interval and held-out error."""
    fitted, rows = calibration.fitted, {row.name: row for row in calibration.rows()}
    tree = fitted.profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    for curve in fitted.curves:
        if curve.implementation not in (None, fitted.main):
            continue
        for path, (_, low, high) in curve.intervals().items():
            found = _leaf_at(tree, path)
            found.update(error=f"{_interval(found['value'], low, high)}{_missed(curve, calibration.held)}")
        for path in curve.form.fixed:
            found = _leaf_at(tree, path)
            if isinstance(found, dict):
                found.update(kind="assumed", note=f"form {curve.form.name!r}, chosen by cross-validation")
    for name, (_, low, high) in fitted.factors.items():
        if name.startswith("composition"):
            _leaf_at(tree, f"kernels.{name}").update(error=_interval(1.0, low, high))
        else:
            gap = tree["stacks"][name]["gap_fraction"]
            gap.update(error=_interval(1.0, low - 1.0, high - 1.0), note="ranks slow each other")
    said = [f"{row.name} {row.profile.mape:.1%}" for row in rows.values() if row.profile is not None]
    tree["sources"][SOURCE] = (
        f"{source_text(calibration.recording.environment)}; MAPE on held-out shapes: {', '.join(said)}"
    )
    stream = StringIO()
    yaml = YAML()
    yaml.width = 118
    yaml.dump(_flowing(tree), stream)
    return "\n".join([*_heading(calibration), "", stream.getvalue()])


def write(calibration: Calibration, path: Path) -> None:
    """Write the profile."""
    path.write_text(document(calibration), encoding="utf-8")


def _heading(calibration: Calibration) -> Iterator[str]:
    yield "# Measured and fitted by moesim calibrate. Mean absolute error on shapes that the fit has not seen:"
    yield f"#   {'':40s}{'cases':>7s}{'profile':>10s}{'fixed MFU':>12s}{'+ overhead':>12s}{'noise':>8s}"
    for row in calibration.rows():
        values = (row.profile, row.rate, row.overhead)
        texts = ["" if each is None else f"{each.mape:.1%}" for each in values]
        floor = "" if row.noise is None else f"{row.noise:.1%}"
        cases = 0 if row.profile is None else row.profile.cases
        yield f"#   {row.name:40s}{cases:7d}{texts[0]:>10s}{texts[1]:>12s}{texts[2]:>12s}{floor:>8s}"


def _interval(value: Any, low: float, high: float) -> str:
    """The bounds of 90 % of the resampled values, in the unit of the value."""
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    least, most = (f"{bound:.3g}" if match is None else written(f"{bound} {match[3]}") for bound in (low, high))
    return f"90 % of resamples {least} to {most}"


def _missed(curve: Curve, held: Sequence[Held]) -> str:
    """The error of a curve's cases where they were held out."""
    own = {sample.key for sample in curve.samples}
    found = errors_of(each.error() for each in held if each.sample.key in own)
    return "" if found is None else f"; {found.mape:.1%} MAPE held out"


def _leaf_at(tree: Any, path: str) -> Any:
    node = tree
    for name in path.split("."):
        node = node[int(name)] if isinstance(node, list) else node.get(name)
    return node


def _flowing(node: Any) -> Any:
    """Mappings in the order of the contract; numbers with their provenance on one line, with four digits."""
    if isinstance(node, list):
        return [_flowing(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    result = CommentedMap((name, _flowing(value)) for name, value in node.items())
    if "value" in node and "source" in node:
        result["value"] = written(node["value"])
        result.fa.set_flow_style()
    return result


def written(value: Any) -> Any:
    """A number as a person would write it.

    >>> written("95123456789.1 FLOP/s"), written("8.1234e-06 s"), written(0.123456), written(132)
    ('95.12 GFLOP/s', '8.123 us', 0.1235, 132)
    """
    if isinstance(value, float):
        return float(f"{value:.4g}")
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    number, unit = float(match[1]) * _PREFIXES[match[2]], match[3]
    prefixes = [each for each in _PREFIXES if each == "" or (each in "mun") == (unit == "s")]
    prefix = next((each for each in prefixes if number >= _PREFIXES[each]), "")
    return f"{number / _PREFIXES[prefix]:.4g} {prefix}{unit}"


__all__ = ["LAYERS", "Calibration", "Row", "calibrated", "document", "measure", "require_torch", "write", "written"]
