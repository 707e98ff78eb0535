"""The part of a layer that mixes positions: attention in its kinds, cross-attention, LSTM.

Sources: grouped-query attention as in Llama 2 (arXiv 2307.09288); latent attention as in DeepSeek-V3 (arXiv
2412.19437, section 2.1.1); cross-attention as in T5 (arXiv 1910.10683); LSTM as in arXiv 1701.06538. Which tensors
stay for the backward pass follows arXiv 2205.05198 (section 4).
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.spec.model import LayerKind, Mixer, Model
from simulator.spec.training import Training
from simulator.workload.norms import dropout_mask, norm
from simulator.workload.ops import AttentionCore, Collective, Gemm, MemoryOp, Op, Saved


def mixer_ops(model: Model, training: Training, layer: LayerKind) -> Iterator[Op]:
    """Ops of one layer's mixer, up to its residual."""
    mixer, width = layer.mixer, model.hidden_size
    if mixer.kind == "lstm":
        kept = Saved("lstm gates and state", 6.0 * width, "saved_activations", "none")
        yield Gemm("lstm", "lstm", (kept,), n=4 * width, k=2 * width)
        yield MemoryOp("lstm gates", "lstm", elements=10.0 * width)
        return
    yield norm(model, "attention norm")
    if mixer.kind == "mla":
        yield from _latent_projections(model, mixer)
    else:
        yield Collective("attention enter", "tensor", group="tensor", kind="enter", elements=width)
        yield from _projections(model, mixer)
    yield from _core(model, training, layer)
    yield _output(model, mixer, "attention output")
    yield Collective("attention exit", "tensor", group="tensor", kind="exit", elements=width)
    yield MemoryOp("attention residual", "elementwise", dropout_mask(model, "attention"), elements=3.0 * width)


def _projections(model: Model, mixer: Mixer) -> Iterator[Op]:
    width, head = model.hidden_size, mixer.head_dim or 0
    query, key_value = (mixer.heads or 0) * head, mixer.key_value_heads * head
    kept = Saved("qkv input", width, "saved_activations", "sequence", dropped_by=frozenset({"norm"}))
    yield Gemm(
        "qkv",
        "attention",
        (kept,),
        frozenset({"attention"}),
        n=query + 2 * key_value,
        k=width,
        split="column",
        bias="qkv" in model.biases,
    )
    if mixer.qk_norm != "none":
        weights = 2 * head if mixer.qk_norm == "head" else query + key_value
        yield MemoryOp(
            "qk norm",
            "norm",
            repeated_by=frozenset({"attention"}),
            elements=2.0 * (query + key_value),
            weights=weights,
            shard="tensor",
        )
    if model.position == "rope":
        yield MemoryOp(
            "rope",
            "elementwise",
            repeated_by=frozenset({"attention"}),
            elements=2.0 * (query + key_value),
            shard="tensor",
        )


def _latent_projections(model: Model, mixer: Mixer) -> Iterator[Op]:
    """Down to the latents, norms, up to the heads (DeepSeek-V3, section 2.1.1). Up-projections can be recomputed."""
    width, heads = model.hidden_size, mixer.heads or 0
    rank, latent = mixer.query_rank, (mixer.key_value_rank or 0)
    nope, rope, value = mixer.nope_head_dim or 0, mixer.rope_head_dim or 0, mixer.value_dim
    kept = Saved("qkv input", width, "saved_activations", "sequence", dropped_by=frozenset({"norm"}))
    own = Saved("query input", width, "saved_activations", "sequence", dropped_by=frozenset({"norm"}), cast=True)
    again = frozenset({"mla_up_projection", "attention"})

    def latent_norm(name: str, size: int) -> MemoryOp:
        held = Saved(f"{name} latent", size + (rope if name == "key_value" else 0), "residual", "none")
        return MemoryOp(
            f"{name} latent norm", "norm", (held,), frozenset({"norm"}), elements=2.0 * size, weights=size, shard="none"
        )

    def up(name: str, size: int, outputs: int) -> Gemm:
        held = Saved(
            f"{name} up input",
            size,
            "saved_activations",
            "none",
            dropped_by=frozenset({"norm", "attention", "mla_up_projection"}),
        )
        return Gemm(f"{name} up", "attention", (held,), again, n=outputs, k=size, split="column")

    def enter(name: str, size: int) -> Collective:
        """Tensor-parallel heads need the latents of all tokens: smaller than the layer's input."""
        return Collective(f"{name} enter", "tensor", (), again, group="tensor", kind="enter", elements=size)

    yield Gemm("key_value down", "attention", (kept,), frozenset({"attention"}), n=latent + rope, k=width)
    if rank is None:
        yield enter("query", width)
        yield Gemm(
            "query",
            "attention",
            (own,),
            frozenset({"attention"}),
            n=heads * mixer.qk_dim,
            k=width,
            split="column",
            shares_input=True,
        )
    else:
        yield Gemm("query down", "attention", (own,), frozenset({"attention"}), n=rank, k=width, shares_input=True)
        yield latent_norm("query", rank)
        yield enter("query latent", rank)
        yield up("query", rank, heads * mixer.qk_dim)
    yield latent_norm("key_value", latent)
    yield enter("key_value latent", latent + rope)
    yield up("key_value", latent, heads * (nope + value))
    if model.position == "rope":
        yield MemoryOp("rope", "elementwise", repeated_by=again, elements=4.0 * heads * mixer.qk_dim, shard="tensor")


