"""Curves of achieved rates: how long a kernel or a collective takes, with the source of every number.

The forms are documented where they are evaluated, in :mod:`simulator.timing.kernels` and
:mod:`simulator.timing.collectives`.
"""

from __future__ import annotations

from typing import Any, Literal

from simulator.spec.fields import (
    Bytes,
    BytesPerSecond,
    Contract,
    FlopPerSecond,
    Fraction,
    NonNegative,
    Positive,
    PositiveFraction,
    Seconds,
    Sourced,
    Whole,
    described,
)

CollectiveKind = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "point_to_point"]


def sourced(value: Any) -> dict[str, Any]:
    """An example of a number with its source."""
    return {"value": value, "source": "vendor-datasheet", "kind": "datasheet"}


def leaf(description: str, example: Any, *, unit: str | None = None, default: Any = ...) -> Any:
    """A field whose value carries its source."""
    return described(description, example=sourced(example), unit=unit, default=default)


MEMORY_EXAMPLE = {"launch": sourced("3 us"), "fraction": sourced(0.8), "permute_fraction": sourced(0.5)}


class CollectiveCurve(Contract):
    """Time of one collective on one tier: t = latency + steps x hop + bytes / (bandwidth x efficiency) + c sqrt(bytes).

    `bytes` are those that the busiest rank moves over its link in the busier direction. Beyond `knee_bytes` the rest
    moves at `bandwidth x beyond_knee`.
    """

    latency: Sourced[Seconds] = leaf("Fixed cost of one call.", "9 us", unit="s")
    hop: Sourced[Seconds] | None = leaf("Cost of each further rank or hop.", "1 us", unit="s", default=None)
    inner_hop: Sourced[Seconds] | None = leaf(
        "Cost of each rank that a ring passes inside each further node; not on a torus.",
        "1.9 us",
        unit="s",
        default=None,
    )
    efficiency: Sourced[PositiveFraction] = leaf("Share of the link's bandwidth at large sizes.", 0.7)
    sqrt_coefficient: Sourced[NonNegative] | None = leaf(
        "c: slow ramp at middle sizes.", 5e-9, unit="s/B^0.5", default=None
    )
    knee_bytes: Sourced[Bytes] | None = leaf(
        "Size from which on buffers leave a cache.", "2.7 MB", unit="B", default=None
    )
    beyond_knee: Sourced[PositiveFraction] | None = leaf(
        "Share of the link's bandwidth for the bytes beyond the knee.", 0.4, default=None
    )
    comm_sms: Sourced[NonNegative] | None = leaf(
        "Multiprocessors taken from compute while it runs beside compute.", 20, default=None
    )
    overlap_efficiency: Sourced[PositiveFraction] | None = leaf(
        "Share of the stand-alone rate that remains while it runs beside compute.", 0.7, default=None
    )
    load_measure: Literal["max", "total"] = described(
        "Which bytes limit an exchange: those of the busiest rank, or those of all ranks together (one shared bus).",
        example="max",
        default="max",
    )


class GemmCurve(Contract):
    """Time of a dense matrix product; form in :func:`simulator.timing.kernels.gemm_seconds`."""

    launch: Sourced[Seconds] = leaf("Fixed cost of one kernel.", "2 us", unit="s")
    efficiency: Sourced[PositiveFraction] = leaf("Share of peak at large sizes.", 0.84)
    k_half: Sourced[NonNegative] = leaf("Inner dimension at which half of the rate is lost.", 138)
    throttle_per_decade: Sourced[NonNegative] = leaf("Slow-down per decade of FLOPs over 1e11 (power).", 0.04)
    wave_weight: Sourced[Fraction] = leaf("Weight of whole waves of tiles.", 0.19)
    tile: Sourced[Whole] | None = leaf("Side of a square tile; default 128; 1 = no tiles.", 128, default=None)
    rows_half: Sourced[NonNegative] | None = leaf(
        "Rows of the output at which half of the rate is lost.", 16, default=None
    )
    columns_half: Sourced[NonNegative] | None = leaf(
        "Columns of the output at which half of the rate is lost.", 39, default=None
    )
    stream_fraction: Sourced[PositiveFraction] | None = leaf(
        "Share of the memory bandwidth at which operands stream; default: that of memory-bound kernels.",
        0.5,
        default=None,
    )
    quantize_passes: Sourced[NonNegative] | None = leaf(
        "Time to cast operands to the low format, over the time to move their bytes once.", 1.0, default=None
    )
    dgrad_scale: Sourced[Positive] = leaf("Efficiency of the input gradient relative to forward.", 0.98)
    wgrad_scale: Sourced[Positive] = leaf("Efficiency of the weight gradient relative to forward.", 0.93)


