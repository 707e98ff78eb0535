"""From a model to its blocks: the op list of embedding, layers, output head and MTP modules.

Encoder-decoder models with relative bias as in T5 (arXiv 1910.10683); MTP modules as in DeepSeek-V3 (arXiv
2412.19437, section 2.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from simulator.spec.model import LayerKind, Model
from simulator.spec.scenario import Scenario
from simulator.spec.training import Training
from simulator.workload.feed_forward import dense_ffn_ops, expert_ops
from simulator.workload.mixers import cross_attention_ops, mixer_ops
from simulator.workload.norms import norm
from simulator.workload.ops import Block, Collective, Embedding, Gemm, MemoryOp, Op, Saved
from simulator.workload.slots import Mask, one_hot_mask

Masks = Mapping[str, Mask | None]
_NO_MASKS: Masks = MappingProxyType({})


def blocks(scenario: Scenario) -> tuple[Block, ...]:
    """All blocks of the scenario's model in forward order: embedding, encoder, decoder, lm_head, mtp."""
    masks = {stack: one_hot_mask(scenario, stack) for stack in ("encoder", "decoder")}
    return model_blocks(scenario.model, scenario.training, masks)


def model_blocks(model: Model, training: Training, masks: Masks = _NO_MASKS) -> tuple[Block, ...]:
    """Blocks of a model at the training's sequence length; ``masks``: of a capacity group, by stack, if it has any."""
    layers = [*model.encoder_layers(), *model.decoder_layers()]
    result = [Block("embedding", "embedding", layers[0].stack, tuple(_embedding(model)))]
    for layer in layers:
        name = f"layer {layer.index}" if model.encoder is None else f"{layer.stack} layer {layer.index}"
        result.append(Block(name, "layer", layer.stack, tuple(_layer(model, training, layer, masks))))
    result.append(Block("lm_head", "lm_head", "decoder", tuple(_head(model, owns_weight=not model.tied_embeddings))))
    for depth in range(model.mtp_depth):
        result.append(Block(f"mtp {depth}", "mtp", "decoder", tuple(_mtp(model, training, masks))))
    return tuple(result)


def _embedding(model: Model) -> Iterator[Op]:
    yield Embedding("embedding", "embedding", table_rows=model.vocabulary_size, width=model.hidden_size)
    if model.position == "learned":
        yield Embedding("positions", "embedding", table_rows=model.context, width=model.hidden_size)
    yield Collective("embedding exit", "tensor", group="tensor", kind="exit", elements=model.hidden_size)


def _layer(model: Model, training: Training, layer: LayerKind, masks: Masks) -> Iterator[Op]:
    first = layer.index == 0
    yield from mixer_ops(model, training, layer)
    if first and model.position_buckets:
        yield MemoryOp("relative position bias", "attention", weights=model.position_buckets * (layer.mixer.heads or 1))
    if layer.stack == "decoder" and model.encoder is not None:
        yield from cross_attention_ops(model, training, layer.mixer)
    if layer.ffn == "dense":
        yield norm(model, "ffn norm")
        yield from dense_ffn_ops(model, "dense_ffn", model.dense_ffn_size(), "dense_ffn")
    elif layer.ffn == "moe":
        yield norm(model, "ffn norm") if model.norm != "none" else _kept_input(model)
        yield from expert_ops(model, masks.get(layer.stack))
    if layer.mixer.kind != "lstm":
        yield from (norm(model, f"extra norm {n}") for n in range(model.norms_per_layer - 2))


def _kept_input(model: Model) -> MemoryOp:
    return MemoryOp("expert input", "norm", (Saved("expert input", model.hidden_size, "residual", "sequence"),))


def _head(model: Model, *, owns_weight: bool) -> Iterator[Op]:
    width, vocabulary = model.hidden_size, model.vocabulary_size
    if model.encoder is not None:
        yield norm(model, "encoder final norm")
    yield norm(model, "final norm")
    kept = Saved("lm_head input", width, "lm_head", "sequence", dropped_by=frozenset({"norm"}))
    logits = Saved("logits", vocabulary, "logits", "tensor")
    yield Collective("lm_head enter", "tensor", group="tensor", kind="enter", elements=width)
    yield Gemm(
        "lm_head",
        "lm_head",
        (kept,),
        n=vocabulary,
        k=width,
        role="lm_head",
        split="column",
        stored_columns=None if owns_weight else 0,
    )
    yield MemoryOp("softmax and loss", "lm_head", (logits,), elements=3.0 * vocabulary, shard="tensor", role="lm_head")


def _mtp(model: Model, training: Training, masks: Masks) -> Iterator[Op]:
    """One MTP module: two norms, a projection of the pair, one layer, and the shared head (DeepSeek-V3, 2.2)."""
    width, last = model.hidden_size, model.decoder_layers()[-1]
    yield norm(model, "mtp hidden norm")
    yield norm(model, "mtp embedding norm")
    kept = Saved("mtp projection input", 2 * width, "saved_activations", "sequence", dropped_by=frozenset({"norm"}))
    yield Gemm("mtp projection", "mtp", (kept,), n=width, k=2 * width)
    yield from _layer(model, training, last, masks)
    yield from _head(model, owns_weight=False)
