"""Memory of one rank, term by term: what stays for the whole step, and what the schedule keeps in flight.

* Weights, gradients and optimizer states of the rank's stages, dense and expert parameters apart because they are
  replicated over different groups. ZeRO divides optimizer states (1), gradients (2) and weights (3) by the number of
  ranks that hold the same parameters (arXiv 1910.02054); a bidirectional pipeline holds two stages per rank.
* Saved tensors: the tensors that the op list keeps for the backward pass, without those that recomputation drops,
  times the microbatches in flight at the worst moment of the schedule. Expert rows are those that the busiest rank
  receives.
* What lives only for a moment, at the moment that needs most (:func:`_moments`), and the gradients of weights on their
  way into the accumulated ones. A stack decides how much of it it holds; what Megatron-LM with Transformer Engine holds
  is read from their sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.layout import Layout
from simulator.routing import ExpertLoad, tokens_per_rank
from simulator.schedules import Schedule, in_flight_by_stage
from simulator.spec.fields import ELEMENT_BYTES
from simulator.spec.scenario import Scenario
from simulator.workload.ledger import Ledger
from simulator.workload.ops import Block, Embedding, Gemm, GroupedGemm, Op, Saved, moe_ordinals
from simulator.workload.recompute import fully_repeated, kept
from simulator.workload.slots import one_hot_mask

_STATES = {"adamw": 2.0, "muon": 1.0, "sgd": 1.0, "adafactor": 0.0}
"""Full-size moments of each optimizer; Adafactor's row and column sums are small enough to leave out."""

_SIZES = {"mask": 1.0, "statistics": 4.0, "bytes": 1.0}

_TRANSFORMER_ENGINE = frozenset({"megatron-core", "megatron-bridge"})
"""Stacks of Megatron-Core with Transformer Engine. Their habits, from Megatron-LM @ 23e00ed and Transformer Engine 2.11:

* The fused cross entropy writes the gradient over the logits, in their format (``CrossEntropyFunction``).
* Weight gradients are added to the accumulated ones inside the product; what autograd gets instead is an empty tensor
  of the weight's shape and format, of which one for each shape is kept for ever (``get_dummy_wgrad``).
* A MoE layer holds the tokens before and after the dispatch until its end (``MoELayer.forward``).
"""


@dataclass(frozen=True)
class Parameters:
    """Parameters that one rank holds for one stage, before ZeRO."""

    dense: float
    expert: float


@dataclass(frozen=True)
class MemoryUse:
    """Memory of the worst rank."""

    rank: int
    terms: Ledger
    in_flight: float

    @property
    def peak_bytes(self) -> float:
        """Allocated bytes at the worst moment."""
        return self.terms.total


@dataclass(frozen=True)
class Holding:
    """What one rank holds: ``static`` and ``buffers`` throughout, ``saved`` of each microbatch in flight.

    ``saved``: by held stage; ``counts``: microbatches in flight while each step of the schedule runs [steps, stages].
    """

    rank: int
    static: Ledger
    buffers: Ledger
    saved: tuple[Ledger, ...]
    counts: npt.NDArray[np.int64]

    @property
    def worst(self) -> MemoryUse:
        """The worst moment of the schedule."""
        moment = (self.counts * [ledger.total for ledger in self.saved]).sum(axis=1).argmax()
        counts = self.counts[int(moment)]
        terms = self.static
        for count, ledger in zip(counts, self.saved, strict=True):
            terms += Ledger({f"saved_{name}": value * float(count) for name, value in ledger.items()})
        return MemoryUse(self.rank, terms + self.buffers, float(counts.sum()))


def stage_parameters(scenario: Scenario, layout: Layout, stage: Sequence[int]) -> Parameters:
    """Dense and expert parameters of a stage on one rank, after tensor, expert and expert-tensor parallelism."""
    held = [op_parameters(scenario, op) for index in stage for op in layout.blocks[index].ops]
    return Parameters(sum(each.dense for each in held), sum(each.expert for each in held))


