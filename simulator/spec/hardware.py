"""The hardware-profile contract: one accelerator, the network tiers that join accelerators, and its software stacks.

Every number carries its provenance (:class:`~simulator.spec.fields.Sourced`). Achieved rates are curves, not one
efficiency: their forms are documented in :mod:`simulator.timing.kernels` and :mod:`simulator.timing.collectives`,
which are the only readers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from simulator import errors
from simulator.spec.curves import (
    MEMORY_EXAMPLE,
    AttentionCurve,
    CollectiveCurve,
    CollectiveKind,
    GroupedGemmCurve,
    Kernels,
    leaf,
    sourced,
)
from simulator.spec.fields import (
    Bytes,
    BytesPerSecond,
    Contract,
    Day,
    Flag,
    FlopPerSecond,
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

_TIER = {"name": "nvlink", "kind": "switch", "size": 8, "bandwidth": sourced("450 GB/s"), "alpha": sourced("3 us")}
_CHIP = {
    "peak": {"bf16": sourced("989.4 TFLOP/s")},
    "memory_bytes": sourced("80 GB"),
    "usable_fraction": sourced(0.95),
    "memory_bandwidth": sourced("3.35 TB/s"),
    "sm_count": sourced(132),
}
_STACK = {"released": "2025-02-27", "versions": "Megatron-Core 0.9", "gap_fraction": sourced(0.033)}
_PRICE = {"usd_per_hour": "2 USD/h", "kind": "on demand", "observed": "2024-12-27", "source": "vendor-datasheet"}


class Accelerator(Contract):
    """One chip: peak rates, memory, and what a rank is."""

    peak: dict[Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"], Sourced[FlopPerSecond]] = described(
        "Dense peak rate by format (no sparsity), per chip.",
        unit="FLOP/s",
        example=_CHIP["peak"],
    )
    memory_bytes: Sourced[Bytes] = leaf("Memory per chip.", "80 GB", unit="B")
    usable_fraction: Sourced[PositiveFraction] = leaf("Share of the memory that a job can allocate.", 0.95)
    memory_bandwidth: Sourced[BytesPerSecond] = leaf("Memory bandwidth per chip.", "3.35 TB/s", unit="B/s")
    sm_count: Sourced[Whole] = leaf("Streaming multiprocessors (matrix units on a TPU).", 132)
    ranks_per_accelerator: Whole = described("Ranks on one chip (TPU v3 has two cores).", example=1, default=1)


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
    bandwidth: Sourced[BytesPerSecond] = leaf(
        "Bandwidth per chip and direction (torus: per link).", "50 GB/s", unit="B/s"
    )
    p2p_bandwidth: Sourced[BytesPerSecond] | None = leaf(
        "Bandwidth of a single point-to-point transfer; default: `bandwidth`.", "50 GB/s", unit="B/s", default=None
    )
    alpha: Sourced[Seconds] = leaf("Latency of one small message.", "3.7 us", unit="s")
    oversubscription: Sourced[Positive] | None = leaf(
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


class Stack(Contract):
    """What a software stack adds that kernels alone do not show. Explicit, dated, its own line in every breakdown."""

    released: Day = described("Date of the software.", example="2025-02-27")
    versions: str = described("What it consists of.", example="Megatron-Core 0.9, PyTorch 2.5, CUDA 12.6")
    gap_fraction: Sourced[NonNegative] = leaf(
        "Idle time between kernels as a share of compute time: launch gaps, synchronisation, jitter.", 0.033
    )
    issue: Sourced[Seconds] | None = leaf(
        "Time in which the host issues one op of the op list (its kernels, about 1.7, from Python): kernels that are "
        "shorter wait for it. Null where a graph or one program issues them.",
        "100 us",
        unit="s",
        default=None,
    )
    step_overhead: Sourced[Seconds] | None = leaf(
        "Fixed time per step: data loading, logging.", "10 ms", unit="s", default=None
    )
    gradient_passes: Sourced[NonNegative] | None = leaf(
        "Times that every gradient is read or written beside the update: in the buffer of a rank before the reduction "
        "(zeroed and averaged), and as often in the shard after it (norm and clipping).",
        3,
        default=None,
    )
    memory: Literal["plain", "transformer_engine"] = described(
        "Which tensors the software holds for a moment: those of plain autograd, or `transformer_engine`: "
        "Megatron-Core's, with gradients of weights added inside the products and the cross entropy in place.",
        example="transformer_engine",
        default="plain",
    )
    attention: dict[Literal["mha", "mla"], AttentionCurve] = described(
        "Fused attention cores of this software, where they are not those of `kernels`.", example={}, default=dict
    )
    grouped_gemm: dict[Literal["fp32", "bf16", "fp16", "fp8"], GroupedGemmCurve] = described(
        "Expert products of this software, where they are not those of `kernels`.", example={}, default=dict
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
        "Achieved rates.", example={"gemm": {}, "grouped_gemm": {}, "attention": {}, "memory": MEMORY_EXAMPLE}
    )
    jitter: Sourced[NonNegative] | None = leaf(
        "Relative standard deviation of kernel times between ranks; in a scenario write `overrides: {jitter: {value: "
        "0.01, source: <key of sources>, kind: assumed}}`.",
        0.01,
        default=None,
    )
    stacks: dict[str, Stack] = described(
        "Software stacks; the first is the default.", example={"megatron-core": _STACK}, min_length=1
    )
    price: Price | None = described("Market price.", example=_PRICE, default=None)
    power: Sourced[Watts] | None = leaf(
        "Power of one chip under load (for the record: energy is not estimated yet).", "700 W", unit="W", default=None
    )

    def under(self, stack: str) -> HardwareProfile:
        """The profile with the kernels that a software stack brings along."""
        own = self.stacks[stack]
        if not (own.attention or own.grouped_gemm):
            return self
        attention = {**self.kernels.attention, **own.attention}
        grouped_gemm = {**self.kernels.grouped_gemm, **own.grouped_gemm}
        kernels = self.kernels.model_copy(update={"attention": attention, "grouped_gemm": grouped_gemm})
        return self.model_copy(update={"kernels": kernels})

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
