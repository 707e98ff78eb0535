"""Random steps of a small MoE model: both engines account for the whole step, and nothing good ever costs time.

Layout, schedule, ZeRO, recomputation, overlaps, load and capacity are drawn together, wherever the layout accepts them.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import load_scenario, simulate_step
from simulator.program import COMPUTE
from tests.scenarios import moe_model

FloatArray = npt.NDArray[np.float64]

PAIRING: tuple[dict[str, Any], ...] = (
    {"pipeline": 1},
    {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
    {"pipeline": 2, "schedule": "dualpipe"},
    {"pipeline": 2, "schedule": "dualpipev", "virtual_stages": 2},
)
"""Schedules in which a forward can lie under the backward of another microbatch."""

SCHEDULES: tuple[dict[str, Any], ...] = (
    *PAIRING,
    {"pipeline": 2, "schedule": "1f1b"},
    {"pipeline": 2, "schedule": "gpipe"},
    {"pipeline": 2, "schedule": "zb1p"},
    {"pipeline": 2, "schedule": "zbv", "virtual_stages": 2},
)

LOADS: tuple[dict[str, Any], ...] = (
    {"kind": "balanced"},
    {"kind": "logits", "population": 0.7},
    {"kind": "logits", "domain": 0.5, "hot_experts": {"count": 1, "load": 3.0}},
    {"kind": "dirichlet", "concentration": 3.0},
)

MIXERS: tuple[dict[str, Any], ...] = (
    {"kind": "gqa", "heads": 8, "kv_heads": 4, "head_dim": 64},
    {
        "kind": "mla",
        "heads": 8,
        "query_rank": 128,
        "key_value_rank": 64,
        "nope_head_dim": 32,
        "rope_head_dim": 16,
        "value_head_dim": 32,
    },
)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Five layers, all of them MoE layers or every other one, with or without a shared expert."""
    moe = {
        "experts": 8,
        "top_k": 2,
        "expert_ffn_size": 512,
        "stride": draw(st.sampled_from([1, 2])),
        "shared_experts": draw(st.sampled_from([0, 1])),
    }
    return moe_model(5, mixer=draw(st.sampled_from(MIXERS)), ffn={"size": 1024}, moe=moe)


@st.composite
def overlaps(draw: st.DrawFn, *, tensor: int, context: int, pairs: bool) -> list[Any]:
    """What is hidden under compute: any set of groups, and the exchange of the experts whole, in chunks or not."""
    names = ["gradient_reduce", "parameter_gather", "pipeline", "shared_experts"]
    names += ["tensor"] * (tensor > 1) + ["context"] * (context > 1)
    found: list[Any] = sorted(draw(st.sets(st.sampled_from(names))))
    exchange: list[list[Any]] = [[], [{"expert_chunks": 2}], [{"expert_chunks": 3}]]
    return [*found, *draw(st.sampled_from([*exchange, ["expert_all_to_all"]] if pairs else exchange))]


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    """A small MoE model on two nodes."""
    schedule = draw(st.sampled_from(SCHEDULES))
    tensor, context = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    recompute = ["none", "full", ["norm", "activation"], ["attention"], {"full_layers": 1}]
    return {
        "name": "random",
        "model": draw(models()),
        "cluster": {"profile": "h100-sxm", "accelerators": 16},
        "parallelism": {
            **schedule,
            "tensor": tensor,
            "sequence_parallel": tensor > 1,
            "context": context,
            "expert": draw(st.sampled_from([1, 2, 4])),
            "expert_tensor": draw(st.sampled_from([1, 2])),
            "zero_stage": draw(st.integers(0, 3)),
            "overlap": draw(overlaps(tensor=tensor, context=context, pairs=schedule in PAIRING)),
        },
        "training": {
            "tokens": "1B",
            "sequence_length": 512,
            "global_batch_sequences": 96,
            "recompute": draw(st.sampled_from(recompute)),
        },
        "routing": {
            "load": draw(st.sampled_from(LOADS)),
            "capacity_factor": draw(st.sampled_from([None, 1.0])),
            "seed": draw(st.integers(0, 3)),
        },
    }


def step_s(tree: dict[str, Any], **changes: Any) -> float:
    return simulate_step(load_scenario(tree, changes), "max-plus").seconds


