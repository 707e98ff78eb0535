"""The op list: what one token asks of every layer, written once.

Parameters, FLOPs, bytes, saved activations and time are all sums over this list. An op states global sizes and how it
may be split; it knows nothing of ranks. Rows are counted per token of the block's stack: ``rows = 1`` for ordinary
linears, the encoder-to-decoder ratio for cross-attention keys, ``top_k`` (received rows) for experts.

Precision enters as a *role* (gemm, router, lm_head, ...), resolved by :class:`~simulator.spec.training.Precision`.
Recomputation enters as the set of recompute items that repeat an op or drop a saved tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["none", "column", "row"]
Rows = Literal["tokens", "received"]
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Saved:
    """A tensor kept from the forward for the backward pass.

    ``elements`` per row; ``shard``: divided over tensor-parallel ranks always ("tensor"), only under sequence
    parallelism ("sequence"), or never ("none"). ``dropped_by``: recompute items that make keeping it needless.
    ``cast``: a product's own copy of a tensor that is kept anyway, held only where the product casts its input to
    another format than that of the residual stream.
    """

    name: str
    elements: float
    role: str
    shard: Literal["tensor", "sequence", "none"]
    rows: Rows = "tokens"
    dropped_by: frozenset[str] = NONE
    cast: bool = False


@dataclass(frozen=True)
class Op:
    """Base of all ops: a name, the family under which it is reported, and what it leaves behind."""

    name: str
    family: str
    saves: tuple[Saved, ...] = ()
    repeated_by: frozenset[str] = NONE

    @property
    def parameters(self) -> float:
        """Weights of this op over all ranks."""
        return 0.0

    @property
    def active_parameters(self) -> float:
        """Weights that one token uses."""
        return self.parameters


@dataclass(frozen=True)
class Gemm(Op):
    """Linear layer: [rows, k] x [k, n]. FLOPs per token 2 n k rows; parameters n k + bias.

    ``shares_input``: another linear has the same input, and casts it to the format of the product.
    """

    n: int = 0
    k: int = 0
    rows: float = 1.0
    role: str = "gemm"
    split: Split = "none"
    bias: bool = False
    stored_columns: int | None = (
        None  # columns held when they differ from the n that one token meets; 0 = shared weight
    )
    shares_input: bool = False

    @property
    def parameters(self) -> float:
        """Weights, n k and the bias."""
        columns = self.n if self.stored_columns is None else self.stored_columns
        return float(columns * (self.k + (1 if self.bias else 0)))


@dataclass(frozen=True)
class GroupedGemm(Op):
    """The same linear in every routed expert: FLOPs per token 2 n k top_k; parameters experts x n k.

    ``arrives``: what comes over the all-to-all in the dispatch format, its input or the gradient of its output.
    """

    n: int = 0
    k: int = 0
    experts: int = 1
    top_k: int = 1
    role: str = "gemm"
    split: Split = "none"
    bias: bool = False
    arrives: Literal["nothing", "input", "gradient"] = "nothing"

    @property
    def parameters(self) -> float:
        """Weights of all experts."""
        return float(self.experts * (self.n * self.k + (self.n if self.bias else 0)))

    @property
    def active_parameters(self) -> float:
        """Weights of the experts that one token uses."""
        return self.parameters * self.top_k / self.experts


@dataclass(frozen=True)
class AttentionCore(Op):
    """Scores, softmax and weighted sum. FLOPs per token 2 heads (qk_dim + value_dim) context.

    ``context`` is the mean number of keys that a query meets in the counted half (causal) or everywhere
    (bidirectional); ``context_full`` counts the whole matrix, the non-causal convention.
    """

    heads: int = 0
    kv_heads: int = 0
    qk_dim: int = 0
    value_dim: int = 0
    context: float = 0.0
    context_full: float = 0.0
    kind: Literal["mha", "mla"] = "mha"
    sink_parameters: int = 0

    @property
    def parameters(self) -> float:
        """Attention sinks, one per head where the model has them."""
        return float(self.sink_parameters)

    def flop_per_token(self, *, causal: bool = True) -> float:
        """Forward FLOPs of one query token."""
        return 2.0 * self.heads * (self.qk_dim + self.value_dim) * (self.context if causal else self.context_full)


@dataclass(frozen=True)
class MemoryOp(Op):
    """A memory-bound op: ``elements`` read and written per row, and its few parameters (norm weights)."""

    elements: float = 0.0
    rows: Rows = "tokens"
    kind: Literal["elementwise", "permute", "routing"] = "elementwise"
    shard: Literal["tensor", "sequence", "none"] = "sequence"
    weights: int = 0
    role: str = "residual"

    @property
    def parameters(self) -> float:
        """Norm weights or table rows."""
        return float(self.weights)


@dataclass(frozen=True)
class OneHotProduct(Op):
    """Tokens into the slots of their experts, or back, as a product with a mask: FLOPs per token 2 slots width.

    ``tokens`` and ``slots``: of one capacity group, slots over all experts (:mod:`.slots`). Backward, the dispatch has
    the gradient of its tokens alone: its mask is made of truth values. The combine has that of the slots and that of
    its mask, which carries the router's weights.
    """

    direction: Literal["dispatch", "combine"] = "dispatch"
    tokens: int = 1
    slots: int = 1
    width: int = 0
    role: str = "residual"

    @property
    def backward_products(self) -> int:
        """Products of the backward pass, each of the size of the forward's."""
        return 1 if self.direction == "dispatch" else 2


@dataclass(frozen=True)
class Embedding(Op):
    """Table look-up: no matrix product, ``rows x width`` parameters."""

    table_rows: int = 0
    width: int = 0

    @property
    def parameters(self) -> float:
        """The table."""
        return float(self.table_rows * self.width)


@dataclass(frozen=True)
class Collective(Op):
    """Communication inside a layer. Free when its group has one rank.

    kind ``dispatch`` and ``combine`` are the two all-to-alls of the experts; ``enter`` and ``exit`` bracket a
    tensor-parallel region (all-gather and reduce-scatter under sequence parallelism, else nothing and all-reduce);
    ``ring`` passes keys and values around a context-parallel group. ``repeated_by`` counts here too; the exit of a
    feed-forward part is never repeated, because nothing of its own layer needs it.
    """

    group: Literal["expert", "tensor", "context", "expert_tensor"] = "expert"
    kind: Literal["dispatch", "combine", "enter", "exit", "ring"] = "dispatch"
    elements: float = 0.0  # per row
    role: str = "residual"
    last: bool = False  # nothing of the same layer needs the result


@dataclass(frozen=True)
class Block:
    """A unit that a pipeline stage can hold: the embedding, one layer, the output head, or an MTP module."""

    name: str
    kind: Literal["embedding", "layer", "lm_head", "mtp"]
    stack: Literal["encoder", "decoder"]
    ops: tuple[Op, ...]

    @property
    def is_moe(self) -> bool:
        """Whether the block has routed experts."""
        return any(isinstance(op, GroupedGemm) for op in self.ops)


def moe_ordinals(blocks: Sequence[Block]) -> dict[int, int]:
    """Number of each MoE block among the MoE blocks: its row in the expert load."""
    found = [index for index, block in enumerate(blocks) if block.is_moe]
    return {index: ordinal for ordinal, index in enumerate(found)}
