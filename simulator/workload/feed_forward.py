"""The feed-forward part of a layer: dense, or router, shared experts, dispatch, experts, combine.

Sources: gated FFN as in Llama 2 (arXiv 2307.09288); shared experts and limited routing as in DeepSeek-V3 (arXiv
2412.19437, section 2.1.2); noisy and two-level gating as in arXiv 1701.06538; dense residual as in ST-MoE (arXiv
2202.08906). What is kept in which format follows arXiv 2412.19437 (section 3.3.3).
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.spec.model import Model
from simulator.workload.norms import dropout_mask
from simulator.workload.ops import Collective, Gemm, GroupedGemm, MemoryOp, OneHotProduct, Op, Saved
from simulator.workload.slots import Mask


def dense_ffn_ops(model: Model, family: str, size: int, item: str) -> Iterator[Op]:
    """Up (and gate), activation, down, inside one tensor-parallel region."""
    ffn, width = model.ffn, model.hidden_size
    assert ffn is not None  # a law of the scenario
    yield Collective(f"{family} enter", "tensor", group="tensor", kind="enter", elements=width)
    yield from _ffn_ops(family, item, width, size, gated=ffn.gated, bias="ffn" in model.biases)
    yield Collective(f"{family} exit", "tensor", group="tensor", kind="exit", elements=width, last=True)
    yield MemoryOp(f"{family} residual", "elementwise", dropout_mask(model, "ffn"), elements=3.0 * width)


def _ffn_ops(
    family: str, item: str, width: int, size: int, *, gated: bool, bias: bool, cast: bool = False
) -> Iterator[Op]:
    """``cast``: the router keeps the input in the format of the residual stream; the up-projection's own is a cast."""
    inner = (2 if gated else 1) * size
    kept = Saved(f"{family} input", width, "saved_activations", "sequence", dropped_by=frozenset({"norm"}), cast=cast)
    hidden = Saved(f"{family} pre-activation", inner, "saved_activations", "tensor", dropped_by=frozenset({item}))
    output = Saved(
        f"{family} activation", size, "saved_activations", "tensor", dropped_by=frozenset({item, "activation"})
    )
    yield Gemm(f"{family} up", family, (kept,), frozenset({item}), n=inner, k=width, split="column", bias=bias)
    yield MemoryOp(
        f"{family} activation",
        family,
        (hidden,),
        frozenset({item, "activation"}),
        elements=float(inner + size),
        shard="tensor",
    )
    yield Gemm(f"{family} down", family, (output,), n=width, k=size, split="row", bias=bias)


def expert_ops(model: Model, mask: Mask | None = None) -> Iterator[Op]:
    """Router, shared experts, dispatch, experts, combine; ``mask``: that of a capacity group, where it is one-hot."""
    moe, width = model.moe, model.hidden_size
    assert moe is not None  # a law of the scenario
    if moe.router.kind != "hash":
        logits = Saved("router logits", moe.experts, "router", "sequence")
        kept = Saved("router and expert input", width, "residual", "sequence", dropped_by=frozenset({"norm"}))
        yield MemoryOp("router input", "router", (kept, logits))
        yield from _router(model)
    yield MemoryOp("top-k", "router", elements=2.0 * moe.experts, kind="routing", role="router")
    if moe.dense_residual:
        yield from dense_ffn_ops(model, "dense_ffn", model.dense_ffn_size(), "dense_ffn")
    if moe.shared_experts:
        yield Collective("shared_expert enter", "tensor", group="tensor", kind="enter", elements=width)
        yield from _ffn_ops(
            "shared_expert", "expert_ffn", width, moe.shared_ffn_size, gated=moe.gated, bias=False, cast=True
        )
        yield Collective("shared_expert exit", "tensor", group="tensor", kind="exit", elements=width, last=True)
        if moe.shared_expert_gate:
            yield Gemm("shared expert gate", "shared_expert", n=1, k=width)
    if mask is None:
        yield MemoryOp("permute", "permute", elements=2.0 * width * moe.top_k, kind="permute", role="dispatch")
    else:
        yield from _into_slots(mask, width)
    yield Collective("dispatch", "expert_all_to_all", group="expert", kind="dispatch", elements=width, role="dispatch")
    yield from _routed(model)
    yield Collective("combine", "expert_all_to_all", group="expert", kind="combine", elements=width, role="combine")
    lost = dropout_mask(model, "experts")
    if mask is None:
        yield MemoryOp("unpermute", "permute", lost, elements=width * (moe.top_k + 2.0), kind="permute")
    else:
        yield from _out_of_slots(mask, width)
        yield MemoryOp("expert residual", "elementwise", lost, elements=3.0 * width)