def _core(model: Model, training: Training, layer: LayerKind) -> Iterator[Op]:
    mixer, length = layer.mixer, training.length(layer.stack)
    yield Collective(
        "context ring",
        "context",
        (),
        frozenset({"attention", "attention_core"}),
        group="context",
        kind="ring",
        elements=float(mixer.key_value_heads * (mixer.qk_dim + mixer.value_dim)),
    )
    causal = layer.stack == "decoder"
    yield _attention_core(training, mixer, "attention core", length, *_contexts(mixer, length, causal=causal))


def _contexts(mixer: Mixer, length: int, *, causal: bool) -> tuple[float, float]:
    """Mean keys per query: counted (half of the matrix when causal) and of the whole matrix."""
    if not causal:
        return float(length), float(length)
    if mixer.window is not None and mixer.window < length:
        inside = mixer.window - mixer.window**2 / (2.0 * length)
        return inside, 2.0 * inside
    size = min(length, mixer.chunk or length)
    return size / 2.0, float(size)


def _attention_core(
    training: Training, mixer: Mixer, name: str, keys: int, context: float, full: float
) -> AttentionCore:
    heads, key_value = mixer.heads or 0, mixer.key_value_heads
    expanded = heads if mixer.kind == "mla" else key_value  # MLA trains with keys and values expanded to every head
    up = frozenset({"attention", "mla_up_projection"}) if mixer.kind == "mla" else frozenset({"attention"})
    core = frozenset({"attention", "attention_core"})
    kept = [
        Saved(
            "query, key, value",
            heads * mixer.qk_dim + expanded * (mixer.qk_dim + mixer.value_dim),
            "attention",
            "tensor",
            dropped_by=up,
        )
    ]
    if training.fused_attention:
        kept.append(Saved("softmax statistics", heads, "statistics", "tensor", dropped_by=core))
    else:  # softmax output, dropout mask, dropout output: 5 bytes for each score (arXiv 2205.05198, section 4.1)
        kept.append(Saved("attention scores", 5.0 * heads * keys, "bytes", "tensor", dropped_by=core))
    return AttentionCore(
        name,
        "attention_core",
        tuple(kept),
        core,
        heads=heads,
        kv_heads=key_value,
        qk_dim=mixer.qk_dim,
        value_dim=mixer.value_dim,
        context=context,
        context_full=full,
        kind="mla" if mixer.kind == "mla" else "mha",
        sink_parameters=heads if mixer.sinks else 0,
    )


def _output(model: Model, mixer: Mixer, name: str) -> Gemm:
    size = (mixer.heads or 0) * mixer.value_dim
    kept = Saved(f"{name} input", size, "saved_attention_output", "tensor", dropped_by=frozenset({"attention"}))
    bias = "attention_output" in model.biases
    return Gemm(name, "attention", (kept,), n=model.hidden_size, k=size, split="row", bias=bias)


def cross_attention_ops(model: Model, training: Training, mixer: Mixer) -> Iterator[Op]:
    """Decoder queries over encoder keys: keys and values are computed on the encoder's tokens."""
    width, head = model.hidden_size, mixer.head_dim or 0
    ratio = training.length("encoder") / training.length("decoder")
    kept = Saved("cross query input", width, "saved_activations", "sequence", dropped_by=frozenset({"norm"}))
    yield norm(model, "cross-attention norm")
    yield Collective("cross-attention enter", "tensor", group="tensor", kind="enter", elements=width)
    yield Gemm(
        "cross query",
        "attention",
        (kept,),
        frozenset({"attention"}),
        n=(mixer.heads or 0) * head,
        k=width,
        split="column",
    )
    yield Gemm(
        "cross key value",
        "attention",
        (),
        frozenset({"attention"}),
        n=2 * mixer.key_value_heads * head,
        k=width,
        rows=ratio,
        split="column",
    )
    keys = training.length("encoder")
    yield _attention_core(training, mixer, "cross-attention core", keys, float(keys), float(keys))
    yield _output(model, mixer, "cross-attention output")
    yield Collective("cross-attention exit", "tensor", group="tensor", kind="exit", elements=width)
    yield MemoryOp("cross-attention residual", "elementwise", dropout_mask(model, "cross"), elements=3.0 * width)
