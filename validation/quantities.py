"""What a printed number of a training run means, and how it is formed from a step.

Sources print the same run in different numbers: seconds, tokens per second, TFLOP/s per accelerator, MFU. All of them
follow from the step time, the batch and a FLOP convention. Here each name stands for its unit and for the way it is
formed; the prediction is formed in the same way as the measurement, so that conventions cannot become errors.

FLOP conventions: the causal count takes the lower triangle of the attention matrix, the non-causal count all of it
(arXiv 2505.09343, Table 4). Some sources also count the second forward pass of full recomputation (arXiv 2104.04473,
equation 3) or the multi-token-prediction module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from simulator.spec.scenario import Scenario
from simulator.workload import flops
from simulator.workload.blocks import blocks

UNITS: Mapping[str, str] = {
    "step_time_s": "s",
    "step_time_ms": "ms",
    "tokens_per_s_per_accelerator": "tokens/s",
    "samples_per_s": "1/s",
    "tflop_per_s_per_accelerator": "TFLOP/s",
    "mfu_percent": "%",
    "mfu": "",
    "mfu_noncausal": "",
    "bubble_s": "s",
    "gpu_hours": "GPU-hours",
    "gpu_hours_per_trillion_tokens": "GPU-hours",
    "parameters_total": "",
    "parameters_per_rank": "",
    "memory_peak_gib": "GiB",
    "states_gib": "GiB",
    "activations_gib": "GiB",
    "activations_gb": "GB",
    "weights_and_gradients_gib": "GiB",
    "weights_and_gradients_gb": "GB",
    "optimizer_gib": "GiB",
    "optimizer_gb": "GB",
}
"""Every quantity that evidence may state, with the unit in which it is printed."""

_SIZES = {"gib": 2.0**30, "gb": 1e9}

_TERMS = {
    "states": ("weights_", "gradients_", "optimizer_"),
    "activations": ("saved_",),
    "weights_and_gradients": ("weights_", "gradients_"),
    "optimizer": ("optimizer_",),
    "memory_peak": ("",),
}
"""Beginnings of the memory ledger's terms that a memory quantity sums up."""


class Convention(BaseModel):
    """Which FLOPs of a token a source counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flop: Literal["causal", "noncausal"] = "causal"
    recompute_counted: bool = False
    mtp_counted: bool = False


def flop_per_token(scenario: Scenario, convention: Convention) -> float:
    """Training FLOPs per token under a source's convention.

    Three forwards of the main model with LM head, without embedding and router; one more forward of every layer where
    full recomputation is counted, and three of the MTP module where it is.
    """
    causal = convention.flop == "causal"
    counted = flops.count(scenario)
    total = counted.model_flop_per_token if causal else counted.model_flop_per_token_noncausal
    if convention.mtp_counted:
        forward = counted.forward if causal else counted.forward_noncausal
        total += flops.TRAINING_PASSES * dict(forward).get("mtp", 0.0)
    if convention.recompute_counted and scenario.training.recompute == "full":
        training = scenario.training
        total += sum(
            training.length(block.stack)
            / training.tokens_per_sequence
            * flops.block_flop_per_token(block, causal=causal)
            for block in blocks(scenario)
            if block.kind == "layer"
        )
    return total


def from_step_time(name: str, step_time_s: float, scenario: Scenario, convention: Convention) -> float:
    """A quantity of time or speed in its printed unit, formed from the step time.

    Raises:
        KeyError: the quantity does not follow from the step time alone.
    """
    training, cluster = scenario.training, scenario.cluster
    if name in ("step_time_s", "step_time_ms"):
        return step_time_s * (1e3 if name.endswith("ms") else 1.0)
    sequences = training.steady_batch_sequences
    if name == "samples_per_s":
        return sequences / step_time_s
    tokens_per_s = sequences * training.tokens_per_sequence / step_time_s / cluster.accelerators
    if name == "tokens_per_s_per_accelerator":
        return tokens_per_s
    if name in ("gpu_hours", "gpu_hours_per_trillion_tokens"):
        tokens = training.tokens if name == "gpu_hours" else 1e12
        return tokens / tokens_per_s / 3600.0
    if name in ("mfu", "mfu_noncausal"):
        convention = Convention(flop="causal" if name == "mfu" else "noncausal")
    rate = tokens_per_s * flop_per_token(scenario, convention)
    if name == "tflop_per_s_per_accelerator":
        return rate / 1e12
    share = rate / float(cluster.profile.accelerator.peak["bf16"].value)
    return {"mfu": 1.0, "mfu_noncausal": 1.0, "mfu_percent": 100.0}[name] * share


def step_time_behind(name: str, value: float, scenario: Scenario, convention: Convention) -> float:
    """The step time in seconds that a printed quantity stands for: the inverse of :func:`from_step_time`.

    Raises:
        KeyError: as there.
    """
    at_one_second = from_step_time(name, 1.0, scenario, convention)
    grows = name.startswith(("step_time", "gpu_hours"))
    return value / at_one_second if grows else at_one_second / value


def from_memory(name: str, terms: Mapping[str, float]) -> float:
    """A memory quantity in its printed unit: the sum of the ledger's terms that it covers, in bytes before.

    >>> from_memory("states_gib", {"weights_dense": 2.0**30, "optimizer_dense": 2.0**31, "saved_norm": 5.0})
    3.0

    Raises:
        KeyError: no such memory quantity.
    """
    kind, _, unit = name.rpartition("_")
    return sum(value for term, value in terms.items() if term.startswith(_TERMS[kind])) / _SIZES[unit]


__all__ = ["UNITS", "Convention", "flop_per_token", "from_memory", "from_step_time", "step_time_behind"]
