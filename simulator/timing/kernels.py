"""How long one kernel takes alone: closed forms in shape, fitted per accelerator in its hardware profile.

All functions are vectorised over rows and return seconds. S is the number of multiprocessors that compute may use:
fewer while communication kernels hold some (``sms``).

Dense product of [m, k] x [k, n]::

    t = launch + (c^4 + b^4)^(1/4)
    b = bytes / (bandwidth x fraction)
    c = q S 128 128 2k / (P e) (1 + k_half/k),   q = max(1, w ceil(T/S) + (1-w) T/S),   T = ceil(m/128) ceil(n/128)
    c <= 2mnk / (0.6 P e) (1 + k_half/k)          (small problems use smaller tiles or split k)
    c *= 1 + throttle x clip(log10(2mnk / 1e11), 0, 3)

    and, where the profile has them, c *= (1 + rows_half/m) (1 + columns_half/n), another side of the tiles, and
    another share of the bandwidth at which operands stream,

with peak P and efficiency e. FP8 products need their operands cast first (:func:`cast_bytes`). Form and constants are
fitted to kernel tables of NVIDIA aiconfigurator (github.com/ai-dynamo/aiconfigurator) and others, see the profiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from simulator.spec.curves import GemmCurve, GroupedGemmCurve
from simulator.spec.fields import ELEMENT_BYTES, Sourced
from simulator.spec.hardware import HardwareProfile

FloatArray = npt.NDArray[np.float64]
Numbers = float | FloatArray
Pass = Literal["F", "I", "W"]

_TILE = 128


@dataclass(frozen=True)
class Device:
    """One rank's share of an accelerator, with the multiprocessors that compute may use."""

    profile: HardwareProfile
    sms: float

    @classmethod
    def of(cls, profile: HardwareProfile, comm_sms: float = 0.0) -> Device:
        """A rank whose communication holds ``comm_sms`` multiprocessors."""
        chip = profile.accelerator
        return cls(profile, max(1.0, chip.sm_count.value / chip.ranks_per_accelerator - comm_sms))

    def peak(self, name: str) -> float:
        """Peak rate of the available multiprocessors in a format."""
        chip = self.profile.accelerator
        rates = chip.peak
        rate = rates.get(name) or (rates.get("tf32") if name == "fp32" else None) or rates["bf16"]  # type: ignore[call-overload]
        return (
            float(rate.value)
            / chip.ranks_per_accelerator
            * self.sms
            / (chip.sm_count.value / chip.ranks_per_accelerator)
        )

    @property
    def memory_bandwidth(self) -> float:
        """Memory bandwidth of one rank."""
        chip = self.profile.accelerator
        return chip.memory_bandwidth.value / chip.ranks_per_accelerator

    @property
    def bandwidth(self) -> float:
        """Achieved memory bandwidth of one rank."""
        return self.memory_bandwidth * self.profile.kernels.memory.fraction.value


