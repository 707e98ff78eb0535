"""The fitted profile as a YAML file: every number with its provenance, the errors on held-out shapes at the head.

A fitted number says between which bounds 90 % of the fits to resampled shapes lie, and how much its curve missed on
shapes that were left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from validation.calibrate import Calibration
from validation.fitted import Curve
from validation.forms import SOURCE
from validation.holdout import Held
from validation.holdout import errors as errors_of
from validation.machine import source_text

_QUANTITY = re.compile(r"([-+\d.eE]+) ([TGMkmun]?)(FLOP/s|B/s|B|s)")
_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


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


__all__ = ["document", "write", "written"]