def table_copy(scenario: Scenario, layout: Layout, stages: Sequence[Sequence[int]]) -> float:
    """Parameters of a copy of the embedding table on a rank that does not hold the table itself.

    A tied head needs one, and so does an MTP module.
    """
    kinds = {layout.blocks[index].kind for stage in stages for index in stage}
    needed = "mtp" in kinds or ("lm_head" in kinds and scenario.model.tied_embeddings)
    if not needed or "embedding" in kinds:
        return 0.0
    return scenario.model.vocabulary_size * scenario.model.hidden_size / scenario.parallelism.tensor


def op_parameters(scenario: Scenario, op: Op) -> Parameters:
    """Parameters of one op on one rank, after tensor, expert and expert-tensor parallelism; copies of experts count."""
    split, moe = scenario.parallelism, scenario.model.moe
    if isinstance(op, GroupedGemm):
        assert moe is not None  # only MoE layers have experts
        copies = 1.0 + scenario.routing.placement.redundant_experts / moe.experts
        return Parameters(0.0, op.parameters * copies / (split.expert * split.expert_tensor))
    shared_out = isinstance(op, Embedding) or (isinstance(op, Gemm) and op.split != "none")
    return Parameters(op.parameters / (split.tensor if shared_out else 1), 0.0)


def state_bytes(scenario: Scenario, group: str) -> Mapping[str, float]:
    """Bytes per parameter of weights, gradients and optimizer states ("dense" or "expert").

    BF16 weights with FP32 gradients, master and moments: 2 + 4 + 12 = 18 (Megatron-LM); with BF16 moments 14
    (DeepSeek-V3, section 3.3.3).
    """
    optimizer = scenario.training.optimizer
    special = optimizer.groups.get(group)  # type: ignore[call-overload]
    kind = (special and special.kind) or optimizer.kind
    moments = (special and special.moments) or optimizer.moments
    master = (special and special.master) or optimizer.master
    return {
        "weights": ELEMENT_BYTES[scenario.training.precision.weights],
        "gradients": ELEMENT_BYTES[optimizer.gradients],
        "optimizer": _STATES[kind] * ELEMENT_BYTES[moments] + (0.0 if master == "none" else ELEMENT_BYTES[master]),
    }


def shard_ranks(scenario: Scenario, layout: Layout, group: str) -> int:
    """Ranks over which ZeRO divides the states of a parameter group."""
    sharded = scenario.parallelism.fully_sharded
    if sharded is not None and scenario.parallelism.zero_stage == 3:
        if group == "dense":
            return sharded.ranks
        if sharded.experts is not None:
            return sharded.experts
    return layout.gradient_ranks if group == "dense" else layout.expert_gradient_ranks


def static_terms(scenario: Scenario, layout: Layout, stages: Sequence[Sequence[int]]) -> Ledger:
    """Weights, gradients and optimizer states of the stages that one rank holds, under ZeRO."""
    zero = scenario.parallelism.zero_stage
    divides = {"optimizer": 1, "gradients": 2, "weights": 3}
    terms: list[tuple[str, float]] = []
    held = [stage_parameters(scenario, layout, stage) for stage in stages]
    dense = sum(each.dense for each in held) + table_copy(scenario, layout, stages)
    for group, count in (("dense", dense), ("expert", sum(each.expert for each in held))):
        ranks = shard_ranks(scenario, layout, group)
        for name, size in state_bytes(scenario, group).items():
            terms.append((f"{name}_{group}", count * size / (ranks if zero >= divides[name] else 1)))
    return Ledger([(name, value) for name, value in terms if value])


