"""Attention without a fused core: two batched products and the passes over the matrix of scores between them.

Before FlashAttention (arXiv 2205.14135) the scores of every head were written to memory and read again by the softmax,
the dropout and the second product. With s bytes a number, a score moves

    forward   2 s (products) + 2 s (softmax, scale and mask fused)            + (2 s + 1) with dropout
    backward  2 s + 2 s (products, for scores and values; queries and keys)   + 3 s (softmax) + (2 s + 1) with dropout

and nothing skips the masked half. Passes counted after Megatron-LM's unfused path (arXiv 2205.05198, section 4.1, whose
5 bytes a score are what is kept).
"""

from __future__ import annotations

from simulator.timing.kernels import Device, Pass
from simulator.workload.ops import AttentionCore


def unfused_attention_seconds(
    device: Device, op: AttentionCore, form: str, which: Pass, *, tokens: float, ranks: int, size: int, dropout: bool
) -> float:
    """Seconds of the core for ``tokens`` queries with the heads divided over ``ranks``.

    ``size``: bytes of a score. The products run at the dense rate for an inner dimension as short as a head.
    """
    curves = device.profile.kernels.gemm
    curve = curves.get(form) or curves["bf16"]  # type: ignore[call-overload]
    scores = tokens * op.context_full * op.heads / ranks
    moved = 4.0 * size if which == "F" else 7.0 * size
    moved += 2.0 * size + 1.0 if dropout else 0.0
    products = 2.0 if which == "F" else 4.0
    flop = op.flop_per_token(causal=False) * tokens / ranks * products / 2.0
    rate = device.peak(form if form in curves else "bf16") * curve.efficiency.value
    ramp = 1.0 + curve.k_half.value / max(1.0, (op.qk_dim + op.value_dim) / 2.0)
    launches = (products + 1.0 + (1.0 if dropout else 0.0)) * curve.launch.value
    return launches + flop / rate * ramp + scores * moved / device.bandwidth


__all__ = ["unfused_attention_seconds"]