def gemm_seconds(device: Device, form: str, which: Pass, m: Numbers, n: float, k: float) -> Numbers:
    """Dense linear with m rows: forward, gradient of the input (I), or gradient of the weights (W).

    ``n`` and ``k`` are those of the forward. A format without a curve of its own uses bf16.
    """
    curves = device.profile.kernels.gemm
    curve = curves.get(form) or curves["bf16"]  # type: ignore[call-overload]
    form = form if form in curves else "bf16"
    rows: Numbers = m
    columns: Numbers = n
    inner: Numbers = k
    scale = 1.0
    if which == "I":
        columns, inner, scale = k, n, curve.dgrad_scale.value
    elif which == "W":
        rows, inner, scale = n, m, curve.wgrad_scale.value
        columns = k
    size = ELEMENT_BYTES[form]
    output = 8.0 if which == "W" else max(2.0, size)  # FP32 gradients are read and written
    traffic = (rows * inner + inner * columns) * size + rows * columns * output
    rate = device.peak(form) * curve.efficiency.value * scale
    flop = 2.0 * rows * columns * inner
    ramp = _ramp(curve.k_half, inner) * _ramp(curve.rows_half, rows) * _ramp(curve.columns_half, columns)
    tile = _TILE if curve.tile is None else curve.tile.value
    tiles = np.ceil(np.asarray(rows) / tile) * np.ceil(np.asarray(columns) / tile)
    weight = curve.wave_weight.value
    waves = np.maximum(1.0, weight * np.ceil(tiles / device.sms) + (1.0 - weight) * tiles / device.sms)
    compute = waves * device.sms * tile * tile * 2.0 * inner / rate * ramp
    compute = np.minimum(compute, flop / (0.6 * rate) * ramp)
    compute = compute * (
        1.0 + curve.throttle_per_decade.value * np.clip(np.log10(np.maximum(flop, 1.0) / 1e11), 0.0, 3.0)
    )
    memory = _streamed(device, curve, traffic)
    seconds = curve.launch.value + (compute**4 + memory**4) ** 0.25
    return np.where(np.asarray(m) > 0, seconds, 0.0)


def _streamed(device: Device, curve: GemmCurve | GroupedGemmCurve, traffic_bytes: Numbers) -> Numbers:
    """Time to move the operands of a product."""
    if curve.stream_fraction is None:
        return traffic_bytes / device.bandwidth
    return traffic_bytes / (device.memory_bandwidth * curve.stream_fraction.value)


def _ramp(half: Sourced[float] | None, size: Numbers) -> Numbers:
    """Factor on the time of a product that is small along one side: 1 + half / size."""
    return 1.0 if half is None else 1.0 + half.value / np.maximum(size, 1.0)


def cast_bytes(which: Pass, input_width: float, gradient_width: float) -> float:
    """Bytes per row that casting the operands of one linear moves; a width is 0 for what arrives already cast.

    F: the input is read in BF16 and written in FP8 by rows of 128 (3 bytes an element). I: the output's gradient is
    read once and written by rows for this product and by columns for that of the weights (4). W: the kept input is
    read in FP8 and written again by columns (2). DeepSeek-V3, arXiv 2412.19437, sections 3.3.2 and 3.5.2.
    """
    return {"F": 3.0 * input_width, "I": 4.0 * gradient_width, "W": 2.0 * input_width}[which]


def cast_seconds(device: Device, curve: GemmCurve | GroupedGemmCurve, traffic_bytes: Numbers) -> Numbers:
    """Casts with scales: ``quantize_passes`` times as long as moving their bytes once."""
    passes = 0.0 if curve.quantize_passes is None else curve.quantize_passes.value
    return passes * traffic_bytes / device.bandwidth