def saved_bytes(
    scenario: Scenario, layout: Layout, stage: Sequence[int], received: Mapping[int, float] | None = None
) -> Ledger:
    """Bytes that one microbatch of a stage keeps for the backward pass, by family.

    ``received``: expert rows of one microbatch on the rank, by block; default: the mean without drops and padding.
    """
    whole = fully_repeated(scenario.training, layout.blocks, stage)
    terms = [
        term
        for index in stage
        for term in _block_saved(
            scenario, layout.blocks[index], _rows(scenario, layout, index, received), index in whole
        )
    ]
    return Ledger([(name, value) for name, value in terms if value])


def peak(scenario: Scenario, layout: Layout, schedule: Schedule, load: ExpertLoad | None) -> MemoryUse:
    """Memory of the worst rank of the pipeline at its worst moment."""
    return worst(holding(scenario, layout, schedule, load))


def worst(holdings: Sequence[Holding]) -> MemoryUse:
    """The worst rank at its worst moment; of equal ranks the first."""
    return max((each.worst for each in holdings), key=lambda use: use.peak_bytes)


def holding(scenario: Scenario, layout: Layout, schedule: Schedule, load: ExpertLoad | None) -> tuple[Holding, ...]:
    """What every rank of the pipeline holds."""
    return tuple(_holding(scenario, layout, rank, schedule, load) for rank in range(schedule.ranks))


def received_rows(layout: Layout, load: ExpertLoad | None, stage: Sequence[int], held: int) -> Mapping[int, float]:
    """Expert rows by block of the busiest rank of a stage, mean of its ``held`` heaviest microbatches."""
    ordinals = moe_ordinals(layout.blocks)
    blocks = [index for index in stage if index in ordinals]
    if load is None or not blocks:
        return {}
    rows = load.rank_rows[:, [ordinals[index] for index in blocks]]  # [microbatches, blocks, ranks]
    together = np.sort(rows.sum(1), axis=0)[::-1][: max(1, held)]  # heaviest microbatches of each rank first
    busiest = int(together.mean(0).argmax())
    heaviest = np.argsort(rows[:, :, busiest].sum(1))[::-1][: max(1, held)]
    return dict(zip(blocks, rows[heaviest, :, busiest].mean(0).tolist(), strict=True))


def _holding(scenario: Scenario, layout: Layout, rank: int, schedule: Schedule, load: ExpertLoad | None) -> Holding:
    counts = in_flight_by_stage(schedule, rank)
    stages = [layout.stages[stage] for stage in schedule.placement[rank]]
    most = zip(stages, counts.max(axis=0).tolist(), strict=True)
    received = [received_rows(layout, load, stage, held) for stage, held in most]
    saved = [saved_bytes(scenario, layout, stage, rows) for stage, rows in zip(stages, received, strict=True)]
    buffers = _buffers(scenario, layout, stages, {k: v for rows in received for k, v in rows.items()})
    return Holding(rank, static_terms(scenario, layout, stages), buffers, tuple(saved), counts)


