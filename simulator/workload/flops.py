"""FLOPs per token as sums over the op list: forward, backward, recomputed; causal and not.

Conventions. Training costs three forwards: the forward, the gradient of the inputs and the gradient of the weights.
*Model* FLOPs count the matrix products including the LM head, without embedding, router and MTP, and the attention
core, for every assignment that the router made, dropped or not. The causal count takes the lower triangle only, the
non-causal count the whole matrix; with them DeepSeek's published 385 and 432 TFLOP/s per GPU are reproduced (arXiv
2505.09343, Table 4). *Hardware* FLOPs are those really computed: with router, MTP, recomputation, padded slots,
products with one-hot masks, and without dropped assignments.

An encoder-decoder model counts encoder tokens; its decoder's FLOPs are spread over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.spec.scenario import Scenario
from simulator.workload.blocks import blocks
from simulator.workload.ledger import Ledger
from simulator.workload.ops import AttentionCore, Block, Gemm, GroupedGemm, OneHotProduct, Op
from simulator.workload.recompute import fully_repeated, repeated

BACKWARD_PASSES = 2.0
TRAINING_PASSES = 1.0 + BACKWARD_PASSES


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs per counted token by family: forward as the model defines it; forward, backward, repeated as computed."""

    forward: Ledger
    forward_noncausal: Ledger
    computed: Ledger
    backward: Ledger
    recomputed: Ledger

    @property
    def model_flop_per_token(self) -> float:
        """Training FLOPs per token, causal; LM head in, router and MTP out."""
        return TRAINING_PASSES * _model(self.forward)

    @property
    def model_flop_per_token_noncausal(self) -> float:
        """The same with the whole attention matrix."""
        return TRAINING_PASSES * _model(self.forward_noncausal)

    @property
    def hardware_flop_per_token(self) -> float:
        """What is really computed (causal): both passes, with expert rows after drops and padding; recomputation."""
        return self.computed.total + self.backward.total + self.recomputed.total


def op_flop_per_token(op: Op, *, causal: bool = True) -> float:
    """Forward FLOPs of one op for one token of its block."""
    if isinstance(op, Gemm):
        return 2.0 * op.n * op.k * op.rows
    if isinstance(op, GroupedGemm):
        return 2.0 * op.n * op.k * op.top_k
    if isinstance(op, AttentionCore):
        return op.flop_per_token(causal=causal)
    if isinstance(op, OneHotProduct):
        return 2.0 * op.slots * op.width
    return 0.0


def block_flop_per_token(block: Block, *, causal: bool = True) -> float:
    """Forward FLOPs of one block for one of its tokens."""
    return sum(op_flop_per_token(op, causal=causal) for op in block.ops)


def count(
    scenario: Scenario, stages: Sequence[Sequence[int]] | None = None, *, computed_rows: float = 1.0
) -> FlopCounts:
    """FLOPs per counted token of the scenario.

    ``stages``: the layer split, needed only to tell which layers ``{full_layers: n}`` repeats; without it the model is
    one stage. ``computed_rows``: expert rows that are computed over those that the router assigned (drops, padding).
    """
    training, listed = scenario.training, blocks(scenario)
    whole: set[int] = set()
    for stage in stages or [range(len(listed))]:
        whole |= fully_repeated(training, listed, stage)
    causal: list[tuple[str, float]] = []
    full: list[tuple[str, float]] = []
    real: list[tuple[str, float]] = []
    back: list[tuple[str, float]] = []
    again: list[tuple[str, float]] = []
    for index, block in enumerate(listed):
        share = training.length(block.stack) / training.tokens_per_sequence
        for op in block.ops:
            family = "mtp" if block.kind == "mtp" else op.family
            value = share * op_flop_per_token(op)
            if value == 0.0:
                continue
            causal.append((family, value))
            full.append((family, share * op_flop_per_token(op, causal=False)))
            value *= computed_rows if isinstance(op, GroupedGemm) else 1.0
            real.append((family, value))
            back.append((family, value * (op.backward_products if isinstance(op, OneHotProduct) else BACKWARD_PASSES)))
            if repeated(op, training, full=index in whole):
                again.append((family, value))
    return FlopCounts(Ledger(causal), Ledger(full), Ledger(real), Ledger(back), Ledger(again))


def _model(forward: Ledger) -> float:
    return sum(value for family, value in forward.items() if family not in ("router", "permute", "mtp"))
