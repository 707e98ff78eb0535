"""The feed-forward parts: one for all tokens, and the experts of a layer over rows that are sorted by expert.

    ffn(x) = down(activation(up x))                          two matrices
    ffn(x) = down(activation(gate x) * (up x))               three, of which gate and up are one product

Three forms of the same experts: ``padded``, one batched product over experts that own equally many rows; ``grouped``,
one grouped product over runs of rows (``torch.nn.functional.grouped_mm``: fp32, bf16 and fp16, widths in multiples of
16 bytes); ``loop``, a product for each expert, in any format.

In fp8 the inputs of both products of the loop are scaled per tensor to the range of e4m3 (arXiv 2209.05433) and the
sums come back in bf16. The backward pass is that of the products before rounding, in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from simulator.errors import NotSimulated
from simulator.spec.model import MixtureOfExperts

Form = Literal["padded", "grouped", "loop"]
E4M3 = torch.float8_e4m3fn
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


class FeedForward(nn.Module):
    """A dense feed-forward part of inner width ``size``, also that of all shared experts together."""

    def __init__(self, width: int, size: int, activation: str, *, gated: bool, **factory: Any) -> None:
        super().__init__()
        self.kind, self.gated = activation, gated
        self.up = nn.Linear(width, (2 if gated else 1) * size, bias=False, **factory)
        self.down = nn.Linear(size, width, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return self.down(activate(self.up(x), self.kind, gated=self.gated))


class Experts(nn.Module):
    """The routed experts: weights ``up`` [E, h, f or 2 f] and ``down`` [E, f, h]."""

    def __init__(
        self,
        width: int,
        moe: MixtureOfExperts,
        form: Form,
        *,
        fp8: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        size, factory = moe.expert_ffn_size, {"dtype": dtype, "device": device}
        self.kind, self.gated, self.form, self.fp8 = moe.activation, moe.gated, form, fp8
        self.up_weight = nn.Parameter(torch.empty(moe.experts, width, (2 if moe.gated else 1) * size, **factory))
        self.down_weight = nn.Parameter(torch.empty(moe.experts, size, width, **factory))
        check_form(self, dtype)
        for weight in (self.up_weight, self.down_weight):
            bound = 1.0 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)  # as nn.Linear

    def up(self, rows: Tensor, counts: Tensor) -> Tensor:
        """[R, h] -> [R, f], gated [R, 2 f]: gate, then up."""
        return self._product(rows, self.up_weight, counts)

    def activation(self, inner: Tensor) -> Tensor:
        """[R, f or 2 f] -> [R, f]."""
        return activate(inner, self.kind, gated=self.gated)

    def down(self, inner: Tensor, counts: Tensor) -> Tensor:
        """[R, f] -> [R, h]."""
        return self._product(inner, self.down_weight, counts)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [R, h] that are sorted by expert, ``counts`` [E] of each, equal numbers in the padded form."""
        return self.down(self.activation(self.up(rows, counts)), counts)

    def _product(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Each row times the matrix of its expert."""
        if self.form == "padded":
            return torch.bmm(rows.view(len(weight), -1, rows.shape[1]), weight).flatten(0, 1)
        if self.form == "grouped":
            return functional.grouped_mm(rows, weight, offs=counts.cumsum(0).to(torch.int32))
        product = fp8_product if self.fp8 else torch.mm
        parts = zip(rows.split(counts.tolist()), weight.unbind(), strict=True)
        return torch.cat([product(part, matrix) for part, matrix in parts])


def activate(inner: Tensor, kind: str, *, gated: bool) -> Tensor:
    """Non-linearity [..., f or 2 f] -> [..., f]; gated, its value of the first half times the second half."""
    if not gated:
        return ACTIVATIONS[kind](inner)
    gate, up = inner.chunk(2, dim=-1)
    return ACTIVATIONS[kind](gate) * up


def check_form(experts: Experts, dtype: torch.dtype) -> None:
    """Raise where the products of this form or format cannot run."""
    up = experts.up_weight
    widths = {size for weight in (up, experts.down_weight) for size in weight.shape[1:]}
    if experts.form == "grouped" and (dtype == torch.float64 or any(size * up.element_size() % 16 for size in widths)):
        raise ValueError(f"the grouped form needs fp32, bf16 or fp16 and widths in multiples of 16 bytes, not {dtype}")
    if experts.fp8 and (experts.form != "loop" or dtype != torch.bfloat16 or any(size % 16 for size in widths)):
        raise ValueError("fp8 experts are kept in bf16, computed in the loop form, and have widths in multiples of 16")
    if experts.fp8 and not has_fp8(up.device):
        raise NotSimulated(
            f"fp8 products need a GPU of compute capability 8.9 or higher; use bf16 on this {up.device.type}"
        )


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies fp8 numbers in hardware; a CPU converts them and gains nothing."""
    return bool(device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def fp8_product(left: Tensor, right: Tensor) -> Tensor:
    """[m, k] x [k, n] -> [m, n] in bf16, both inputs scaled per tensor to e4m3."""
    return _Fp8Product.apply(left, right)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        if not len(left):
            return left.new_zeros(0, right.shape[1])
        (a, scale_a), (b, scale_b) = scaled(left), scaled(right.t())
        return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return gradient @ right.t(), left.t() @ gradient


def scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values over their scale in e4m3, row after row in memory, and the scale: largest magnitude / 448."""
    scale = values.detach().abs().amax().float().clamp_min(1e-12) / torch.finfo(E4M3).max
    return (values / scale).contiguous().to(E4M3), scale


__all__ = ["ACTIVATIONS", "Experts", "FeedForward", "Form", "activate", "fp8_product", "has_fp8", "scaled"]
