"""The model contract: the architecture of one language model.

A model is a stack of layers; each layer has a mixer (attention or LSTM) and a feed-forward part that is dense, a
mixture of experts, or absent. ``pattern`` lists the layers and is repeated over the depth. For the usual case,
``moe.stride`` and ``moe.first_dense_layers`` are a shorthand: the other rooms only ever see the expanded list,
:meth:`Model.decoder_layers`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from simulator.spec.fields import Contract, Count, Depth, Flag, NonNegative, Positive, Whole, WholeOrZero, described

MixerKind = Literal["mha", "gqa", "mqa", "mla", "lstm"]
FeedForwardKind = Literal["dense", "moe", "none"]


class Mixer(Contract):
    """The part of a layer that mixes positions: attention, or the LSTM of the first sparsely-gated MoE."""

    kind: MixerKind = described("Multi-head, grouped-query, multi-query, latent attention, or LSTM.", example="gqa")
    heads: Whole | None = described("Query heads.", example=32, default=None)
    kv_heads: Whole | None = described("Key and value heads; default: `heads` (1 for mqa).", example=8, default=None)
    head_dim: Whole | None = described("Width of one head.", example=128, default=None)
    window: Whole | None = described(
        "Sliding window; null = full attention.", unit="tokens", example=4096, default=None
    )
    chunk: Whole | None = described(
        "Attention inside chunks of this many tokens.", unit="tokens", example=8192, default=None
    )
    qk_norm: Literal["none", "head", "full"] = described(
        "Normalisation of queries and keys: none, one weight per head width, or one per projected width.",
        example="head",
        default="none",
    )
    sinks: Flag = described("One learned attention sink per head.", example=True, default=False)
    query_rank: Whole | None = described("MLA: rank of the query compression; null = none.", example=1536, default=None)
    key_value_rank: Whole | None = described("MLA: rank of the joint key-value latent.", example=512, default=None)
    nope_head_dim: Whole | None = described("MLA: head width without position.", example=128, default=None)
    rope_head_dim: Whole | None = described("MLA: head width that carries the position.", example=64, default=None)
    value_head_dim: Whole | None = described("MLA: head width of the values.", example=128, default=None)

    @model_validator(mode="after")
    def _complete(self) -> Mixer:
        needed: tuple[str, ...] = ()
        if self.kind == "mla":
            needed = ("heads", "key_value_rank", "nope_head_dim", "rope_head_dim", "value_head_dim")
        elif self.kind != "lstm":
            needed = ("heads", "head_dim")
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a {self.kind} mixer needs {', '.join(missing)}")
        if self.heads and self.heads % self.key_value_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.key_value_heads}")
        return self

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        if self.kv_heads is not None:
            return self.kv_heads
        return 1 if self.kind == "mqa" else (self.heads or 1)

    @property
    def qk_dim(self) -> int:
        """Width of one head in the score product."""
        if self.kind == "mla":
            return (self.nope_head_dim or 0) + (self.rope_head_dim or 0)
        return self.head_dim or 0

    @property
    def value_dim(self) -> int:
        """Width of one head in the value product."""
        return (self.value_head_dim if self.kind == "mla" else self.head_dim) or 0


class FeedForward(Contract):
    """The dense feed-forward part: two matrices, or three when gated."""

    size: Whole | Literal["match_active"] = described(
        "Inner width; match_active = top_k x expert + shared experts: a dense layer then costs what a MoE layer costs.",
        example=18432,
    )
    activation: Literal["relu", "gelu", "silu"] = described("Non-linearity.", example="silu", default="silu")
    gated: Flag = described("Three matrices (GLU) instead of two.", example=True, default=True)


class Router(Contract):
    """How a token chooses its experts."""

    kind: Literal["softmax", "noisy_top_k", "switch", "sigmoid", "expert_choice", "hash"] = described(
        "Family of the router: softmax top-k, noisy top-k (1701.06538), Switch top-1 (2101.03961), sigmoid affinities "
        "(DeepSeek-V3), expert choice (2202.09368), or hash by token id.",
        example="softmax",
        default="softmax",
    )
    weights: Literal["before_top_k", "after_top_k", "renormalized"] = described(
        "Gate values: softmax over all experts, over the selected ones (Mixtral), or over all and renormalised.",
        example="after_top_k",
        default="before_top_k",
    )
    groups: Whole = described("Expert groups (devices in V2, nodes in V3) for limited routing.", example=8, default=1)
    group_limit: Whole | None = described("Groups that one token may use; null = all.", example=4, default=None)
    group_score: Literal["max", "top2_sum"] = described(
        "Score of a group: its best expert (V2) or the sum of its best two (V3).", example="top2_sum", default="max"
    )
    selection_bias: Flag = described("Per-expert bias used for the selection only (V3).", example=True, default=False)
    scaling: Positive = described("Factor on the routed output.", example=2.5, default=1.0)
    second_choice: Literal["always", "random"] = described(
        "Second expert of a top-2 router: always used, or at random in proportion to its weight (GShard, ST-MoE).",
        example="random",
        default="always",
    )
    branching: Whole | None = described(
        "Two-level (hierarchical) gating: number of first-level groups; null = flat.", example=16, default=None
    )


class MixtureOfExperts(Contract):
    """The expert part of the MoE layers and where those layers are."""

    experts: Whole = described("Routed experts in a layer.", example=256)
    top_k: Whole = described("Routed experts that one token uses.", example=8)
    expert_ffn_size: Whole = described("Inner width of one routed expert.", example=2048)
    activation: Literal["relu", "gelu", "silu"] = described(
        "Non-linearity of the experts.", example="silu", default="silu"
    )
    gated: Flag = described("Three matrices per expert instead of two.", example=True, default=True)
    shared_experts: WholeOrZero = described("Experts that every token passes.", example=1, default=0)
    shared_expert_ffn_size: Whole | None = described(
        "Inner width of one shared expert; default: `expert_ffn_size`.", example=20480, default=None
    )
    shared_expert_gate: Flag = described("A sigmoid gate on the shared experts (Qwen2).", example=True, default=False)
    stride: Whole = described("Every stride-th layer is a MoE layer.", example=2, default=1)
    first_dense_layers: WholeOrZero = described("Leading layers that stay dense.", example=3, default=0)
    dense_residual: Flag = described(
        "A dense feed-forward beside the experts in every MoE layer (ST-MoE, OpenMoE).", example=True, default=False
    )
    router: Router = described("How tokens choose experts.", example={"kind": "softmax"}, default=Router)
    capacity_factor: Positive | None = described(
        "Capacity factor that the model was trained with; null = dropless.", example=1.25, default=None
    )
    capacity_factor_evaluation: Positive | None = described("Capacity factor at evaluation.", example=2.0, default=None)
    capacity_group_tokens: Whole | None = described(
        "Tokens that shared one capacity in the original training.", unit="tokens", example=8192, default=None
    )
    capacity_over: Literal["expert", "device"] = described(
        "What a capacity limited in the original training: each expert, or the sum over the experts of a device (one "
        "of `router.groups`; DeepSeek-V2).",
        example="device",
        default="expert",
    )

    @property
    def shared_ffn_size(self) -> int:
        """Total inner width of the shared experts."""
        return self.shared_experts * (self.shared_expert_ffn_size or self.expert_ffn_size)


class LayerPattern(Contract):
    """One layer of `pattern`."""

    ffn: FeedForwardKind | None = described(
        "Feed-forward part of this layer; default: from stride and first_dense_layers.", example="moe", default=None
    )
    window: Whole | None = described("Sliding window of this layer.", unit="tokens", example=128, default=None)
    chunk: Whole | None = described("Attention chunk of this layer.", unit="tokens", example=8192, default=None)
    mixer: Mixer | None = described(
        "Mixer of this layer; default: the model's.", example={"kind": "lstm"}, default=None
    )


class Encoder(Contract):
    """The encoder of an encoder-decoder model (T5 family). Decoder layers then also have cross-attention."""

    layers: Depth = described("Encoder layers.", example=12)


class Published(Contract):
    """What the authors print, to be held against the sums over the op list."""

    total: Count | None = described("Published total parameters.", example="671B", default=None)
    active: Count | None = described("Published active parameters.", example="37B", default=None)
    total_convention: Literal["all", "non_embedding"] = described(
        "What the published total counts: every weight, or without embedding and head.", example="all", default="all"
    )
    active_convention: Literal["active", "active_excl_input_embedding", "non_embedding", "not_an_active_count"] = (
        described(
            "Which of our active counts is the closest reading of the published one.",
            example="active_excl_input_embedding",
            default="active",
        )
    )
    source: str = described("Where it is printed.", example="arXiv:2412.19437, Table 1")
    note: str | None = described("A trap or a correction.", example="Table 9 prints 64 experts", default=None)


class LayerKind(Contract):
    """One layer of the expanded stack, as the other rooms see it."""

    index: int = described("Position in its stack, from 0.", example=3)
    stack: Literal["encoder", "decoder"] = described("Which stack the layer belongs to.", example="decoder")
    mixer: Mixer = described("Mixer with this layer's window or chunk.", example={"kind": "lstm"})
    ffn: FeedForwardKind = described("Feed-forward part.", example="moe")


class Model(Contract):
    """Architecture of one language model."""

    name: str = described("Name as its authors write it.", example="DeepSeek-V3")
    layers: Depth = described("Decoder layers (all layers of a decoder-only model).", example=61)
    hidden_size: Whole = described("Model width.", example=7168)
    vocabulary_size: Whole = described("Rows of the embedding table.", example=129280)
    tied_embeddings: Flag = described("Input and output embedding share one table.", example=False, default=False)
    norm: Literal["rmsnorm", "layernorm", "layernorm_bias", "none"] = described(
        "Normalisation; layernorm_bias also has a bias.", example="rmsnorm", default="rmsnorm"
    )
    norms_per_layer: Annotated[int, Field(ge=2, le=8, strict=True)] = described(
        "Norms in a layer with attention and FFN (Grok-1 has 4).", example=2, default=2
    )
    biases: tuple[Literal["qkv", "attention_output", "ffn", "router"], ...] = described(
        "Linears that have a bias; ffn covers dense and expert matrices.", example=["qkv"], default=()
    )
    position: Literal["rope", "alibi", "relative", "learned", "none"] = described(
        "Position encoding.", example="rope", default="rope"
    )
    position_buckets: WholeOrZero = described("Buckets of a relative position bias (T5).", example=32, default=0)
    context: Whole = described("Longest context the model supports.", unit="tokens", example=4096)
    dropout: Flag = described("Dropout masks are stored for the backward pass.", example=False, default=False)
    mixer: Mixer = described(
        "Mixer of every layer unless `pattern` says otherwise.",
        example={"kind": "gqa", "heads": 32, "kv_heads": 8, "head_dim": 128},
    )
    ffn: FeedForward | None = described(
        "Dense feed-forward part; null when no layer has one.", example={"size": 18432}, default=None
    )
    moe: MixtureOfExperts | None = described(
        "Expert part; null = a dense model.", example={"experts": 8, "top_k": 2, "expert_ffn_size": 14336}, default=None
    )
    pattern: tuple[LayerPattern, ...] | None = described(
        "Layers, repeated over the depth; default: from stride and first_dense_layers.",
        example=[{"ffn": "moe"}],
        default=None,
    )
    mtp_depth: WholeOrZero = described("Multi-token-prediction modules (DeepSeek-V3).", example=1, default=0)
    encoder: Encoder | None = described("Encoder of a T5-type model.", example={"layers": 12}, default=None)
    published: Published | None = described(
        "Published counts.", example={"total": "671B", "source": "arXiv:2412.19437, abstract"}, default=None
    )
    sources: tuple[str, ...] = described(
        "Where the architecture is documented.", example=["arXiv:2412.19437"], default=()
    )
    notes: str | None = described("Traps and corrections.", example="no sliding window", default=None)

    def decoder_layers(self) -> tuple[LayerKind, ...]:
        """Expand the pattern over the decoder's depth."""
        return self._expand("decoder", self.layers)

    def encoder_layers(self) -> tuple[LayerKind, ...]:
        """Expand the pattern over the encoder's depth; empty for decoder-only models."""
        return self._expand("encoder", self.encoder.layers) if self.encoder else ()

    def _expand(self, stack: Literal["encoder", "decoder"], depth: int) -> tuple[LayerKind, ...]:
        return tuple(self._layer(stack, index) for index in range(depth))

    def _layer(self, stack: Literal["encoder", "decoder"], index: int) -> LayerKind:
        item = self.pattern[index % len(self.pattern)] if self.pattern else LayerPattern()
        mixer = item.mixer or self.mixer
        limits = {name: getattr(item, name) for name in ("window", "chunk") if getattr(item, name) is not None}
        mixer = mixer.model_copy(update=limits) if limits else mixer
        return LayerKind(index=index, stack=stack, mixer=mixer, ffn=item.ffn or self._ffn_by_stride(index))

    def _ffn_by_stride(self, index: int) -> FeedForwardKind:
        if self.moe is None:
            return "dense"
        after = index - self.moe.first_dense_layers
        return "moe" if after >= 0 and (after + 1) % self.moe.stride == 0 else "dense"

    def dense_ffn_size(self) -> int:
        """Inner width of the dense feed-forward parts, with `match_active` resolved."""
        if self.ffn is None:
            return 0
        if self.ffn.size != "match_active":
            return self.ffn.size
        assert self.moe is not None  # a law of the scenario
        return self.moe.top_k * self.moe.expert_ffn_size + self.moe.shared_ffn_size


__all__ = [
    "Encoder", "FeedForward", "FeedForwardKind", "LayerKind", "LayerPattern", "Mixer", "MixerKind", "MixtureOfExperts",
    "Model", "NonNegative", "Published", "Router",
]  # fmt: skip
