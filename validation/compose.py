"""Seconds of a measured layer or training step by a hardware profile, on the way that an estimate goes.

A case becomes a scenario: its model as a preset, one accelerator for each rank, every format as the PyTorch code has
it. A layer is the expert part of one block: its op list (:func:`simulator.workload.feed_forward.expert_ops`) priced by
:class:`~simulator.timing.Pricer` under the recorded counts, so that padding and skew cost what they cost. A step is
:func:`simulator.campaign.simulate_step`. An expert-parallel layer waits at each exchange for its slowest rank.

The same whole can be had without any curve: :func:`measured_seconds` adds the pieces that were timed alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from simulator.campaign import simulate_step
from simulator.layout import Layout, resolve
from simulator.routing import ExpertLoad, capacity
from simulator.routing.placement import contiguous
from simulator.spec import Scenario, load_scenario
from simulator.spec.hardware import HardwareProfile
from simulator.timing import Pricer
from simulator.timing.classes import Compute, Exchange, Item
from simulator.timing.kernels import FloatArray, Pass
from simulator.workload.feed_forward import expert_ops
from simulator.workload.ops import Collective
from validation.predict import Case

ROLES = {
    "fp32": dict.fromkeys(
        [
            *("gemm", "attention", "router", "lm_head", "weights", "dispatch", "combine", "gradient_reduce"),
            *("saved_activations", "saved_attention_output", "residual"),
        ],
        "fp32",
    ),
    "bf16": {"saved_attention_output": "bf16"},
    "fp8": {"gemm": "fp8", "saved_attention_output": "bf16"},  # experts in fp8; rows travel and are kept in bf16
}
"""Formats by role as the reference layer has them; routers compute in fp32."""


def step_scenario(case: Case, profile: HardwareProfile) -> Scenario:
    """The scenario of a ``step`` case: one accelerator, one microbatch, Adam with states in the weights' format."""
    return _scenario(_text(case), "step", profile)


def layer_scenario(case: Case, profile: HardwareProfile) -> Scenario:
    """The scenario of a ``layer`` or ``expert_parallel_layer`` case: a model of that one layer."""
    return _scenario(_text(case), "layer", profile)


def step_seconds(case: Case, profile: HardwareProfile) -> float:
    """Seconds of one training step: forward, loss, backward, Adam."""
    return simulate_step(step_scenario(case, profile), "max-plus").seconds


def layer_seconds(case: Case, profile: HardwareProfile) -> tuple[float, float]:
    """Seconds of one MoE layer alone: its forward, and its backward where the case has one (FB)."""
    pricer = _pricer(case, profile, ranks=1)
    items = _items(pricer.scenario)
    forward, *backward = (float(_lanes(pricer, which, items).max()) for which in _passes(case))
    return forward, sum(backward)


def measured_seconds(case: Case, seconds: Mapping[str, float]) -> float | None:
    """Sum over the pieces of a layer or step that were timed alone; None where one of them was not."""
    pieces = case.get("pieces") or ()
    if not pieces or any(key not in seconds for key, _ in pieces):
        return None
    return float(sum(count * seconds[key] for key, count in pieces))


def expert_parallel_seconds(case: Case, profile: HardwareProfile) -> tuple[float, float]:
    """Compute and exchange seconds of one MoE layer over ``ranks``: the slowest rank of each part, and what moves."""
    pricer, ranks = _pricer(case, profile, ranks=int(case["ranks"])), int(case["ranks"])
    items = _items(pricer.scenario)
    cut = [index for index, item in enumerate(items) if isinstance(item.op, Collective) and item.op.group == "expert"]
    dispatch, combine = (items[index].op for index in cut)
    assert isinstance(dispatch, Collective)
    assert isinstance(combine, Collective)
    parts = (items[: cut[0]], items[cut[0] + 1 : cut[1]], items[cut[1] + 1 :])
    seconds = sum(float(_lanes(pricer, which, part).max()) for which in _passes(case) for part in parts)
    shapes = [Exchange("dispatch", dispatch, "decoder", 0, False), Exchange("combine", combine, "decoder", 0, False)]
    table = pricer.price(shapes)
    moved = float(sum(table.latency[row] + table.flow_seconds[row].max() for row in table.row)) if ranks > 1 else 0.0
    return seconds, moved * (2 if case["which"] == "FB" else 1)


def _lanes(pricer: Pricer, which: Pass, items: tuple[Item, ...]) -> FloatArray:
    """Seconds of ops that run one after another, by rank."""
    kept = tuple(item for item in items if not isinstance(item.op, Collective))
    return pricer.price([Compute(which, kept, (), 0, False)]).seconds[0] if kept else np.zeros(1)


def _passes(case: Case) -> tuple[Pass, ...]:
    return ("F", "I", "W") if case["which"] == "FB" else ("F",)


