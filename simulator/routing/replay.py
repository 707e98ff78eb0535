"""Recorded loads: counts [step, layer, expert] from a CSV or npz file, in place of a load model.

Only the relative load counts: each (step, layer) is scaled to the tokens of the scenario. Recorded steps stand for
microbatches, and layers for the MoE layers of the model, those of an encoder first.
"""

from __future__ import annotations

import csv
import itertools
import math
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np

from simulator import errors
from simulator.errors import Origin
from simulator.routing.load import FloatArray, IntArray
from simulator.spec.library import data_folder, exists
from simulator.spec.routing import ReplayLoad
from simulator.units import shown

PATH = "routing.load.file"
VALUES = ("count", "load", "relative_load")
MAX_BYTES = 500_000_000
_SLACK = 1.05
"""Recorded loads may exceed the ceiling E / k by rounding and reading error, not by more."""


def recorded(load: ReplayLoad, layers: int, experts: int, top_k: int, *, encoder: int = 0, mtp: int = 0) -> FloatArray:
    """Chances of the experts [steps, layers, experts] that a recording states; rows sum to top_k.

    ``layers``: MoE layers of the model, of which the first ``encoder`` belong to an encoder and the last ``mtp`` to
    MTP modules. A file may lack those of MTP modules: its last layer then stands for them.

    Raises:
        InvalidInput: no such file, not a recording, or one of other layers, experts or top_k.
    """
    file = _find(load.file)
    counts = _counts(load, file)
    _, found_layers, found_experts = counts.shape
    if found_experts != experts:
        _stop(file, f"holds loads of {found_experts} experts, but the model has {experts}")
    if found_layers not in (layers, layers - mtp):
        parts = ((encoder, "the encoder, which come first"), (mtp, "MTP modules"))
        more = "".join(f", {count} of them of {part}" for count, part in parts if count)
        _stop(file, f"holds loads of {found_layers} layers, but the model has {layers} MoE layers{more}")
    counts = np.concatenate([counts, *[counts[:, -1:]] * (layers - found_layers)], axis=1)
    counts = counts / np.maximum(counts.max(-1, keepdims=True), 1e-300)
    total = counts.sum(-1, keepdims=True)
    if (total <= 0).any():
        step, layer = np.argwhere(total[..., 0] <= 0)[0]
        _stop(file, f"step {step}, layer {layer}: no expert has any load")
    chances = counts / total * top_k
    if chances.max() > _SLACK:
        step, layer, expert = np.unravel_index(int(chances.argmax()), chances.shape)
        most, load_ = experts / top_k, chances.max() * experts / top_k
        _stop(
            file,
            f"step {step}, layer {layer}, expert {expert} has {load_:.4g} times the mean load; a token uses an expert "
            f"once, so that top-{top_k} of {experts} allows {most:.4g}",
        )
    return np.asarray(np.minimum(chances, 1.0))


def recorded_steps(load: ReplayLoad) -> int:
    """Steps that a recording holds."""
    return len(_counts(load, _find(load.file)))


def steps_as_microbatches(steps: int, microbatches: int) -> IntArray:
    """Recorded step that stands for each microbatch [microbatches].

    In order and repeated as needed; of more steps than microbatches those are taken that are evenly spaced, so that
    the whole recording counts and not its beginning.

    >>> steps_as_microbatches(2, 5).tolist(), steps_as_microbatches(10, 4).tolist()
    ([0, 1, 0, 1, 0], [0, 2, 5, 7])
    """
    each = np.arange(microbatches)
    return each * steps // microbatches if steps > microbatches else each % steps


def _find(name: str) -> Path:
    for candidate in (Path(name), data_folder("scenarios") / name):
        if exists(candidate):
            if candidate.is_dir():
                _stop(candidate, "is a directory; give a CSV or npz file")
            if not candidate.is_file():
                _stop(candidate, "is not a file; give a CSV or npz file")
            _check_size(candidate, candidate.stat().st_size)
            return candidate
    raise errors.invalid(f"no such file: {shown(name)}", path=PATH)


def _check_size(file: Path, size: int) -> None:
    if size > MAX_BYTES:
        _stop(file, f"has {size / 1e6:.0f} MB; at most {MAX_BYTES / 1e6:.0f} MB are read")


def _counts(load: ReplayLoad, file: Path) -> FloatArray:
    return _read(str(file), file.stat().st_mtime_ns, tuple(sorted(load.where.items())))


