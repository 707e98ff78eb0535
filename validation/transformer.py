"""A small Mixture-of-Experts transformer in PyTorch, built from the same model contract that the simulator estimates.

Pre-norm decoder: x + attention(norm x), then x + ffn(norm x), where every ``stride``-th layer after the first dense
ones has a MoE layer and the others a dense feed-forward part (:meth:`simulator.spec.model.Model.decoder_layers`). With
``ffn.size: match_active`` a dense layer costs what a MoE layer costs, so that strides and capacity factors can be
compared in the time of a real training step: forward, loss, backward, Adam.

Attention is multi-head, grouped-query or multi-query, full and causal (Llama 2, arXiv 2307.09288), with rotary (arXiv
2104.09864), learned or no positions. What this transformer does not have, it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from simulator.errors import NotSimulated
from simulator.spec.model import LayerKind, Model
from simulator.spec.routing import Routing
from validation.expert_ffn import FeedForward, Form
from validation.moe_layer import LayerShape, MoELayer, Output

ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Causal self-attention [batch, sequence, h] -> the same, with fewer key and value heads if the model has them."""

    def __init__(self, model: Model, **factory: Any) -> None:
        super().__init__()
        mixer, width = model.mixer, model.hidden_size
        self.heads, self.kv_heads, self.head_dim = mixer.heads or 1, mixer.key_value_heads, mixer.head_dim or 1
        self.rotary = model.position == "rope"
        outputs = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(width, outputs, bias="qkv" in model.biases, **factory)
        self.output = nn.Linear(self.heads * self.head_dim, width, bias="attention_output" in model.biases, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled dot-product attention, softmax(q k^T / head_dim^1/2) v, over the past of each position."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [batch, heads, sequence, head_dim]
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.rotary:
            query, key = rotated(query), rotated(key)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


def rotated(heads: Tensor) -> Tensor:
    """Rotary positions: the pair (i, i + d/2) of a head [..., sequence, d] turns by position x base^(-2i/d)."""
    length, width = heads.shape[-2:]
    rates = ROTARY_BASE ** (-torch.arange(0, width, 2, device=heads.device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=heads.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """One layer: norm, attention, norm, and a dense or MoE feed-forward part, each with its residual."""

    def __init__(self, model: Model, layer: LayerKind, shape: LayerShape | None, **factory: Any) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = norm(model, **factory), norm(model, **factory)
        self.attention = Attention(model, **factory)
        dense = layer.ffn == "dense" or (model.moe is not None and model.moe.dense_residual)
        self.ffn: FeedForward | None = None
        if dense:
            assert model.ffn is not None  # a law of the model
            self.ffn = FeedForward(
                model.hidden_size, model.dense_ffn_size(), model.ffn.activation, gated=model.ffn.gated, **factory
            )
        self.moe = MoELayer(shape, **factory) if layer.ffn == "moe" and shape is not None else None

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Output | None]:
        """[batch, sequence, h] -> the same, and what the MoE layer says."""
        x = x + self.attention(self.attention_norm(x))
        normed = self.ffn_norm(x)
        output = None if self.moe is None else self.moe(normed, token_ids=ids)
        x = x if output is None else x + output.y  # a token that no expert accepted passes
        return (x if self.ffn is None else x + self.ffn(normed)), output


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head, with Adam; ``outputs`` keeps what the MoE layers said last.

    ``routing`` gives capacity and balancing as the scenario states them; of it, one device has what one expert group
    has. ``form`` is that of the experts where the scenario does not pad.

    Raises:
        NotSimulated: the model has something that this transformer has not.
    """

    def __init__(
        self,
        model: Model,
        routing: Routing | None = None,
        *,
        form: Form = "loop",
        fp8: bool = False,
        learning_rate: float = 3e-4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        refuse(model, routing or Routing())
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        width, vocabulary = model.hidden_size, model.vocabulary_size
        shape = layer_shape(model, routing or Routing(), form, fp8=fp8)
        self.embedding = nn.Embedding(vocabulary, width, **factory)
        self.positions = nn.Embedding(model.context, width, **factory) if model.position == "learned" else None
        self.blocks = nn.ModuleList(Block(model, layer, shape, **factory) for layer in model.decoder_layers())
        self.norm = norm(model, **factory)
        self.head = nn.Linear(width, vocabulary, bias=False, **factory)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if model.tied_embeddings:
            self.head.weight = self.embedding.weight
        self.outputs: list[Output] = []
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=(0.9, 0.95), fused=True)

    def moe_layers(self) -> Iterator[MoELayer]:
        """The MoE layers, first to last."""
        return (block.moe for block in self.blocks if block.moe is not None)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token [batch, sequence, vocabulary] from ids [batch, sequence]."""
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions.weight[: ids.shape[1]]
        self.outputs = []
        for block in self.blocks:
            x, output = block(x, ids)
            self.outputs += [] if output is None else [output]
        return self.head(self.norm(x))

    def loss(self, batch: Tensor) -> Tensor:
        """Cross-entropy of the next token, of ``batch`` [batch, sequence + 1], without the balancing losses."""
        logits = self(batch[:, :-1]).flatten(0, 1)
        return functional.cross_entropy(logits.float(), batch[:, 1:].flatten())

    def balancing_loss(self) -> Tensor | float:
        """Sum of the balancing losses of the last forward pass over all layers."""
        return sum(loss for output in self.outputs for loss in output.losses.values())

    def train_step(self, batch: Tensor) -> Tensor:
        """One step of Adam on ``batch`` [batch, sequence + 1]: forward, backward, update, bias; the cross-entropy."""
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        (loss + self.balancing_loss()).backward()
        self.optimizer.step()
        for layer, output in zip(self.moe_layers(), self.outputs, strict=True):
            layer.update_bias(output.plan.assigned)
        return loss.detach()


def norm(model: Model, **factory: Any) -> nn.Module:
    """The model's norm over the width."""
    if model.norm == "rmsnorm":
        return nn.RMSNorm(model.hidden_size, eps=1e-6, **factory)
    return nn.LayerNorm(model.hidden_size, bias=model.norm == "layernorm_bias", **factory)


def layer_shape(model: Model, routing: Routing, form: Form = "loop", *, fp8: bool = False) -> LayerShape | None:
    """The MoE layer of a scenario's model under its routing; None for a dense model."""
    if model.moe is None:
        return None
    factor, group = routing.capacity_factor, routing.capacity_group_tokens
    shape = LayerShape(
        model.hidden_size,
        model.moe,
        capacity_factor=model.moe.capacity_factor if factor == "model" else factor,
        capacity_counts_top_k=routing.capacity_counts_top_k,
        capacity_group_tokens=model.moe.capacity_group_tokens
        if group == "model"
        else group
        if group != "auto"
        else None,
        drop_order=routing.drop_order,
        form=form,
        fp8=fp8,
        remedies=routing.balance,
        devices=model.moe.router.groups,
        vocabulary_size=model.vocabulary_size,
    )
    return replace(shape, form="padded") if routing.pad_to_capacity else shape


def refuse(model: Model, routing: Routing) -> None:
    """Raise NotSimulated for what a model or its routing has and this transformer has not."""
    mixers = [layer.mixer for layer in model.decoder_layers()]
    missing = {
        "encoder": model.encoder is not None,
        "mtp_depth": model.mtp_depth > 0,
        "dropout": model.dropout,
        f"norm: {model.norm}": model.norm == "none",
        "norms_per_layer other than 2": model.norms_per_layer != 2,
        f"position: {model.position}": model.position not in ("rope", "learned", "none"),
        "biases: ffn, router": not {"ffn", "router"}.isdisjoint(model.biases),
        "mixers that differ between layers, windows and chunks": any(mixer != model.mixer for mixer in mixers),
        f"mixer.kind: {model.mixer.kind}": model.mixer.kind not in ("mha", "gqa", "mqa"),
        "mixer.window, mixer.chunk": bool(model.mixer.window or model.mixer.chunk),
        "rotary positions on an odd head_dim": model.position == "rope" and (model.mixer.head_dim or 0) % 2 == 1,
        "mixer.qk_norm, mixer.sinks": model.mixer.qk_norm != "none" or model.mixer.sinks,
        "layers without a feed-forward part": any(layer.ffn == "none" for layer in model.decoder_layers()),
        "routing.overflow: reroute": routing.overflow == "reroute",
        "routing.exempt_sequence_fraction": routing.exempt_sequence_fraction > 0,
    }
    if found := [name for name, present in missing.items() if present]:
        raise NotSimulated(f"the reference transformer does not have {'; '.join(found)}")


__all__ = ["Attention", "Block", "Transformer", "layer_shape", "norm", "refuse", "rotated"]