def test_the_random_scenarios_are_allowed() -> None:
    """Every schedule divides 96 sequences over every layout of 16 ranks."""
    splits = itertools.product(SCHEDULES, (1, 2), (1, 2))
    assert all(96 % (16 // (schedule["pipeline"] * tensor * context)) == 0 for schedule, tensor, context in splits)


@settings(deadline=None, max_examples=60)
@given(scenarios())
def test_the_terms_of_every_rank_and_lane_sum_to_the_step(tree: dict[str, Any]) -> None:
    scenario = load_scenario(tree)
    seconds = {}
    for engine in ("events", "max-plus"):
        step = simulate_step(scenario, engine)
        terms: dict[str, FloatArray] = step.timeline.by_rank
        total = np.asarray(sum(terms.values()))
        assert total.shape == (step.program.ranks, len(step.timeline.lanes))
        assert total == pytest.approx(np.full(total.shape, step.seconds), rel=1e-9)
        assert all((values >= -1e-12).all() for values in terms.values())
        assert step.timeline.breakdown.total == pytest.approx(step.seconds, rel=1e-9)
        seconds[engine] = step.seconds
    assert seconds["max-plus"] <= seconds["events"] * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(
    scenarios(),
    st.sampled_from(["tiers.nvlink.bandwidth", "tiers.infiniband.bandwidth", "accelerator.memory_bandwidth"]),
)
def test_more_bandwidth_is_never_slower(tree: dict[str, Any], path: str) -> None:
    slow, fast = (step_s(tree, **{"cluster.overrides": {path: rate}}) for rate in ("40 GB/s", "400 GB/s"))

    assert fast <= slow * (1 + 1e-12)


@settings(deadline=None, max_examples=25)
@given(scenarios())
def test_a_higher_capacity_never_makes_the_step_shorter_and_padding_neither(tree: dict[str, Any]) -> None:
    """The same draw: more accepted rows, then rows filled up to capacity."""
    times = [step_s(tree, **{"routing.capacity_factor": factor}) for factor in (0.5, 1.0, 2.0)]
    padded = [step_s(tree, **{"routing.capacity_factor": f, "routing.pad_to_capacity": True}) for f in (0.5, 1.0, 2.0)]

    assert times == sorted(times)
    assert padded == sorted(padded)
    assert all(plain <= full * (1 + 1e-12) for plain, full in zip(times, padded, strict=True))


@settings(deadline=None, max_examples=10)
@given(scenarios())
def test_the_same_scenario_and_seed_take_the_same_time_to_the_bit(tree: dict[str, Any]) -> None:
    ends = {simulate_step(load_scenario(tree), "events").timeline.end.tobytes() for _ in range(2)}

    assert len(ends) == 1


@settings(deadline=None, max_examples=30)
@given(scenarios())
def test_overlaps_move_work_and_never_drop_it(tree: dict[str, Any]) -> None:
    """All ops of the plain Program are there: as many products, collectives and exchanges, whole or in parts."""

    def work(overlap: list[Any]) -> dict[str, float]:
        changed = {**tree, "parallelism": {**tree["parallelism"], "overlap": overlap}}
        program = simulate_step(load_scenario(changed), "max-plus").program
        sums: dict[str, float] = {}
        for op in range(len(program)):
            cls = program.classes[program.cls[op]]
            parts = float(getattr(cls, "parts", 1))
            if program.stream[op] == COMPUTE:
                for item in getattr(cls, "items", ()):
                    key = f"{cls.which} {item.op.name}"
                    sums[key] = sums.get(key, 0.0) + 1.0 / parts
                for item in getattr(cls, "repeats", ()):
                    key = f"again {item.op.name}"
                    sums[key] = sums.get(key, 0.0) + 1.0 / parts
            elif hasattr(cls, "shape"):
                sums[cls.shape] = sums.get(cls.shape, 0.0) + 1.0 / parts
            elif hasattr(cls, "backward") and cls.op.kind != "ring":
                key = f"{cls.op.name} {cls.backward}"
                sums[key] = sums.get(key, 0.0) + 1.0 / parts
        return sums

    assert work(tree["parallelism"]["overlap"]) == pytest.approx(work([]))