@lru_cache(maxsize=8)
def _read(name: str, changed: int, where: tuple[tuple[str, str | int], ...]) -> FloatArray:
    """Counts [steps, layers, experts] of a file, unscaled."""
    file = Path(name)
    if file.suffix != ".npz":
        return _csv(file, dict(where))
    if where:
        raise errors.invalid("chooses rows of a CSV; an npz file has none", path="routing.load.where")
    counts = _npz(file)
    if not np.isfinite(counts).all() or (counts < 0).any():
        _stop(file, "loads must be finite and not negative")
    return counts


def _npz(file: Path) -> FloatArray:
    try:
        with zipfile.ZipFile(file) as packed:
            _check_size(file, sum(member.file_size for member in packed.infolist()))
        with np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
            name = "counts" if "counts" in names else names[0] if len(names) == 1 else None
            if name is None:
                _stop(file, f"holds the arrays {', '.join(names) or 'none'}; name one of them counts")
            counts = np.asarray(archive[name])
    except errors.MoesimError:
        raise
    except Exception:  # numpy lets through what zip, zlib, its header's parser and the memory allocation raise
        _stop(file, "is not an npz file of plain numbers")
    if counts.ndim != 3 or counts.dtype.kind not in "iuf" or not counts.size:
        _stop(file, f"must hold numbers [step, layer, expert], not {counts.dtype} {list(counts.shape)}")
    return counts.astype(np.float64)


def _csv(file: Path, where: dict[str, str | int]) -> FloatArray:
    """Long form: a row per step, layer and expert; lines that start with # are comments."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip() and line[0] != "#")
            return _table(file, lines, where)
    except (OSError, UnicodeDecodeError, csv.Error):
        _stop(file, "cannot be read as CSV text")


def _table(file: Path, lines: Iterator[tuple[int, str]], where: dict[str, str | int]) -> FloatArray:
    numbers: list[int] = []

    def texts() -> Iterator[str]:
        for number, line in lines:
            numbers.append(number)
            yield line

    reader = csv.DictReader(texts(), strict=True)
    columns = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    value = next((name for name in VALUES if name in columns), None)
    if value is None or not {"layer", "expert"} <= set(columns):
        header = ", ".join(columns[:8]) or "nothing"
        _stop(file, f"needs the columns layer, expert and one of {', '.join(VALUES)}; found {header}", numbers[:1])
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        _stop(file, f"has two columns {shown(twice)}", numbers[:1])
    for column in where:
        if column not in columns:
            raise errors.invalid(errors.one_of(column, columns, "column"), path="routing.load.where")
    found: dict[tuple[int, int, int], float] = {}
    for row in reader:
        line = numbers[-1:]
        if None in row or None in row.values():
            _stop(file, f"a row must have the {len(columns)} columns of the header", line)
        if any(row[column].strip() != str(wanted) for column, wanted in where.items()):
            continue
        try:
            key = (int(row.get("step", 0)), int(row["layer"]), int(row["expert"]))
            number = float(row[value])
        except ValueError:
            _stop(file, f"step, layer and expert must be whole numbers and {value} a number", line)
        if not 0.0 <= number < math.inf:
            _stop(file, f"loads must be finite and not negative (got {shown(row[value].strip())})", line)
        if key in found:
            others = [name for name in columns if name not in ("step", "layer", "expert", value, *where)]
            way = f"; choose with routing.load.where: {{{others[0]}: ...}}" if others else ""
            _stop(file, f"a second load of step {key[0]}, layer {key[1]}, expert {key[2]}{way}", line)
        found[key] = number
    if not found:
        chosen = ", ".join(f"{key} {wanted}" for key, wanted in where.items())
        _stop(file, f"has no row{f' with {chosen}' if chosen else ''}")
    return _dense(file, found)


def _dense(file: Path, found: dict[tuple[int, int, int], float]) -> FloatArray:
    """Every combination of the steps, layers and experts must be there."""
    axes = [sorted({key[axis] for key in found}) for axis in range(3)]
    shape = tuple(len(axis) for axis in axes)
    if len(found) != math.prod(shape):
        step, layer, expert = next(key for key in itertools.product(*axes) if key not in found)
        have = f"{len(found)} rows; {' x '.join(map(str, shape))} steps, layers and experts need {math.prod(shape)}"
        _stop(file, f"has {have}; step {step}, layer {layer}, expert {expert} is missing")
    places = [{label: index for index, label in enumerate(axis)} for axis in axes]
    counts = np.empty(shape)
    for key, number in found.items():
        counts[places[0][key[0]], places[1][key[1]], places[2][key[2]]] = number
    return counts


def _stop(file: Path, message: str, lines: list[int] | None = None) -> NoReturn:
    raise errors.invalid(message, path=PATH, origin=Origin(str(file), lines[0] if lines else None, None))