def _items(scenario: Scenario) -> tuple[Item, ...]:
    return tuple(Item(op, "decoder", op.family) for op in expert_ops(scenario.model))


def _pricer(case: Case, profile: HardwareProfile, *, ranks: int) -> Pricer:
    scenario = layer_scenario(case, profile)
    return Pricer(scenario, _layout(_text(case), profile), layer_load(case, ranks))


def layer_load(case: Case, ranks: int = 1) -> ExpertLoad:
    """The recorded assignments [experts] of each rank as the load of one layer, after its capacity on every rank."""
    assigned = np.asarray(case["counts"], dtype=np.int64).reshape(1, 1, -1)
    factor, experts, tokens = case["capacity_factor"], case["experts"], case["tokens"]
    slots = None if factor is None else capacity.slots(factor, tokens, case["top_k"], experts)
    outcome = capacity.apply(assigned, slots, pad=case["pad"])
    counts = (assigned * ranks, outcome.processed * ranks, outcome.computed * ranks)
    return ExpertLoad(*counts, np.array([tokens * ranks]), case["top_k"], contiguous(1, experts, ranks))


# --- scenarios --------------------------------------------------------------------------------------------------------


def _text(case: Case) -> str:
    return json.dumps(case, sort_keys=True, default=list)


def _scenario(text: str, kind: str, profile: HardwareProfile) -> Scenario:
    """A case as a scenario on this profile; the case is read once for each set of formats that profiles have."""
    formats = (tuple(profile.kernels.gemm), tuple(profile.kernels.grouped_gemm))
    read = _read(text, kind, formats, _Profile(profile))
    stack = ranks_stack(read.cluster.accelerators)
    changes = {"profile": profile, "stack": stack if stack in profile.stacks else None}
    return read.model_copy(update={"cluster": read.cluster.model_copy(update=changes)})


def ranks_stack(ranks: int) -> str:
    """Name of the stack that holds what ranks side by side on one machine cost each other."""
    return f"pytorch-{ranks}-ranks"


@dataclass(frozen=True)
class _Profile:
    """A profile that all others with the same formats stand in for when a case is read."""

    profile: HardwareProfile = field(compare=False)


@lru_cache(maxsize=4096)
def _read(text: str, kind: str, formats: tuple[tuple[str, ...], ...], holder: _Profile) -> Scenario:
    case = json.loads(text)
    written = _written_step(case) if kind == "step" else _written_layer(case)
    precision = dict(ROLES[case["form"]])
    if "fp32" not in formats[0]:
        precision["router"] = "bf16"
    written["training"]["precision"] = precision
    profile = holder.profile.model_dump(mode="json", by_alias=True)
    written["cluster"] = {"profile": profile, "accelerators": written.pop("accelerators")}
    return load_scenario({"name": text, "cost": {"price_per_accelerator_hour": "1 USD"}, **written})


@lru_cache(maxsize=4096)
def _layout_of(text: str, holder: _Profile) -> Layout:
    return resolve(_scenario(text, "layer", holder.profile))


def _layout(text: str, profile: HardwareProfile) -> Layout:
    return _layout_of(text, _Profile(profile))


def _written_step(case: Case) -> dict[str, Any]:
    states = "fp32" if case["form"] == "fp32" else "bf16"
    routing = {"capacity_factor": case.get("capacity_factor"), "pad_to_capacity": bool(case.get("pad"))}
    length, sequences = case["sequence_length"], case["sequences"]
    return {
        "model": case["model"],
        "accelerators": 1,
        "training": {
            "tokens": length * sequences,
            "sequence_length": length,
            "global_batch_sequences": sequences,
            "micro_batch_sequences": sequences,
            "optimizer": {"kind": "adamw", "moments": states, "master": "none", "gradients": states},
        },
        "routing": routing,
    }


def _written_layer(case: Case) -> dict[str, Any]:
    tokens, ranks = case["tokens"], int(case.get("ranks", 1))
    moe = {name: case[name] for name in ("experts", "top_k", "expert_ffn_size", "gated", "shared_experts")}
    return {
        "model": {
            "name": "layer",
            "layers": 1,
            "hidden_size": case["hidden_size"],
            "vocabulary_size": 1,
            "context": tokens,
            "mixer": {"kind": "mha", "heads": 1, "head_dim": 1},
            "moe": moe,
        },
        "accelerators": ranks,
        "parallelism": {"expert": ranks},
        "training": {"tokens": tokens * ranks, "sequence_length": tokens, "global_batch_sequences": ranks},
        "routing": {"capacity_factor": case.get("capacity_factor"), "pad_to_capacity": bool(case.get("pad"))},
    }


__all__ = [
    "expert_parallel_seconds", "layer_load", "layer_scenario", "layer_seconds", "measured_seconds", "ranks_stack",
    "step_scenario", "step_seconds",
]  # fmt: skip
