"""What a prediction must beat: one fixed rate, and one fixed rate with an overhead.

    t = work / rate                  one fixed MFU (or one bandwidth)
    t = overhead + work / rate       MFU and overhead

Work is the FLOPs that are computed, padded rows and all, or the bytes that are moved. Both rules are fitted to the same
training samples as the curves, for every kind apart and by the same robust least squares, and judged on the same
held-out samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.layout import resolve
from simulator.routing import expert_load
from simulator.spec import load_profile
from simulator.timing.kernels import FloatArray
from simulator.workload.feed_forward import expert_ops
from simulator.workload.flops import count, op_flop_per_token
from simulator.workload.ops import GroupedGemm
from validation.compose import layer_load, layer_scenario, step_scenario
from validation.least_squares import Data, Parameter, solve
from validation.predict import Case, attention_flop, exchanged_bytes
from validation.samples import Sample

RULES = ("rate", "overhead")
"""One fixed rate; a rate and an overhead."""
SOME_PROFILE = "h100-sxm"
"""Completes the scenario of a layer or step, whose FLOPs do not depend on it."""


def work(sample: Sample) -> float:
    """FLOPs or bytes of a sample."""
    return case_work(sample.kind, sample.case)


def case_work(kind: str, case: Case) -> float:
    """FLOPs or bytes of a case."""
    if kind == "gemm":
        return float(2.0 * case["m"] * case["n"] * case["k"])
    if kind == "grouped_gemm":
        return float(2.0 * sum(case["counts"]) * case["n"] * case["k"])
    if kind == "attention":
        return attention_flop(case) * (2.5 if case["which"] == "I" else 1.0)
    if kind == "routing":
        return float(case["tokens"])
    if kind == "memory":
        return float(case["bytes"])
    if kind == "all_to_all":
        return max(exchanged_bytes(case, "total"), 1.0)
    counted = {**case, "form": "bf16"}  # FLOPs are the same in every format and on every machine
    return _step_flop(counted) if kind == "step" else _layer_flop(counted)


def _layer_flop(case: Case) -> float:
    """FLOPs of a layer on one rank, three times the forward's for forward and backward."""
    rows = float(layer_load(case).computed.sum())
    forward = sum(
        2.0 * op.n * op.k * rows if isinstance(op, GroupedGemm) else op_flop_per_token(op) * case["tokens"]
        for op in expert_ops(layer_scenario(case, load_profile(SOME_PROFILE)).model)
    )
    return forward * (3.0 if case["which"] == "FB" else 1.0)


def _step_flop(case: Case) -> float:
    scenario = step_scenario(case, load_profile(SOME_PROFILE))
    load = expert_load(scenario, resolve(scenario))
    rows = 1.0 if load is None else float(load.computed.sum()) / float(load.assigned.sum())
    tokens = int(case["sequence_length"]) * int(case["sequences"])
    return count(scenario, computed_rows=rows).hardware_flop_per_token * tokens


def fitted(rule: str, amounts: FloatArray, samples: Sequence[Sample]) -> FloatArray:
    """The values of a rule on training samples: rate, and the overhead where the rule has one."""
    seconds = np.array([sample.seconds for sample in samples])
    usual = float(np.exp(np.mean(np.log(amounts / seconds))))
    parameters = [Parameter("rate", usual, usual * 1e-3, usual * 1e3)]
    if rule == "overhead":
        parameters.append(Parameter("overhead", float(seconds.min()) * 0.1, 1e-9, float(seconds.max())))
    data = Data(seconds, np.ones(len(seconds)), [sample.shape for sample in samples])
    return solve(parameters, lambda values: predicted(values, amounts), data)


def predicted(values: FloatArray, amounts: FloatArray) -> FloatArray:
    """Seconds of amounts of work by a fitted rule."""
    return np.asarray(amounts / values[0] + (values[1] if len(values) > 1 else 0.0))


__all__ = ["RULES", "case_work", "fitted", "predicted", "work"]