def _into_slots(mask: Mask, width: int) -> Iterator[Op]:
    """Both masks, each written once where a compiler fuses their making, and the product that dispatches the tokens.

    They are kept for the backward pass, unless the experts are computed again.
    """
    item = frozenset({"expert_ffn"})
    kept = tuple(
        Saved(name, mask.slots, "residual", "sequence", dropped_by=item) for name in ("dispatch mask", "combine mask")
    )
    yield MemoryOp("one-hot masks", "permute", kept, item, elements=2.0 * mask.slots)
    yield OneHotProduct(
        "dispatch product", "permute", direction="dispatch", tokens=mask.tokens, slots=mask.slots, width=width
    )


def _out_of_slots(mask: Mask, width: int) -> Iterator[Op]:
    """The product that combines the slots; its mask's gradient needs the outputs of the experts."""
    outputs = Saved("expert outputs", width, "combine", "none", "received")
    yield OneHotProduct(
        "combine product",
        "permute",
        (outputs,),
        direction="combine",
        tokens=mask.tokens,
        slots=mask.slots,
        width=width,
    )


def _router(model: Model) -> Iterator[Op]:
    """One matrix, two with noise; in two-level gating a token meets the first level and top_k^1/2 of its groups."""
    moe, width = model.moe, model.hidden_size
    assert moe is not None
    router = moe.router
    bias = router.selection_bias or "router" in model.biases
    for name in ("router", "router noise") if router.kind == "noisy_top_k" else ("router",):
        if router.branching is None:
            yield Gemm(name, "router", n=moe.experts, k=width, role="router", bias=bias)
            continue
        chosen, inside = round(moe.top_k**0.5), moe.experts // router.branching
        yield Gemm(f"{name}, first level", "router", n=router.branching, k=width, role="router")
        yield Gemm(
            f"{name}, second level", "router", n=chosen * inside, k=width, role="router", stored_columns=moe.experts
        )


def _routed(model: Model) -> Iterator[Op]:
    moe, width = model.moe, model.hidden_size
    assert moe is not None
    size, inner = moe.expert_ffn_size, (2 if moe.gated else 1) * moe.expert_ffn_size
    item, bias = frozenset({"expert_ffn"}), "ffn" in model.biases
    tokens = Saved("dispatched tokens", width, "saved_activations", "none", "received")
    hidden = Saved("expert pre-activation", inner, "saved_activations", "tensor", "received", item)
    output = Saved("expert activation", size, "saved_activations", "tensor", "received", item | {"activation"})
    yield Collective("expert enter", "tensor", group="expert_tensor", kind="enter", elements=width, role="dispatch")
    experts, top_k = moe.experts, moe.top_k
    yield GroupedGemm(
        "expert up",
        "expert",
        (tokens,),
        item,
        n=inner,
        k=width,
        experts=experts,
        top_k=top_k,
        split="column",
        bias=bias,
        arrives="input",
    )
    yield MemoryOp(
        "expert activation",
        "expert",
        (hidden,),
        item | {"activation"},
        elements=float(inner + size),
        rows="received",
        shard="tensor",
    )
    yield GroupedGemm(
        "expert down",
        "expert",
        (output,),
        n=width,
        k=size,
        experts=experts,
        top_k=top_k,
        split="row",
        bias=bias,
        arrives="gradient",
    )
    yield Collective("expert exit", "tensor", group="expert_tensor", kind="exit", elements=width, last=True)
