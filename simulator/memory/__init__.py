"""Memory of one rank, term by term: what stays for the whole step, and what the schedule keeps in flight.

::

    states     weights, gradients and optimizer states under ZeRO    throughout
    saved      tensors kept for the backward pass                    x microbatches in flight
    moments    exchanged tokens, gradients, logits                   once, at the moment that needs most
    ranks      the three together                                    the worst rank at its worst moment
"""

from simulator.memory.ranks import Holding, MemoryUse, holding, peak, worst
from simulator.memory.saved import received_rows, saved_bytes
from simulator.memory.states import (
    Parameters,
    op_parameters,
    shard_ranks,
    stage_parameters,
    state_bytes,
    static_terms,
    table_copy,
)

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
