"""The hardware-profile contract: one accelerator, the network tiers that join accelerators, and its software stacks.

Every number carries its provenance (:class:`~simulator.spec.fields.Sourced`). Achieved rates are curves, not one
efficiency: their forms are documented in :mod:`simulator.timing.kernels` and :mod:`simulator.timing.collectives`,
which are the only readers.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from simulator import errors
from simulator.spec.fields import (
    Bytes,
    BytesPerSecond,
    Contract,
    Day,
    Flag,
    FlopPerSecond,
    Fraction,
    NonNegative,
    Positive,
    PositiveFraction,
    Seconds,
    Sourced,
    UsdPerHour,
    Watts,
    Whole,
    described,
)

CollectiveKind = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "point_to_point"]


def _sourced(value: Any) -> dict[str, Any]:
    return {"value": value, "source": "vendor-datasheet", "kind": "datasheet"}


def _leaf(description: str, example: Any, *, unit: str | None = None, default: Any = ...) -> Any:
    return described(description, example=_sourced(example), unit=unit, default=default)


_MEMORY = {"launch": _sourced("3 us"), "fraction": _sourced(0.8), "permute_fraction": _sourced(0.5)}
_TIER = {"name": "nvlink", "kind": "switch", "size": 8, "bandwidth": _sourced("450 GB/s"), "alpha": _sourced("3 us")}
_CHIP = {
    "peak": {"bf16": _sourced("989.4 TFLOP/s")},
    "memory_bytes": _sourced("80 GB"),
    "usable_fraction": _sourced(0.95),
    "memory_bandwidth": _sourced("3.35 TB/s"),
    "sm_count": _sourced(132),
}
_STACK = {"released": "2025-02-27", "versions": "Megatron-Core 0.9", "gap_fraction": _sourced(0.033)}
_PRICE = {"usd_per_hour": "2 USD/h", "kind": "on demand", "observed": "2024-12-27", "source": "vendor-datasheet"}


class Accelerator(Contract):
    """One chip: peak rates, memory, and what a rank is."""

    peak: dict[Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"], Sourced[FlopPerSecond]] = described(
        "Dense peak rate by format (no sparsity), per chip.",
        unit="FLOP/s",
        example=_CHIP["peak"],
    )
    memory_bytes: Sourced[Bytes] = _leaf("Memory per chip.", "80 GB", unit="B")
    usable_fraction: Sourced[PositiveFraction] = _leaf("Share of the memory that a job can allocate.", 0.95)
    memory_bandwidth: Sourced[BytesPerSecond] = _leaf("Memory bandwidth per chip.", "3.35 TB/s", unit="B/s")
    sm_count: Sourced[Whole] = _leaf("Streaming multiprocessors (matrix units on a TPU).", 132)
    ranks_per_accelerator: Whole = described("Ranks on one chip (TPU v3 has two cores).", example=1, default=1)


class CollectiveCurve(Contract):
    """Time of one collective on one tier: t = latency + steps x hop + bytes / (bandwidth x efficiency) + c sqrt(bytes).

    `bytes` are those that the busiest rank moves over its link in the busier direction.
    """

    latency: Sourced[Seconds] = _leaf("Fixed cost of one call.", "9 us", unit="s")
    hop: Sourced[Seconds] | None = _leaf("Cost of each further rank or hop.", "1 us", unit="s", default=None)
    efficiency: Sourced[PositiveFraction] = _leaf("Share of the link's bandwidth at large sizes.", 0.7)
    sqrt_coefficient: Sourced[NonNegative] | None = _leaf(
        "c: slow ramp at middle sizes.", 5e-9, unit="s/B^0.5", default=None
    )
    comm_sms: Sourced[NonNegative] | None = _leaf(
        "Multiprocessors taken from compute while it runs beside compute.", 20, default=None
    )
    overlap_efficiency: Sourced[PositiveFraction] | None = _leaf(
        "Share of the stand-alone rate that remains while it runs beside compute.", 0.7, default=None
    )
    load_measure: Literal["max", "total"] = described(
        "Which bytes limit a skewed exchange: those of the busiest rank, or the total over all ranks.",
        example="max",
        default="max",
    )


class Tier(Contract):
    """One level of the network, innermost first. Bandwidths are per chip and direction."""

    name: str = described("Name of the tier.", example="nvlink")
    kind: Literal["switch", "rail", "torus", "dcn"] = described("Topology.", example="switch")
    size: Whole | None = described(
        "Chips that one instance of this tier joins; null = no limit.", example=8, default=None
    )
    dims: tuple[Whole, ...] | None = described(
        "Torus: chips along each axis of the largest slice.", example=[32, 32], default=None
    )
    wrap: Flag = described("Torus: full axes have wrap-around links.", example=True, default=True)
    bandwidth: Sourced[BytesPerSecond] = _leaf(
        "Bandwidth per chip and direction (torus: per link).", "50 GB/s", unit="B/s"
    )
    p2p_bandwidth: Sourced[BytesPerSecond] | None = _leaf(
        "Bandwidth of a single point-to-point transfer; default: `bandwidth`.", "50 GB/s", unit="B/s", default=None
    )
    alpha: Sourced[Seconds] = _leaf("Latency of one small message.", "3.7 us", unit="s")
    oversubscription: Sourced[Positive] | None = _leaf(
        "Factor by which the core is thinner than the edge.", 1.0, default=None
    )
    collectives: dict[CollectiveKind, CollectiveCurve] = described(
        "Curves by collective; a missing one uses alpha and full bandwidth.", example={}, default=dict
    )

    @model_validator(mode="after")
    def _torus_has_dims(self) -> Tier:
        if (self.kind == "torus") != (self.dims is not None):
            raise ValueError("a torus needs dims, and only a torus has them")
        return self


class GemmCurve(Contract):
    """Time of a dense matrix product; form in :func:`simulator.timing.kernels.gemm_seconds`."""

    launch: Sourced[Seconds] = _leaf("Fixed cost of one kernel.", "2 us", unit="s")
    efficiency: Sourced[PositiveFraction] = _leaf("Share of peak at large sizes.", 0.84)
    k_half: Sourced[NonNegative] = _leaf("Inner dimension at which half of the rate is lost.", 138)
    throttle_per_decade: Sourced[NonNegative] = _leaf("Slow-down per decade of FLOPs over 1e11 (power).", 0.04)
    wave_weight: Sourced[Fraction] = _leaf("Weight of whole waves of 128 x 128 tiles.", 0.19)
    quantize_passes: Sourced[NonNegative] | None = _leaf(
        "Time to cast operands to the low format, over the time to move their bytes once.", 1.0, default=None
    )
    dgrad_scale: Sourced[Positive] = _leaf("Efficiency of the input gradient relative to forward.", 0.98)
    wgrad_scale: Sourced[Positive] = _leaf("Efficiency of the weight gradient relative to forward.", 0.93)


class GroupedGemmCurve(Contract):
    """Time of the expert matrix products; form in :func:`simulator.timing.kernels.grouped_gemm_seconds`."""

    launch: Sourced[Seconds] = _leaf("Fixed cost of one kernel.", "10 us", unit="s")
    per_expert: Sourced[Seconds] = _leaf("Cost of each active expert.", "0.5 us", unit="s")
    efficiency: Sourced[PositiveFraction] = _leaf("Share of peak at large sizes.", 0.84)
    k_half: Sourced[NonNegative] = _leaf("Inner dimension at which half of the rate is lost.", 138)
    tile_rows: Sourced[Whole] = _leaf("Rows to which the tokens of one expert are padded in the kernel.", 128)
    wgrad_rows_half: Sourced[NonNegative] = _leaf(
        "Tokens per expert at which the weight gradient loses half its rate.", 128
    )
    quantize_passes: Sourced[NonNegative] | None = _leaf("As for the dense product.", 1.0, default=None)
    dgrad_scale: Sourced[Positive] = _leaf("Efficiency of the input gradient relative to forward.", 0.98)
    wgrad_scale: Sourced[Positive] = _leaf("Efficiency of the weight gradient relative to forward.", 0.93)


class AttentionCurve(Contract):
    """Rate of the fused attention core, r(s) = rate x s / (s + s_half), counting causal FLOPs."""

    rate: Sourced[FlopPerSecond] = _leaf("Rate at long context.", "622 TFLOP/s", unit="FLOP/s")
    s_half: Sourced[NonNegative] = _leaf("Context at which half of the rate is reached.", 1050, unit="tokens")
    backward_scale: Sourced[Positive] = _leaf("Rate of the backward relative to forward.", 0.87)
    launch: Sourced[Seconds] = _leaf("Fixed cost of one kernel.", "5 us", unit="s")


class MemoryCurve(Contract):
    """Time of memory-bound kernels: t = launch + bytes / (bandwidth x fraction)."""

    launch: Sourced[Seconds] = _leaf("Fixed cost of one kernel.", "3 us", unit="s")
    fraction: Sourced[PositiveFraction] = _leaf("Share of the memory bandwidth.", 0.8)
    permute_fraction: Sourced[PositiveFraction] = _leaf("The same for gather and scatter of tokens.", 0.5)


class Kernels(Contract):
    """Achieved rates of compute kernels, by format."""

    gemm: dict[Literal["fp32", "bf16", "fp16", "fp8"], GemmCurve] = described("Dense products.", example={})
    grouped_gemm: dict[Literal["fp32", "bf16", "fp16", "fp8"], GroupedGemmCurve] = described(
        "Expert products.", example={}
    )
    attention: dict[Literal["mha", "mla"], AttentionCurve] = described(
        "Attention core in bf16: ordinary heads, and latent attention with its wider keys.", example={}
    )
    memory: MemoryCurve = described("Memory-bound kernels.", example=_MEMORY)


class Stack(Contract):
    """What a software stack adds that kernels alone do not show. Explicit, dated, its own line in every breakdown."""

    released: Day = described("Date of the software.", example="2025-02-27")
    versions: str = described("What it consists of.", example="Megatron-Core 0.9, PyTorch 2.5, CUDA 12.6")
    gap_fraction: Sourced[NonNegative] = _leaf(
        "Idle time between kernels as a share of compute time: launch gaps, synchronisation, jitter.", 0.033
    )
    step_overhead: Sourced[Seconds] | None = _leaf(
        "Fixed time per step: data loading, logging.", "10 ms", unit="s", default=None
    )


class Price(Contract):
    """A market price; the scenario's own price wins."""

    usd_per_hour: UsdPerHour = described("Price of one accelerator-hour.", unit="USD/h", example="2 USD/h")
    kind: str = described("What sort of price.", example="DeepSeek-V3 report's assumption")
    observed: Day = described("When it was observed.", example="2024-12-27")
    source: str = described("Key of the `sources` table.", example="deepseek-v3")


