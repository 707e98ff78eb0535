"""Seconds of the ops of a layer on one rank: which kernel an op is, how many rows it has, what is cast before it.

Results are [rows, lanes]: routed experts have a row per microbatch and a time per lane, since every rank receives its
own load; everything else has one row and one lane.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from simulator.routing import ExpertLoad
from simulator.spec.fields import ELEMENT_BYTES
from simulator.spec.scenario import Scenario
from simulator.timing.classes import Item
from simulator.timing.kernels import (
    Device,
    FloatArray,
    Pass,
    attention_seconds,
    cast_bytes,
    cast_seconds,
    gemm_seconds,
    grouped_gemm_seconds,
    memory_seconds,
    padded_rows,
    routing_seconds,
)
from simulator.timing.one_hot import one_hot_seconds
from simulator.timing.unfused import unfused_attention_seconds
from simulator.workload.ops import AttentionCore, Embedding, Gemm, GroupedGemm, MemoryOp, OneHotProduct


@dataclass
class OpTimes:
    """Times of single ops of one scenario."""

    scenario: Scenario
    load: ExpertLoad | None
    _rows: dict[tuple[int, int], tuple[FloatArray, FloatArray, FloatArray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Resolve what every time needs."""
        self.profile = self.scenario.cluster.profile.under(self.scenario.cluster.stack_name)
        self.precision = self.scenario.training.precision
        self.tensor = self.scenario.parallelism.tensor
        self.sequence = self.tensor if self.scenario.parallelism.sequence_parallel else 1
        # Attention curves are measured in BF16; wider formats run at the ratio of the peaks.
        whole = Device.of(self.profile)
        self._attention_slowdown = max(1.0, whole.peak("bf16") / whole.peak(self.precision.attention))
        self.by_rank = None if self.load is None else self.load.by_rank

    def item(self, item: Item, which: Pass, device: Device, layer: int | None, parts: int = 1) -> FloatArray:
        """Seconds of one op, or of one of its ``parts``, in one pass [rows, lanes]."""
        op = item.op
        tokens = self.tokens(item.stack) / parts
        if isinstance(op, Gemm):
            return scalar(self._gemm(op, which, device, tokens))
        if isinstance(op, GroupedGemm):
            return self._grouped(op, which, device, layer, parts)
        if which == "W":
            return np.zeros((1, 1))
        if isinstance(op, AttentionCore):
            if not self.scenario.training.fused_attention:
                return scalar(self._unfused(op, which, device, tokens))
            flop = op.flop_per_token() * tokens / self.tensor
            seconds = attention_seconds(device, op.kind, flop, max(op.context_full / parts, 1.0), which)
            return scalar(seconds * self._attention_slowdown)
        if isinstance(op, OneHotProduct):
            form = str(getattr(self.precision, op.role))
            return scalar(one_hot_seconds(device, op, form, which, tokens / self.sequence))
        if isinstance(op, Embedding):
            return scalar(memory_seconds(device, 2.0 * op.width * ELEMENT_BYTES[self.precision.residual] * tokens))
        if isinstance(op, MemoryOp) and op.elements:
            return self._memory(op, which, device, tokens, layer, parts)
        return np.zeros((1, 1))

    def _unfused(self, op: AttentionCore, which: Pass, device: Device, tokens: float) -> float:
        form = self.precision.attention
        return unfused_attention_seconds(
            device,
            op,
            form,
            which,
            tokens=tokens,
            ranks=self.tensor,
            size=int(ELEMENT_BYTES[form]),
            dropout=self.scenario.model.dropout,
        )

    def casts(self, item: Item, which: Pass, device: Device, layer: int | None, parts: int = 1) -> FloatArray:
        """Seconds in which the operands of a linear are cast to the format of its product [rows, lanes]."""
        op = item.op
        if not isinstance(op, Gemm | GroupedGemm):
            return np.zeros((1, 1))
        kernels, form = self.profile.kernels, str(getattr(self.precision, op.role))
        if isinstance(op, Gemm):
            if form not in kernels.gemm:
                return np.zeros((1, 1))
            rows, n, k = self._linear(op, self.tokens(item.stack) / parts)
            traffic = rows * cast_bytes(which, 0.0 if op.shares_input else k, n)
            return scalar(cast_seconds(device, kernels.gemm[form], traffic))
        if form not in kernels.grouped_gemm:
            return np.zeros((1, 1))
        n, k = self._expert(op)
        width = cast_bytes(which, k, n)
        if op.arrives != "nothing" and self.precision.dispatch == form:
            # What arrives in FP8 is by rows; for the weight gradient it is written again by columns.
            came_in, came_back = op.arrives == "input", op.arrives == "gradient"
            width = cast_bytes(which, k if which == "W" or not came_in else 0.0, 0.0 if came_back else n)
            width += cast_bytes("W", n, 0.0) if came_back and which == "W" else 0.0
        return np.asarray(cast_seconds(device, kernels.grouped_gemm[form], self._received(layer, parts)[0] * width))

    def _gemm(self, op: Gemm, which: Pass, device: Device, tokens: float) -> float:
        rows, n, k = self._linear(op, tokens)
        return float(gemm_seconds(device, str(getattr(self.precision, op.role)), which, rows, n, k))

    def _linear(self, op: Gemm, tokens: float) -> tuple[float, float, float]:
        """Rows, columns and inner dimension of a linear on one rank."""
        rows, n, k = tokens * op.rows, float(op.n), float(op.k)
        if op.split == "column":
            return rows, n / self.tensor, k
        if op.split == "row":
            return rows, n, k / self.tensor
        return rows / self.sequence, n, k

    def _grouped(self, op: GroupedGemm, which: Pass, device: Device, layer: int | None, parts: int = 1) -> FloatArray:
        rows, padded, active = self._received(layer, parts)
        n, k = self._expert(op)
        form = str(getattr(self.precision, op.role))
        return grouped_gemm_seconds(device, form, which, rows=rows, padded=padded, active=active, n=n, k=k)

    def _expert(self, op: GroupedGemm) -> tuple[float, float]:
        """Columns and inner dimension of an expert's linear on one rank."""
        shards = self.scenario.parallelism.expert_tensor
        n, k = float(op.n), float(op.k)
        return (n / shards, k) if op.split == "column" else (n, k / shards) if op.split == "row" else (n, k)

    def _memory(
        self, op: MemoryOp, which: Pass, device: Device, tokens: float, layer: int | None, parts: int = 1
    ) -> FloatArray:
        size = ELEMENT_BYTES[str(getattr(self.precision, op.role))]
        traffic = op.elements * size * (1.5 if which == "I" and op.kind != "permute" else 1.0)
        if op.rows == "received":
            rows, _, _ = self._received(layer, parts)
            received = traffic * rows / self.scenario.parallelism.expert_tensor
            return np.asarray(memory_seconds(device, received, backward=which == "I"))
        shard = {"tensor": self.tensor, "sequence": self.sequence, "none": 1}[op.shard]
        if op.kind == "routing" and which == "F":
            return scalar(routing_seconds(device, traffic * tokens / shard, tokens / shard))
        return scalar(
            memory_seconds(device, traffic * tokens / shard, permute=op.kind == "permute", backward=which == "I")
        )

    def tokens(self, stack: str) -> float:
        """Tokens of one microbatch on one rank of the dense layers."""
        training = self.scenario.training
        return training.micro_batch_sequences * training.length(stack) / self.scenario.parallelism.context

    def _received(self, layer: int | None, parts: int = 1) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Rows, rows padded to tiles, and active experts of each rank [microbatches, lanes]; of one part of them."""
        assert self.by_rank is not None  # only MoE layers have experts
        assert layer is not None
        if (layer, parts) not in self._rows:
            counts = self.by_rank[:, layer]
            curves = self.profile.kernels.grouped_gemm
            curve = curves.get(self.precision.gemm) or curves["bf16"]  # type: ignore[arg-type]
            rows = counts.sum(-1).astype(np.float64) / parts
            self._rows[layer, parts] = (
                rows,
                padded_rows(-(-counts // parts), curve.tile_rows.value),
                (counts > 0).sum(-1).astype(np.float64),
            )
        return self._rows[layer, parts]


def scalar(value: object) -> FloatArray:
    """A number as [1, 1]."""
    return np.asarray(value, dtype=np.float64).reshape(1, 1)