def padded_rows(counts: npt.NDArray[np.int64], tile: int) -> FloatArray:
    """Rows after each expert is padded to whole tiles, summed over the last axis."""
    return np.asarray((-(-counts // tile) * tile).sum(-1), dtype=np.float64)


def grouped_gemm_seconds(
    device: Device,
    form: str,
    which: Pass,
    *,
    rows: FloatArray,
    padded: FloatArray,
    active: FloatArray,
    n: float,
    k: float,
) -> FloatArray:
    """The same linear in every expert of a rank, in one grouped kernel.

    ``t = launch + active x per_expert + (c^4 + b^4)^(1/4)`` with ``c = (padded + active x rows_half) 2nk / (P e)
    (1 + k_half/k)`` and ``b`` the time to read the weights of the active experts and the rows. The weight gradient
    contracts over each expert's tokens: ``c = (rows + active x wgrad_rows_half) 2nk / (P e)``.
    """
    curves = device.profile.kernels.grouped_gemm
    curve = curves.get(form) or curves["bf16"]  # type: ignore[call-overload]
    form = form if form in curves else "bf16"
    inner, columns, scale = k, n, 1.0
    if which == "I":
        inner, columns, scale = n, k, curve.dgrad_scale.value
    rate = device.peak(form) * curve.efficiency.value * (curve.wgrad_scale.value if which == "W" else scale)
    if which == "W":
        compute = (rows + active * curve.wgrad_rows_half.value) * 2.0 * n * k / rate
        compute = compute * _ramp(curve.rows_half, n) * _ramp(curve.columns_half, k)
    else:
        few = 0.0 if curve.rows_half is None else active * curve.rows_half.value
        compute = (padded + few) * 2.0 * n * k / rate
        compute = compute * _ramp(curve.k_half, inner) * _ramp(curve.columns_half, columns)
    size = ELEMENT_BYTES[form]
    weights = active * n * k * (8.0 if which == "W" else size)
    traffic = weights + rows * (inner * size + columns * (size if which == "W" else max(2.0, size)))
    memory = _streamed(device, curve, traffic)
    seconds = curve.launch.value + active * curve.per_expert.value + (compute**4 + memory**4) ** 0.25
    return np.asarray(np.where(rows > 0, seconds, 0.0))


def attention_seconds(
    device: Device, kind: Literal["mha", "mla"], flop: Numbers, context: float, which: Pass
) -> Numbers:
    """Fused attention core: counted FLOPs over a rate that grows with the context, r(s) = r s / (s + s_half).

    The backward computes five products where the forward has two: 2.5 times the FLOPs.
    """
    curves = device.profile.kernels.attention
    curve = curves.get(kind) or curves["mha"]
    share = device.sms * device.profile.accelerator.ranks_per_accelerator / device.profile.accelerator.sm_count.value
    rate = (
        curve.rate.value
        / device.profile.accelerator.ranks_per_accelerator
        * share
        * context
        / (context + curve.s_half.value)
    )
    work = 2.5 / curve.backward_scale.value if which == "I" else 1.0
    return curve.launch.value + flop * work / rate


def routing_seconds(device: Device, traffic_bytes: Numbers, tokens: Numbers) -> Numbers:
    """Choosing experts for tokens and planning the rows: a cost per layer and per token, or that of the bytes alone."""
    curve = device.profile.kernels.memory
    if curve.routing_launch is None:
        return memory_seconds(device, traffic_bytes)
    each = 0.0 if curve.routing_per_token is None else curve.routing_per_token.value
    return curve.routing_launch.value + tokens * each


def update_seconds(device: Device, traffic_bytes: Numbers) -> Numbers:
    """The optimizer's update of all weights: one stream, from memory."""
    curve = device.profile.kernels.memory
    if curve.update_fraction is None:
        return memory_seconds(device, traffic_bytes)
    return curve.launch.value + traffic_bytes / (device.memory_bandwidth * curve.update_fraction.value)


def memory_seconds(device: Device, traffic_bytes: Numbers, *, permute: bool = False, backward: bool = False) -> Numbers:
    """A memory-bound kernel: launch + bytes / achieved bandwidth; gathers and scatters have a rate of their own.

    With a cache in the profile, the first ``cache_bytes`` move at its bandwidth. Where the backward is several kernels
    its bytes move ``1 / backward_scale`` times.
    """
    curve = device.profile.kernels.memory
    if backward and curve.backward_scale is not None:
        traffic_bytes = traffic_bytes / curve.backward_scale.value
    rate = device.bandwidth
    if permute:
        rate = rate * curve.permute_fraction.value / curve.fraction.value
    if curve.cache_bytes is None or curve.cache_bandwidth is None:
        return curve.launch.value + traffic_bytes / rate
    inside = np.minimum(traffic_bytes, curve.cache_bytes.value)
    faster = np.maximum(curve.cache_bandwidth.value * rate / device.bandwidth, rate)
    return curve.launch.value + np.asarray(inside / faster + (traffic_bytes - inside) / rate)
