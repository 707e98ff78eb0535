"""Forward and backward of neighbouring microbatches as one step, in schedules that have them one after the other.

Megatron-Core's batch-level overlap (``--overlap-moe-expert-parallel-comm``): where a backward is followed by a forward,
the two run together, and each computes while the other exchanges tokens. Without a pipeline ::

    F0 B0 F1 B1 F2 B2   becomes   F0 (F1;B0) (F2;B1) B2

One more microbatch is held: a rank is one forward further ahead than before. Under interleaved 1F1B a rank is ahead of
its successor by two chunk passes, so that pairs of neighbours run at the same time: Megatron-Core starts one forward
earlier for it too. Plain 1F1B over several ranks is
ahead by one only: the pair of a rank would then wait for the backward in its successor's pair, and that pair for the
forward in this rank's previous one. They would run in turn, so the layout refuses it.
"""

from __future__ import annotations

from dataclasses import replace

from simulator.schedules.actions import Overlapped, Schedule, Step


def pair_neighbours(schedule: Schedule) -> Schedule:
    """Let every full backward run with the forward that follows it on its rank.

    >>> from simulator.schedules import one_f_one_b
    >>> " ".join(map(str, pair_neighbours(one_f_one_b(1, 3)).steps[0]))
    '0F0 (0F1;0B0)OVERLAP_F_B (0F2;0B1)OVERLAP_F_B 0B2'
    """
    return replace(schedule, steps=tuple(_pair(steps) for steps in schedule.steps))


def _pair(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    result: list[Step] = []
    for step in steps:
        before = result[-1] if result else None
        follows = before is not None and not isinstance(before, Overlapped) and before.kind == "B"
        if follows and not isinstance(step, Overlapped) and step.kind == "F":
            assert not isinstance(before, Overlapped | None)
            result[-1] = Overlapped(step, before)
        else:
            result.append(step)
    return tuple(result)
