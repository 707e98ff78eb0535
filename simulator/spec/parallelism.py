"""The parallelism contract: how the model and the batch are split over ranks, in which order, and what overlaps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from simulator.spec.fields import Contract, Flag, Whole, WholeOrZero, described
from simulator.units import shown

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb1p", "zbh2", "zbv", "dualpipe", "dualpipev"]
DenseAxis = Literal["tensor", "context", "expert", "data", "pipeline"]
ExpertAxis = Literal["expert_tensor", "expert", "expert_data", "pipeline"]
OverlapName = Literal[
    "expert_all_to_all",
    "gradient_reduce",
    "parameter_gather",
    "pipeline",
    "tensor",
    "tensor_backward",
    "context",
    "shared_experts",
]


def _no_boolean(value: object) -> object:
    """Literal types take true for 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be one of 0, 1, 2, 3 (got {shown(value)})")
    return value


ZeroStage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_boolean)]


class ScheduleFile(Contract):
    """A custom pipeline schedule."""

    file: str = described(
        "CSV in PyTorch's format: one row per rank, actions such as 0F3, 4I0, 4W0, 3B0 or (4F4;3B0)OVERLAP_F_B. "
        "Relative to the scenario file.",
        example="actions.csv",
    )


class FullySharded(Contract):
    """Shards of parameters at zero_stage 3 (FSDP; HSDP when smaller than the data-parallel group)."""

    ranks: Whole = described("Ranks over which dense parameters are sharded.", example=64)
    experts: Whole | None = described("Ranks over which expert parameters are sharded.", example=8, default=None)
    prefetch: WholeOrZero = described("Layers gathered ahead of use.", example=1, default=1)


class StageItem(Contract):
    """One pipeline stage of an explicit layer split."""

    layers: WholeOrZero = described("Transformer layers of this stage.", example=1)
    with_: tuple[Literal["embedding", "lm_head", "mtp"], ...] = described(
        "What else the stage holds; default: embedding on the first, lm_head and mtp on the last stage.",
        example=["lm_head", "mtp"],
        default=(),
        alias="with",
    )


class ExpertChunks(Contract):
    """Pipelining inside one MoE layer (Tutel): dispatch, experts and combine in n chunks."""

    expert_chunks: Whole = described("Number of chunks.", example=2)


class Parallelism(Contract):
    """How the work is split. data = ranks / (pipeline x tensor x context) follows from the rest."""

    pipeline: Whole = described("Pipeline-parallel ranks.", example=16, default=1)
    schedule: ScheduleName | ScheduleFile = described("Pipeline schedule.", example="dualpipe", default="1f1b")
    virtual_stages: Whole = described("Model chunks per pipeline rank (interleaved).", example=2, default=1)
    tensor: Whole = described("Tensor-parallel ranks.", example=8, default=1)
    sequence_parallel: Flag = described(
        "Shard the regions outside tensor-parallel linears along the sequence.", example=True, default=False
    )
    context: Whole = described("Context-parallel ranks.", example=2, default=1)
    expert: Whole = described("Expert-parallel ranks.", example=64, default=1)
    expert_tensor: Whole = described("Tensor-parallel ranks inside one expert.", example=1, default=1)
    zero_stage: ZeroStage = described(
        "ZeRO: 1 shards optimizer states over data-parallel ranks, 2 also gradients, 3 also parameters.",
        example=1,
        default=1,
    )
    fully_sharded: FullySharded | None = described(
        "Shard group at zero_stage 3; default: the whole data-parallel group.", example={"ranks": 64}, default=None
    )
    rank_order: tuple[DenseAxis, ...] = described(
        "Axes of the rank grid, innermost first: places groups on nodes.",
        example=["tensor", "context", "expert", "data", "pipeline"],
        default=("tensor", "context", "expert", "data", "pipeline"),
    )
    expert_rank_order: tuple[ExpertAxis, ...] | None = described(
        "Axes of the expert grid, innermost first; default: `rank_order` with tensor read as expert_tensor and data as "
        "expert_data.",
        example=["expert_tensor", "expert", "expert_data", "pipeline"],
        default=None,
    )
    axes: dict[Literal["tensor", "context", "expert", "data", "pipeline"], tuple[str, ...]] | None = described(
        "Torus only: axes (x, y, z) that each group spans; default: as many as its size needs.",
        example={"expert": ["x"], "data": ["y", "z"]},
        default=None,
    )
    layers_per_stage: Literal["auto"] | tuple[Whole | StageItem, ...] = described(
        "Layer split: balanced by FLOPs, or one item per stage.", example="auto", default="auto"
    )
    delay_weight_gradients: Flag = described(
        "In a pair of forward and backward, messages leave before the weight gradients behind them are computed "
        "(DualPipe; Megatron-Core's --delay-wgrad-compute).",
        example=True,
        default=True,
    )
    overlap: Literal["auto"] | tuple[OverlapName | ExpertChunks, ...] = described(
        "Communication that may run beside compute; auto = gradient_reduce, parameter_gather, pipeline, "
        "tensor_backward, and expert_all_to_all where the schedule pairs forward with backward.",
        example=["expert_all_to_all", "gradient_reduce"],
        default="auto",
    )
