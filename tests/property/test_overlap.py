"""Random overlaps on a small MoE model: every Program ends, accounts for its time, and obeys the order of its needs.

Overlaps are drawn together with tensor, context, expert-tensor and pipeline parallelism, ZeRO, recomputation and the
load of the experts, wherever the layout accepts them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import load_scenario, simulate_step
from simulator.program import COMPUTE

SCHEDULES: tuple[dict[str, Any], ...] = (
    {"pipeline": 1},
    {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
    {"pipeline": 2, "schedule": "dualpipe"},
    {"pipeline": 2, "schedule": "dualpipev", "virtual_stages": 2},
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """A scenario with a random set of overlaps."""
    tensor, context = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    names = ["gradient_reduce", "parameter_gather", "pipeline", "shared_experts"]
    names += ["tensor"] * (tensor > 1) + ["context"] * (context > 1)
    overlap: list[Any] = sorted(draw(st.sets(st.sampled_from(names))))
    overlap += draw(st.sampled_from([[], ["expert_all_to_all"], [{"expert_chunks": 2}], [{"expert_chunks": 3}]]))
    return {
        "name": "random",
        "model": {
            "name": "small",
            "layers": 5,
            "hidden_size": 512,
            "vocabulary_size": 4000,
            "context": 1024,
            "mixer": draw(
                st.sampled_from(
                    [
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
                    ]
                )
            ),
            "ffn": {"size": 1024},
            "moe": {
                "experts": 8,
                "top_k": 2,
                "expert_ffn_size": 512,
                "stride": draw(st.sampled_from([1, 2])),
                "shared_experts": draw(st.sampled_from([0, 1])),
            },
        },
        "cluster": {"profile": "h100-sxm", "accelerators": 16},
        "parallelism": {
            **draw(st.sampled_from(SCHEDULES)),
            "tensor": tensor,
            "sequence_parallel": tensor > 1,
            "context": context,
            "expert": draw(st.sampled_from([1, 2, 4])),
            "expert_tensor": draw(st.sampled_from([1, 2])),
            "zero_stage": draw(st.integers(0, 3)),
            "overlap": overlap,
        },
        "training": {
            "tokens": "1B",
            "sequence_length": 512,
            "global_batch_sequences": 96,
            "recompute": draw(
                st.sampled_from(["none", "full", ["norm", "activation"], ["attention"], {"full_layers": 1}])
            ),
        },
        "routing": {"load": draw(st.sampled_from([{"kind": "balanced"}, {"kind": "logits", "population": 0.7}]))},
    }


@settings(deadline=None, max_examples=60)
@given(trees())
def test_every_overlap_ends_and_accounts_for_its_time(tree: dict[str, Any]) -> None:
    scenario = load_scenario(tree)
    seconds = {}
    for engine in ("events", "max-plus"):
        step = simulate_step(scenario, engine)
        total = np.asarray(sum(step.timeline.by_rank.values()))
        assert total == pytest.approx(np.full(total.shape, step.seconds), rel=1e-9)
        seconds[engine] = step.seconds
    assert seconds["max-plus"] <= seconds["events"] * (1 + 1e-9)


@settings(deadline=None, max_examples=30)
@given(trees(), st.sampled_from(["tiers.nvlink.bandwidth", "tiers.infiniband.bandwidth"]))
def test_faster_links_are_never_slower(tree: dict[str, Any], path: str) -> None:
    slow, fast = (
        simulate_step(load_scenario(tree, {"cluster.overrides": {path: rate}}), "max-plus").seconds
        for rate in ("40 GB/s", "400 GB/s")
    )

    assert fast <= slow * (1 + 1e-12)


@settings(deadline=None, max_examples=30)
@given(trees())
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
