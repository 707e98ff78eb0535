"""What must be done: the op list of every block, and the sums over it."""

from simulator.workload.blocks import blocks, model_blocks
from simulator.workload.ledger import Ledger
from simulator.workload.ops import (
    AttentionCore,
    Block,
    Collective,
    Embedding,
    Gemm,
    GroupedGemm,
    MemoryOp,
    OneHotProduct,
    Op,
    Saved,
)

__all__ = [
    "AttentionCore",
    "Block",
    "Collective",
    "Embedding",
    "Gemm",
    "GroupedGemm",
    "Ledger",
    "MemoryOp",
    "OneHotProduct",
    "Op",
    "Saved",
    "blocks",
    "model_blocks",
]
