"""What a microbatch in flight keeps: the tensors that the op list saves for the backward pass.

Recomputation drops some of them, and of a block that is repeated in full all but its input; :func:`recomputed` is what
comes back when its backward pass begins. Expert rows are those that the busiest rank receives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from simulator.layout import Layout
from simulator.routing import ExpertLoad, tokens_per_rank
from simulator.spec.fields import ELEMENT_BYTES
from simulator.spec.scenario import Scenario
from simulator.workload.ledger import Ledger
from simulator.workload.ops import Block, Saved, moe_ordinals
from simulator.workload.recompute import fully_repeated, kept

_SIZES = {"mask": 1.0, "statistics": 4.0, "bytes": 1.0}


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


def recomputed(scenario: Scenario, layout: Layout, stage: Sequence[int], received: Mapping[int, float]) -> float:
    """Largest set of tensors that the backward pass of one block brings back."""
    whole = fully_repeated(scenario.training, layout.blocks, stage)
    largest = 0.0
    for index in stage:
        block, rows = layout.blocks[index], _rows(scenario, layout, index, received)
        everything = sum(_tensor_bytes(scenario, block, tensor, rows) for op in block.ops for tensor in op.saves)
        stays = sum(value for _, value in _block_saved(scenario, block, rows, index in whole))
        largest = max(largest, everything - stays)
    return largest


def stack_tokens(scenario: Scenario, stack: str) -> float:
    """Tokens of one microbatch in the encoder or decoder, after context parallelism."""
    return scenario.training.micro_batch_sequences * scenario.training.length(stack) / scenario.parallelism.context


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
    """Bytes of one saved tensor on one rank."""
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
    return tensor.elements * size * stack_tokens(scenario, block.stack) / shards
