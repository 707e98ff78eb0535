"""DeepSeek-V3's training step against what DeepSeek published of it, part by part.

DeepSeek states the step and its parts (arXiv 2505.09343, Table 4). The layer split over the stages is not published;
other splits stand beside the shipped one for the record. A constant-MFU estimate from DeepSeek-67B shows what one
would have said without a simulator.
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.campaign import Step, simulate_step
from simulator.campaign.result import SECONDS_PER_HOUR
from simulator.events import BUBBLE, action_ledger
from simulator.spec import Scenario, load_scenario
from simulator.workload import flops
from validation.checks import Check, at_most, near, within

GROUP = "DeepSeek-V3 step"
TABLE = "arXiv 2505.09343, Table 4"
STEP_S = 19.926
PARTS = {"1F": 1.13, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, BUBBLE: 2.06, "optimizer": 0.29}
"""Seconds. 1B is the backward for the input."""

STEP_WITHIN, PARTS_WITHIN = 0.10, 0.20
"""Shares of the published step: of its length, and of the absolute errors of its parts together."""

SPLITS = {
    "3, then 14 x 4, then 2 layers with head and MTP": [3, *[4] * 14, {"layers": 2, "with": ["lm_head", "mtp"]}],
    "balanced by FLOPs": "auto",
}

DENSE_HOURS, SPARSE_HOURS = 300_600.0, 180_000.0
"""H800-hours per trillion tokens of DeepSeek-67B (arXiv 2405.04434) and of DeepSeek-V3 (arXiv 2412.19437)."""


def checks() -> Iterator[Check]:
    """Checks of the step, its parts, other layer splits, and the baseline."""
    step = simulate_step(load_scenario("deepseek-v3"))
    yield within(GROUP, "step", STEP_S, step.seconds, "s", STEP_WITHIN, TABLE)
    yield from _parts(step)
    for name, split in SPLITS.items():
        changes = {"parallelism.layers_per_stage": split}
        other = simulate_step(load_scenario("deepseek-v3", changes))
        source = "the split is not published; shipped: 15 x 4, then 1 layer with head and MTP"
        yield near(GROUP, f"step, layers {name}", STEP_S, other.seconds, "s", None, source)
        bubble = action_ledger(other.timeline, other.schedule)[BUBBLE]
        yield near(GROUP, f"bubble, layers {name}", PARTS[BUBBLE], bubble, "s", None, source)
    yield from _baseline(step)


def _parts(step: Step) -> Iterator[Check]:
    """Mean over ranks of the time in lone passes, overlapped pairs, bubble and optimizer."""
    ours = action_ledger(step.timeline, step.schedule)
    for name, seconds in PARTS.items():
        yield near(GROUP, f"part {name}", seconds, ours.get(name, 0.0), "s", None, TABLE)
    for name in sorted(ours.keys() - PARTS.keys()):
        yield near(GROUP, f"part {name}", 0.0, ours[name], "s", None, "not in the table")
    errors = sum(abs(ours.get(name, 0.0) - seconds) for name, seconds in PARTS.items())
    yield at_most(GROUP, "absolute errors of the parts together", PARTS_WITHIN * STEP_S, errors, "s", TABLE)


def _baseline(step: Step) -> Iterator[Check]:
    """Accelerator-hours per trillion tokens: ours, and at the MFU that DeepSeek-67B reached on the same chips."""
    source = "arXiv 2412.19437, section 3.1"
    training = step.scenario.training
    rate = training.steady_batch_sequences * training.tokens_per_sequence / step.seconds
    hours = step.scenario.cluster.accelerators * 1e12 / rate / SECONDS_PER_HOUR
    yield near(GROUP, "accelerator-hours per trillion tokens", SPARSE_HOURS, hours, "h", None, source)
    ratio = _model_flop(step.scenario) / _model_flop(_dense())
    yield near(
        GROUP,
        "the same at the constant MFU of DeepSeek-67B",
        SPARSE_HOURS,
        DENSE_HOURS * ratio,
        "h",
        None,
        "baseline: 300.6 K h of DeepSeek-67B (arXiv 2405.04434, section 3.2.3) x ratio of the model FLOPs per token",
    )


def _model_flop(scenario: Scenario) -> float:
    return flops.count(scenario).model_flop_per_token


def _dense() -> Scenario:
    return load_scenario(
        {
            "name": "DeepSeek-67B",
            "model": "deepseek-67b",
            "cluster": {"profile": "h800-sxm", "accelerators": 8},
            "training": {"tokens": "2T", "sequence_length": 4096, "global_batch_sequences": 8},
        }
    )


__all__ = ["PARTS", "STEP_S", "checks"]
