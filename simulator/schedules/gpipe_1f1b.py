"""The two classic synchronous schedules: GPipe, and 1F1B (PipeDream-Flush).

Both have one stage per rank and the same bubble, (P-1)(F+B). They differ in memory: GPipe runs every forward before the
first backward and holds M activations; 1F1B starts the backward of a microbatch as soon as it can and holds P-r on
rank r.

Sources: Huang et al., GPipe (arXiv 1811.06965); Narayanan et al., Efficient Large-Scale Language Model Training on GPU
Clusters (arXiv 2104.04473), section 2.2; ``ScheduleGPipe`` and ``Schedule1F1B`` of PyTorch.
"""

from __future__ import annotations

from simulator.schedules.actions import Action, Schedule
from simulator.schedules.writing import alternating, rank_by_rank, require_sizes


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """Return the GPipe schedule: F0 .. F(M-1), then B0 .. B(M-1), on every rank.

    Peak activations: M on every rank.

    Raises:
        InvalidInput: fewer than 1 rank or 1 microbatch.

    >>> [" ".join(map(str, steps)) for steps in gpipe(2, 2).steps]
    ['0F0 0F1 0B0 0B1', '1F0 1F1 1B0 1B1']
    """
    require_sizes("gpipe", ranks, microbatches)
    return _one_stage_per_rank("gpipe", ranks, microbatches, warm_up=[microbatches] * ranks)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """Return the 1F1B schedule: w forwards, then M-w times (F, B), then w backwards, with w = min(P-1-r, M).

    Peak activations: min(P-r, M) on rank r.

    Raises:
        InvalidInput: fewer than 1 rank or 1 microbatch.

    >>> [" ".join(map(str, steps)) for steps in one_f_one_b(2, 2).steps]
    ['0F0 0F1 0B0 0B1', '1F0 1B0 1F1 1B1']
    """
    require_sizes("1f1b", ranks, microbatches)
    warm_up = [min(ranks - 1 - rank, microbatches) for rank in range(ranks)]
    return _one_stage_per_rank("1f1b", ranks, microbatches, warm_up)


def _one_stage_per_rank(name: str, ranks: int, microbatches: int, warm_up: list[int]) -> Schedule:
    """Warm up with forwards, alternate F and B, cool down with backwards; stage r on rank r."""

    def steps(stage: int) -> list[Action]:
        forward = [Action(stage, "F", microbatch) for microbatch in range(microbatches)]
        backward = [Action(stage, "B", microbatch) for microbatch in range(microbatches)]
        return alternating(forward, backward, warm_up[stage])

    return rank_by_rank(name, microbatches, [(rank,) for rank in range(ranks)], steps)