class HardwareProfile(Contract):
    """One accelerator with its network tiers and software stacks."""

    name: str = described("Name of the hardware.", example="H800 SXM5 80 GB")
    vendor: str = described("Who makes it.", example="NVIDIA")
    sources: dict[str, str] = described("Citations by key.", example={"nvidia-h100": "NVIDIA H100 datasheet, 2023"})
    accelerator: Accelerator = described("The chip.", example=_CHIP)
    tiers: tuple[Tier, ...] = described("Network tiers, innermost first.", example=[_TIER], min_length=1)
    kernels: Kernels = described(
        "Achieved rates.", example={"gemm": {}, "grouped_gemm": {}, "attention": {}, "memory": _MEMORY}
    )
    jitter: Sourced[NonNegative] | None = _leaf(
        "Relative standard deviation of kernel times between ranks; in a scenario write `overrides: {jitter: {value: "
        "0.01, source: <key of sources>, kind: assumed}}`.",
        0.01,
        default=None,
    )
    stacks: dict[str, Stack] = described(
        "Software stacks; the first is the default.", example={"megatron-core": _STACK}, min_length=1
    )
    price: Price | None = described("Market price.", example=_PRICE, default=None)
    power: Sourced[Watts] | None = _leaf(
        "Power of one chip under load (for the record: energy is not estimated yet).", "700 W", unit="W", default=None
    )

    @model_validator(mode="after")
    def _sources_exist(self) -> HardwareProfile:
        used = [leaf.source for leaf in _leaves(self)] + ([self.price.source] if self.price else [])
        for key in used:
            if key not in self.sources:
                raise ValueError(errors.one_of(key, self.sources, "source"))
        return self


def _leaves(node: object) -> list[Sourced[object]]:
    """Every number of a profile that carries a provenance."""
    if isinstance(node, Sourced):
        return [node]
    if isinstance(node, Contract):
        return [leaf for name in type(node).model_fields for leaf in _leaves(getattr(node, name))]
    if isinstance(node, dict):
        return [leaf for value in node.values() for leaf in _leaves(value)]
    if isinstance(node, tuple):
        return [leaf for value in node for leaf in _leaves(value)]
    return []
