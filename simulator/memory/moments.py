"""What lives only for a moment beside the saved tensors: exchanged tokens, gradients, logits, gathered weights.

Of the moments of a step (:func:`_moments`) the one that needs most counts. How much the software holds then is the
``memory`` of its stack: plain, or that of Megatron-Core with Transformer Engine (Megatron-LM @ 23e00ed, Transformer
Engine 2.11):

* The fused cross entropy writes the gradient over the logits, in their format (``CrossEntropyFunction``).
* Weight gradients are added to the accumulated ones inside the product; what autograd gets instead is an empty tensor
  of the weight's shape and format, of which one for each shape is kept for ever (``get_dummy_wgrad``).
* A MoE layer holds the tokens before and after the dispatch until its end (``MoELayer.forward``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simulator.layout import Layout
from simulator.memory.saved import recomputed, stack_tokens
from simulator.memory.states import stage_parameters
from simulator.routing import tokens_per_rank
from simulator.spec.fields import ELEMENT_BYTES
from simulator.spec.scenario import Scenario
from simulator.workload.ledger import Ledger
from simulator.workload.ops import Block, Gemm, GroupedGemm
from simulator.workload.slots import one_hot_mask


def moment_terms(
    scenario: Scenario, layout: Layout, stages: Sequence[Sequence[int]], received: Mapping[int, float]
) -> Ledger:
    """What lives for a moment beside the saved tensors: the largest moment, and what belongs to none of them."""
    split, weights = scenario.parallelism, ELEMENT_BYTES[scenario.training.precision.weights]
    blocks = [layout.blocks[index] for stage in stages for index in stage]
    again = max((recomputed(scenario, layout, stage, received) for stage in stages), default=0.0)
    moments = _moments(scenario, blocks, received, again)
    terms = max(moments, key=lambda moment: sum(moment.values()))
    if _transformer_engine(scenario):
        shapes = {shape for block in blocks for shape in _weight_shapes(scenario, block)}
        terms["weight_gradients"] = weights * sum(n * k for n, k in shapes)
    if split.zero_stage == 3:
        live = (split.fully_sharded.prefetch if split.fully_sharded else 1) + 1
        held = [stage_parameters(scenario, layout, [index]) for stage in stages for index in stage]
        largest = max((each.dense + each.expert for each in held), default=0.0)
        terms["gathered_weights"] = live * largest * weights
    return Ledger({name: value for name, value in terms.items() if value})


def _moments(
    scenario: Scenario, blocks: Sequence[Block], received: Mapping[int, float], again: float
) -> tuple[dict[str, float], ...]:
    """Candidates for the worst moment, each when the microbatch that runs has all its tensors saved.

    Those of the head, which come after the last layer's exchange, count as saved there too: 0.1 % in a short model.

    * The end of a MoE layer's forward: its exchange.
    * The first ops of a layer's backward: gradients of its feed-forward part, and of one weight. Where layers are
      computed again, both come with what that brings back (``again``).
    * The backward of the head: logits, which have become their gradient, that of its input, and that of its weight.
    """
    weights = ELEMENT_BYTES[scenario.training.precision.weights]
    fused = _transformer_engine(scenario)  # keeps the gradients of weights throughout
    heads = [block for block in blocks if block.kind in ("lm_head", "mtp")]
    layers = [block for block in blocks if block.kind in ("layer", "mtp")]

    def weight(of: Sequence[Block]) -> float:
        sizes = [n * k for block in of for n, k in _weight_shapes(scenario, block)]
        return 0.0 if fused else weights * max(sizes, default=0.0)

    return (
        {"exchange_buffers": _exchange(scenario, received), "recomputed_layer": again},
        {
            "activation_gradients": max((_dense_gradients(scenario, block) for block in layers), default=0.0),
            "weight_gradients": weight(layers),
            "recomputed_layer": again,
        },
        {**_head_gradients(scenario), "weight_gradients": weight(heads)} if heads else {},
    )


def _exchange(scenario: Scenario, received: Mapping[int, float]) -> float:
    """Tokens of the exchanges of the experts' all-to-alls, sent s and received r rows.

    One exchange or permutation holds what goes in and what comes out, s + r. Megatron-Core keeps more to the end of
    the layer: tokens sent (s), tokens as they arrived, before they are sorted by expert (r), outputs of the experts (r)
    and the same sorted for the way back (r), beside the output of the shared experts. With one expert on a rank nothing
    is sorted: tokens sent (s), outputs (r), and outputs come back (s).
    """
    moe, precision = scenario.model.moe, scenario.training.precision
    if moe is None or not received or scenario.parallelism.expert == 1:
        return 0.0
    width, mask = scenario.model.hidden_size, one_hot_mask(scenario, "decoder")
    dispatch, combine = ELEMENT_BYTES[precision.dispatch], ELEMENT_BYTES[precision.combine]
    tokens = tokens_per_rank(scenario)
    sent, rows = tokens * (moe.top_k if mask is None else mask.slots / mask.tokens), max(received.values())
    if mask is not None or not _transformer_engine(scenario):
        return width * (sent * dispatch + rows * combine)
    shared = tokens * ELEMENT_BYTES[precision.residual] if moe.shared_experts else 0.0
    if moe.experts == scenario.parallelism.expert:
        return width * (sent * dispatch + (rows + sent) * combine + shared)
    return width * ((sent + rows) * dispatch + 2 * rows * combine + shared)


def _dense_gradients(scenario: Scenario, block: Block) -> float:
    """Gradients beside the saved tensors when the backward pass of a dense feed-forward part begins.

    That of its output, and that of the input of its activation [rows, inner]; the gradient of the activation's output
    replaces that output, which the product before it has used up.
    """
    split, size = scenario.parallelism, ELEMENT_BYTES[scenario.training.precision.residual]
    inner = [tensor.elements for op in block.ops for tensor in op.saves if tensor.name == "dense_ffn pre-activation"]
    width = scenario.model.hidden_size / (split.tensor if split.sequence_parallel else 1)
    return size * stack_tokens(scenario, block.stack) * (width + max(inner) / split.tensor) if inner else 0.0


def _head_gradients(scenario: Scenario) -> dict[str, float]:
    """Logits, or their gradient, and the gradient of the head's input; of all tokens, before they are scattered.

    With sequence parallelism the input itself is gathered too.
    """
    split, precision = scenario.parallelism, scenario.training.precision
    fused = _transformer_engine(scenario)
    logit = ELEMENT_BYTES[precision.lm_head] if fused else 4.0
    rows = stack_tokens(scenario, "decoder")
    copies = 2 if split.sequence_parallel and split.tensor > 1 else 1
    return {
        "logits": logit * scenario.model.vocabulary_size * rows / split.tensor,
        "activation_gradients": copies * ELEMENT_BYTES[precision.residual] * scenario.model.hidden_size * rows,
    }


def _weight_shapes(scenario: Scenario, block: Block) -> set[tuple[float, float]]:
    """Shapes of the weights of a block's products on one rank; experts of one shape count once, routers not."""
    split = scenario.parallelism
    shapes = set()
    for op in block.ops:
        if isinstance(op, GroupedGemm) or (isinstance(op, Gemm) and op.role != "router"):
            shards = split.expert_tensor if isinstance(op, GroupedGemm) else split.tensor
            columns, rows = (shards if op.split == side else 1 for side in ("column", "row"))
            shapes.add((op.n / columns, op.k / rows))
    return shapes


def _transformer_engine(scenario: Scenario) -> bool:
    """Whether the stack holds what Megatron-Core with Transformer Engine holds."""
    cluster = scenario.cluster
    return cluster.profile.stacks[cluster.stack_name].memory == "transformer_engine"
