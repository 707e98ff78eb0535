"""Predictions of timed layers, steps and exchanges against the times: the recorded machines, and this one, live.

``moesim validate --calibration`` fits every recording in ``validation/measured`` on half of its shapes and judges the
other half (:mod:`validation.holdout`), with the noise floor and the two simple rules beside each target. Targets of a
CPU core and of a GPU differ: a shared core changes its speed by more than a GPU's prediction may miss.
``moesim validate --live`` times one training step on this machine and compares it with a profile's estimate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simulator import errors, simulate_step
from simulator.spec import Scenario
from validation import baselines
from validation.calibrate import Calibration, calibrated, require_torch
from validation.checks import Check, at_most, near, within
from validation.holdout import Errors, Held, by_category, ratio_error, ratios
from validation.holdout import errors as errors_of
from validation.records import Recording, read
from validation.samples import samples
from validation.suites import ALLOCATOR

FOLDER = Path(__file__).parent / "measured"
LIVE_SHARE = 0.25
"""A live step may miss by this much: one core of a shared machine changes its speed by as much within seconds."""

Statistic = Literal["mape", "median"]


@dataclass(frozen=True)
class Target:
    """What the error of a category may be at most; ``which`` prediction is judged."""

    category: str
    most: float
    statistic: Statistic = "mape"
    which: Literal["predicted", "pieces"] = "predicted"


TARGETS: dict[str, tuple[Target, ...]] = {
    "cpu": (
        Target("layer forward", 0.08),
        Target("layer forward and backward", 0.10),
        Target("products over 1 ms", 0.12),
        Target("step", 0.12),
        Target("step", 0.08, which="pieces"),
        Target("stride ratio", 0.10),
        Target("capacity-factor ratio", 0.08),
        Target("all_to_all 2 ranks", 0.10),
        Target("all_to_all 3 ranks and more", 0.15),
        Target("expert_parallel_layer", 0.12),
    ),
    "cuda": (
        Target("layer", 0.05),
        Target("grouped_gemm", 0.06, "median"),
        Target("grouped_gemm", 0.09),
        Target("step", 0.05),
        Target("stride ratio", 0.10),
        Target("all_to_all 2 ranks", 0.10),
        Target("expert_parallel_layer", 0.12),
    ),
}

WORDS = {
    "layer": "whole layers",
    "layer forward": "layer, forward",
    "layer forward and backward": "layer, forward and backward",
    "step": "training step",
    "grouped_gemm": "expert products",
    "expert_parallel_layer": "expert-parallel layer",
    "all_to_all 2 ranks": "all-to-all, 2 ranks",
    "all_to_all 3 ranks and more": "all-to-all, 3 ranks and more",
}


KINDS = {"products": "grouped_gemm", "stride": "step", "capacity-factor": "step"}
"""Kind whose passes tell the noise of a category."""


def judge(folder: Path = FOLDER) -> list[Check]:
    """All checks: every recording, then the drops of the reference layer where PyTorch is installed."""
    checks = [check for path in recordings(folder) for check in judge_recording(path.stem, calibration_of(path))]
    if find_spec("torch") is not None:
        from validation.live import drops

        checks += drops()
    return checks


def recordings(folder: Path = FOLDER) -> list[Path]:
    """The recorded machines."""
    return sorted(folder.glob("*.jsonl"))


def calibration_of(path: Path) -> Calibration:
    """A recording, fitted and judged; a file is fitted once."""
    return _calibration(path, path.stat().st_mtime_ns)


@cache
def _calibration(path: Path, changed: int) -> Calibration:
    return calibrated(read(path))


def notices(folder: Path = FOLDER) -> list[str]:
    """What the checks do not cover here, in words."""
    found = []
    if not recordings(folder):
        found.append("validation/measured holds no recording yet: no timing is judged")
    if find_spec("torch") is None:
        found.append("drops are not compared: that needs PyTorch (pip install 'moesim[validation]')")
    return found


def judge_recording(name: str, calibration: Calibration) -> Iterator[Check]:
    """Targets of one recording: reached error, then noise floor and simple rules for the record."""
    environment = calibration.recording.environment
    group, source = f"calibration: {name}", f"{environment.device}, {environment.date[:10]}, held-out shapes"
    floor = {kind: each.mape for kind, each in calibration.noise().items()}
    for target in TARGETS[environment.kind]:
        found = _errors(calibration.held, target.category, target.which)
        if found is None:
            continue
        words = WORDS.get(target.category, target.category)
        words += ", from measured pieces and one factor" if target.which == "pieces" else ""
        words += ", median" if target.statistic == "median" else ", MAPE"
        most, reached = 100.0 * target.most, 100.0 * getattr(found, target.statistic)
        yield at_most(group, words, most, reached, "%", f"{source}, {found.cases} cases")
        kind = KINDS.get(target.category.split()[0], target.category.split()[0])
        if kind in floor and target.statistic == "mape":
            value = 100.0 * floor[kind]
            yield near(group, f"{words}: second pass against first", most, value, "%", None, "noise floor")
        for rule, title in (("rate", "one fixed rate"), ("overhead", "rate and overhead")):
            simple = _errors(calibration.held, target.category, rule)
            if simple is not None and target.which == "predicted":
                value = 100.0 * getattr(simple, target.statistic)
                yield near(group, f"{words}: {title}", most, value, "%", None, "baseline fitted to the same half")


def _errors(held: Sequence[Held], category: str, which: str) -> Errors | None:
    """Errors of a category, of all categories that begin with its name, or of ratios of steps."""
    if category.endswith(" ratio"):
        pairs = ratios(held, category.removesuffix(" ratio").replace("-", "_"))
        return errors_of(ratio_error(first, second, which) for first, second in pairs)
    grouped = by_category(held)
    names = [category] if category in grouped else [name for name in grouped if name.startswith(f"{category} ")]
    return errors_of(each.error(which) for name in names for each in grouped[name])


# --- live -------------------------------------------------------------------------------------------------------------


def judge_live(scenario: Scenario, recording: Recording | None = None, *, device: str = "cpu") -> list[Check]:
    """Time one training step of a scenario on this machine and compare; simple rules from the machine's recording.

    Raises:
        InvalidInput: PyTorch is missing, or the step cannot be run here.
    """
    case = step_case(scenario)
    predicted = simulate_step(scenario).seconds
    timed = _timed({**case, "device": device})
    seconds, source = timed["seconds"], f"{timed['repeats']:.0f} steps on this machine"
    group = "live"
    checks = [within(group, f"step of {scenario.name}", seconds, predicted, "s", LIVE_SHARE, f"least of {source}")]
    checks.append(near(group, "median of the steps", seconds, timed["median_s"], "s", None, source))
    for rule, title in zip(baselines.RULES, ("one fixed MFU", "MFU and overhead"), strict=True):
        known = [each for each in samples(recording.records) if each.kind == "step"] if recording else []
        if known:
            amounts = np.array([baselines.work(each) for each in known])
            wanted = np.array([baselines.case_work("step", case)])
            value = float(baselines.predicted(baselines.fitted(rule, amounts, known), wanted)[0])
            checks.append(near(group, f"{title} of the calibration's steps", seconds, value, "s", None, "baseline"))
    return checks


def step_case(scenario: Scenario) -> dict[str, Any]:
    """The fields of a ``step`` case of a scenario on one accelerator.

    Raises:
        InvalidInput: it has several ranks or microbatches, or a format that a step is not run in.
    """
    training, form = scenario.training, scenario.training.precision.gemm
    sequences = training.steady_batch_sequences
    if scenario.cluster.ranks != 1 or sequences != training.micro_batch_sequences:
        raise errors.invalid("a live step needs one accelerator and one microbatch", path="cluster.accelerators")
    if form not in ("fp32", "bf16"):
        raise errors.invalid(f"a live step is run in fp32 or bf16, not {form}", path="training.precision")
    if not isinstance(training.sequence_length, int):
        raise errors.invalid("a live step needs a decoder-only model", path="training.sequence_length")
    factor = scenario.routing.capacity_factor
    moe = scenario.model.moe
    pad = scenario.routing.pad_to_capacity
    return {
        "which": "step",
        "name": scenario.model.name,
        "form": form,
        "model": scenario.model.model_dump(mode="json", by_alias=True, exclude_none=True),
        "sequence_length": training.sequence_length,
        "sequences": sequences,
        "capacity_factor": moe.capacity_factor if factor == "model" and moe is not None else factor,
        "pad": pad,
        "implementation": "batched" if pad else "loop",
    }


def _timed(fields: dict[str, Any]) -> dict[str, float]:
    """Time a step in a process of its own, which the allocator's settings need."""
    require_torch()
    command = [sys.executable, "-m", "validation.live"]
    done = subprocess.run(
        command, input=json.dumps(fields), env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise errors.invalid(f"the step cannot be run here: {reason}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


__all__ = [
    "FOLDER",
    "TARGETS",
    "calibration_of",
    "judge",
    "judge_live",
    "judge_recording",
    "notices",
    "recordings",
    "step_case",
]