class GroupedGemmCurve(Contract):
    """Time of the expert matrix products; form in :func:`simulator.timing.kernels.grouped_gemm_seconds`."""

    launch: Sourced[Seconds] = leaf("Fixed cost of one kernel.", "10 us", unit="s")
    per_expert: Sourced[Seconds] = leaf("Cost of each active expert.", "0.5 us", unit="s")
    efficiency: Sourced[PositiveFraction] = leaf("Share of peak at large sizes.", 0.84)
    k_half: Sourced[NonNegative] = leaf("Inner dimension at which half of the rate is lost.", 138)
    tile_rows: Sourced[Whole] = leaf("Rows to which the tokens of one expert are padded in the kernel.", 128)
    rows_half: Sourced[NonNegative] | None = leaf("As for the dense product, by expert.", 16, default=None)
    columns_half: Sourced[NonNegative] | None = leaf("As for the dense product.", 39, default=None)
    wgrad_rows_half: Sourced[NonNegative] = leaf(
        "Tokens per expert at which the weight gradient loses half its rate.", 128
    )
    stream_fraction: Sourced[PositiveFraction] | None = leaf("As for the dense product.", 0.5, default=None)
    quantize_passes: Sourced[NonNegative] | None = leaf("As for the dense product.", 1.0, default=None)
    dgrad_scale: Sourced[Positive] = leaf("Efficiency of the input gradient relative to forward.", 0.98)
    wgrad_scale: Sourced[Positive] = leaf("Efficiency of the weight gradient relative to forward.", 0.93)


class AttentionCurve(Contract):
    """Rate of the fused attention core, r(s) = rate x s / (s + s_half), counting causal FLOPs."""

    rate: Sourced[FlopPerSecond] = leaf("Rate at long context.", "622 TFLOP/s", unit="FLOP/s")
    s_half: Sourced[NonNegative] = leaf("Context at which half of the rate is reached.", 1050, unit="tokens")
    backward_scale: Sourced[Positive] = leaf("Rate of the backward relative to forward.", 0.87)
    launch: Sourced[Seconds] = leaf("Fixed cost of one kernel.", "5 us", unit="s")


class MemoryCurve(Contract):
    """Time of memory-bound kernels: t = launch + bytes / (bandwidth x fraction).

    With a cache, the first `cache_bytes` of them move at its bandwidth. Choosing experts and planning their rows are
    many small kernels: t = routing_launch + tokens x routing_per_token, where these are given.
    """

    launch: Sourced[Seconds] = leaf("Fixed cost of one kernel.", "3 us", unit="s")
    fraction: Sourced[PositiveFraction] = leaf("Share of the memory bandwidth.", 0.8)
    permute_fraction: Sourced[PositiveFraction] = leaf("The same for gather and scatter of tokens.", 0.5)
    update_fraction: Sourced[PositiveFraction] | None = leaf(
        "The same for the optimizer's update, one kernel over all weights; default: as any other kernel.",
        0.85,
        default=None,
    )
    backward_scale: Sourced[Positive] | None = leaf(
        "Rate of a backward that is made of several kernels, relative to forward; default 1.", 0.6, default=None
    )
    cache_bytes: Sourced[Bytes] | None = leaf("What a kernel can move inside a cache.", "32 MB", unit="B", default=None)
    cache_bandwidth: Sourced[BytesPerSecond] | None = leaf(
        "Bandwidth inside the cache.", "40 GB/s", unit="B/s", default=None
    )
    routing_launch: Sourced[Seconds] | None = leaf(
        "Fixed cost of choosing experts and planning their rows; default: as any other kernel.",
        "150 us",
        unit="s",
        default=None,
    )
    routing_per_token: Sourced[Seconds] | None = leaf(
        "Further cost of each token that chooses; default 0.", "0.2 us", unit="s", default=None
    )


class Composition(Contract):
    """Factor on a sum of kernels that run one after another, over the sum of their times alone."""

    forward: Sourced[Positive] = leaf("Forward pass.", 1.08)
    backward: Sourced[Positive] = leaf("Backward passes.", 1.05)


class Kernels(Contract):
    """Achieved rates of compute kernels, by format."""

    gemm: dict[Literal["fp32", "bf16", "fp16", "fp8"], GemmCurve] = described("Dense products.", example={})
    grouped_gemm: dict[Literal["fp32", "bf16", "fp16", "fp8"], GroupedGemmCurve] = described(
        "Expert products.", example={}
    )
    attention: dict[Literal["mha", "mla"], AttentionCurve] = described(
        "Attention core in bf16: ordinary heads, and latent attention with its wider keys.", example={}
    )
    memory: MemoryCurve = described("Memory-bound kernels.", example=MEMORY_EXAMPLE)
    composition: Composition | None = described(
        "What whole layers take over their kernels alone; default 1.",
        example={"forward": sourced(1.08), "backward": sourced(1.05)},
        default=None,
    )