def _buffers(
    scenario: Scenario, layout: Layout, stages: Sequence[Sequence[int]], received: Mapping[int, float]
) -> Ledger:
    """What lives for a moment beside the saved tensors: the largest moment, and what belongs to none of them."""
    split, weights = scenario.parallelism, ELEMENT_BYTES[scenario.training.precision.weights]
    blocks = [layout.blocks[index] for stage in stages for index in stage]
    again = max((_recomputed(scenario, layout, stage, received) for stage in stages), default=0.0)
    moments = _moments(scenario, blocks, received, again)
    terms = max(moments, key=lambda moment: sum(moment.values()))
    if scenario.cluster.stack_name in _TRANSFORMER_ENGINE:
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

    * The end of a MoE layer's forward: its exchange.
    * The first ops of a layer's backward: gradients of its feed-forward part, and of one weight. Where layers are
      computed again, both come with what that brings back (``again``).
    * The backward of the head: logits, which have become their gradient, that of its input, and that of its weight.
    """
    weights = ELEMENT_BYTES[scenario.training.precision.weights]
    fused = scenario.cluster.stack_name in _TRANSFORMER_ENGINE  # keeps the gradients of weights throughout
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
    if mask is not None or scenario.cluster.stack_name not in _TRANSFORMER_ENGINE:
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
    return size * _tokens(scenario, block.stack) * (width + max(inner) / split.tensor) if inner else 0.0


def _head_gradients(scenario: Scenario) -> dict[str, float]:
    """Logits, or their gradient, and the gradient of the head's input; of all tokens, before they are scattered.

    With sequence parallelism the input itself is gathered too.
    """
    split, precision = scenario.parallelism, scenario.training.precision
    fused = scenario.cluster.stack_name in _TRANSFORMER_ENGINE
    logit = ELEMENT_BYTES[precision.lm_head] if fused else 4.0
    rows = _tokens(scenario, "decoder")
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


def _recomputed(scenario: Scenario, layout: Layout, stage: Sequence[int], received: Mapping[int, float]) -> float:
    """Largest set of tensors that the backward pass of one block brings back."""
    whole = fully_repeated(scenario.training, layout.blocks, stage)
    largest = 0.0
    for index in stage:
        block, rows = layout.blocks[index], _rows(scenario, layout, index, received)
        everything = sum(_tensor_bytes(scenario, block, tensor, rows) for op in block.ops for tensor in op.saves)
        stays = sum(value for _, value in _block_saved(scenario, block, rows, index in whole))
        largest = max(largest, everything - stays)
    return largest


def _rows(scenario: Scenario, layout: Layout, index: int, received: Mapping[int, float] | None) -> float:
    """Expert rows of one microbatch of a block on one rank."""
    moe, block = scenario.model.moe, layout.blocks[index]
    if moe is None or not block.is_moe:
        return 0.0
    if received and index in received:
        return received[index]
    return tokens_per_rank(scenario, block.stack) * moe.top_k * scenario.parallelism.expert_tensor


def _block_saved(scenario: Scenario, block: Block, rows: float, full: bool) -> list[tuple[str, float]]:
    """Bytes of the tensors of one block that stay, by family; of a block that is repeated in full only its input."""
    tensors = [(op.family, tensor) for op in block.ops for tensor in op.saves]
    if full:
        tensors = [(family, tensor) for family, tensor in tensors if tensor.role == "residual"][:1]
    else:
        tensors = [(family, tensor) for family, tensor in tensors if kept(tensor, scenario.training)]
    return [(family, _tensor_bytes(scenario, block, tensor, rows)) for family, tensor in tensors]


def _tensor_bytes(scenario: Scenario, block: Block, tensor: Saved, rows: float) -> float:
    split, precision = scenario.parallelism, scenario.training.precision
    if tensor.role == "logits":
        return 0.0  # one buffer, counted apart
    if tensor.cast and precision.saved_activations == precision.residual:
        return 0.0  # the product holds the very tensor that is kept anyway
    size = _SIZES[tensor.role] if tensor.role in _SIZES else ELEMENT_BYTES[str(getattr(precision, tensor.role))]
    if tensor.rows == "received":
        return tensor.elements * size * rows / (split.expert_tensor if tensor.shard == "tensor" else 1)
    sharded = tensor.shard == "tensor" or (tensor.shard == "sequence" and split.sequence_parallel)
    shards = split.tensor if sharded else 1
    return tensor.elements * size * _tokens(scenario, block.stack) / shards


def _tokens(scenario: Scenario, stack: str) -> float:
    return scenario.training.micro_batch_sequences * scenario.training.length(stack) / scenario.parallelism.context


__all__ = [
    "Holding",
    "MemoryUse",
    "Parameters",
    "holding",
    "op_parameters",
    "peak",
    "received_rows",
    "saved_bytes",
    "shard_ranks",
    "stage_parameters",
    "state_bytes",
    "static_terms",
    "table_copy",
    "worst",
]
