"""Interleaved 1F1B: v model chunks per rank, so that the pipeline fills in chunk steps and the bubble shrinks v-fold.

Rank r holds stages r, P+r, 2P+r, ... (a loop). Microbatches move in rounds of P: the P microbatches of a round run
through chunk 0, the same P through chunk 1, and so on; the backward walks the chunks in reverse. The bubble is
(P-1)(F+B) in chunk times. The price is memory (1 + (P-1)/(vP) of 1F1B's on rank 0) and v times as many messages.

Sources: Narayanan et al. (arXiv 2104.04473), section 2.2.2; ``ScheduleInterleaved1F1B`` of PyTorch; Megatron-LM, which
has the same domain (M a multiple of P).
"""

from __future__ import annotations

from simulator.schedules.actions import Action, Schedule
from simulator.schedules.writing import alternating, rank_by_rank, require, require_sizes


def interleaved(ranks: int, microbatches: int, virtual_stages: int) -> Schedule:
    """Return the interleaved 1F1B schedule of P ranks, M microbatches and v chunks per rank (M a multiple of P).

    Counted in chunk passes, rank r does w forwards, then vM-w times (F, B), then w backwards, with
    w = min(vM, 2(P-1-r) + (v-1)P). Peak chunk activations: min(vM, w+1).

    With v = 1 the order of 1F1B comes out with a doubled warm-up, as in PyTorch.

    Raises:
        InvalidInput: M is not a multiple of P, or a size is smaller than 1.

    >>> str(interleaved(2, 2, 2).steps[1][-1]), " ".join(map(str, interleaved(2, 2, 2).steps[1]))
    ('1B1', '1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1')
    """
    require_sizes("interleaved", ranks, microbatches)
    require(virtual_stages >= 1, f"interleaved needs at least 1 chunk per rank; got virtual_stages {virtual_stages}")
    require(
        microbatches % ranks == 0,
        "interleaved needs a number of microbatches that is a multiple of the pipeline ranks; "
        f"got {microbatches} microbatches on {ranks} ranks",
    )
    return rank_by_rank(
        "interleaved",
        microbatches,
        [tuple(range(rank, ranks * virtual_stages, ranks)) for rank in range(ranks)],
        lambda rank: _steps(rank, ranks, microbatches, virtual_stages),
    )


def _steps(rank: int, ranks: int, microbatches: int, chunks: int) -> list[Action]:
    # Chunk passes in the order of execution: (chunk, microbatch), a round of P microbatches at a time.
    passes = [
        (chunk, first + offset)
        for first in range(0, microbatches, ranks)
        for chunk in range(chunks)
        for offset in range(ranks)
    ]
    forward = [Action(chunk * ranks + rank, "F", microbatch) for chunk, microbatch in passes]
    backward = [Action((chunks - 1 - chunk) * ranks + rank, "B", microbatch) for chunk, microbatch in passes]
    lead = min(len(passes), 2 * (ranks - 1 - rank) + (chunks - 1) * ranks)
    return alternating(forward, backward, lead)
