"""Small scenarios that several tests share: a MoE model of a few layers, and a pipeline under every schedule."""

from __future__ import annotations

from typing import Any

from simulator import load_scenario, simulate_step
from simulator.campaign import Step


def moe_model(layers: int, hidden_size: int = 512, **changes: Any) -> dict[str, Any]:
    """A model of MoE layers with eight attention heads; ``changes`` replace or add fields."""
    return {
        "name": "small",
        "layers": layers,
        "hidden_size": hidden_size,
        "vocabulary_size": 4000,
        "context": 1024,
        "mixer": {"kind": "gqa", "heads": 8, "kv_heads": 4, "head_dim": hidden_size // 8},
        "moe": {"experts": 8, "top_k": 2, "expert_ffn_size": 1024},
        **changes,
    }


def two_stages(accelerators: int, sequences: int) -> dict[str, Any]:
    """Four layers of 16 experts on two stages, experts over 8 ranks: the chips and the batch are the test's."""
    return {
        "name": "small",
        "model": moe_model(4, 1024, moe={"experts": 16, "top_k": 2, "expert_ffn_size": 1024}),
        "cluster": {"profile": "h100-sxm", "accelerators": accelerators},
        "parallelism": {"pipeline": 2, "expert": 8},
        "training": {"tokens": "1B", "sequence_length": 1024, "global_batch_sequences": sequences},
    }


PIPELINE: dict[str, Any] = {
    "name": "small",
    "model": {"preset": "deepseekmoe-16b", "set": {"layers": 8}},
    "cluster": {"profile": "h800-sxm", "accelerators": 16},
    "parallelism": {"pipeline": 4, "expert": 4},
    "training": {"tokens": "1B", "sequence_length": 1024, "global_batch_sequences": 64},
    "routing": {"load": {"kind": "logits", "population": 0.3}},
}
"""Four pipeline ranks of two layers each, 16 microbatches, an uneven load."""

SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "gpipe"},
    {"schedule": "1f1b"},
    {"schedule": "interleaved", "virtual_stages": 2},
    {"schedule": "zb1p"},
    {"schedule": "zbh2"},
    {"schedule": "zbv", "virtual_stages": 2},
    {"schedule": "dualpipe"},
    {"schedule": "dualpipev", "virtual_stages": 2},
]
"""Every named schedule, as fields of ``parallelism``."""


def played(schedule: dict[str, Any], engine: Any = "max-plus", **changes: Any) -> Step:
    """One step of :data:`PIPELINE` under a schedule."""
    tree = {**PIPELINE, "parallelism": {**PIPELINE["parallelism"], **schedule}}
    return simulate_step(load_scenario(tree, changes), engine)
