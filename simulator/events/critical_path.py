"""What sets the step: the chain of ops without slack, and how late every other op could have started.

Both take the durations as they were played, shared links included: an answer to "what if this op were shorter" holds
as long as the sharing stays as it is. At a barrier the lanes of a group meet, and the chain goes on in the lane that
came last; so there is no waiting on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.events.timeline import WAITING, FloatArray, IntArray, Timeline
from simulator.program import COMPUTE, EXPOSED, Program
from simulator.workload import Ledger

NO_SLACK = 1e-9
"""Seconds below which an op counts as critical."""


@dataclass(frozen=True)
class CriticalPath:
    """Ops from the start to the end of the step, each begun by the end of the one before; with their lanes.

    ``terms`` and ``by_rank`` both sum to the step.
    """

    ops: IntArray
    lanes: IntArray
    terms: Ledger
    by_rank: FloatArray


def critical_path(timeline: Timeline) -> CriticalPath:
    """Walk back from the last end along the need that ended last.

    Of needs that ended together the one on the same rank is followed, compute first.
    """
    program, start, end = timeline.program, timeline.start, timeline.end
    op, lane = (int(index) for index in np.unravel_index(int(end.argmax()), end.shape))
    ops, lanes, waits = [], [], []
    while True:
        ops.append(op)
        lanes.append(lane)
        needs = program.needs[program.start[op] : program.start[op + 1]]
        if len(needs) == 0:
            waits.append(float(start[op, lane]))
            break
        ends = end[needs] if program.barrier[op] else end[needs, lane][:, None]
        latest = float(ends.max())
        waits.append(float(start[op, lane]) - latest)
        rows, columns = np.nonzero(ends >= latest - 1e-12)
        best = _preferred(program, op, needs[rows], columns == lane)
        op = int(needs[rows[best]])
        lane = int(columns[best]) if ends.shape[1] > 1 else lane
    return _priced(timeline, np.array(ops[::-1]), np.array(lanes[::-1]), np.array(waits[::-1]))


def slack(timeline: Timeline) -> FloatArray:
    """By how much every op could have started later without moving the end of the step [ops, lanes].

    The max-plus recursion backwards: an op must end before the latest start of all that wait for it.
    """
    program = timeline.program
    begin, followers = program.waiters
    count = len(program)
    # The last row stands for "nothing waits": then the op may end with the step.
    latest = np.full((count + 1, timeline.start.shape[1]), timeline.step_s)
    followers = np.append(followers, count)
    order = np.concatenate(program.levels)
    degree = np.diff(begin)[order]
    sizes = np.array([len(wave) for wave in program.levels])
    ends = np.cumsum(sizes)
    widths = np.maximum.reduceat(degree, ends - sizes).tolist()
    meets = program.barrier[order] & (timeline.start.shape[1] > 1)
    meeting = np.logical_or.reduceat(meets, ends - sizes).tolist()
    places = np.where(degree > 0, begin[:-1][order], len(followers) - 1)
    duration = (timeline.end - timeline.start)[order]
    for stop, size, width, some in zip(
        ends[::-1].tolist(), sizes[::-1].tolist(), widths[::-1], meeting[::-1], strict=True
    ):
        part = slice(stop - size, stop)
        ready = latest[followers[places[part]]]
        for further in range(1, width):
            ops = np.flatnonzero(degree[part] > further)
            ready[ops] = np.minimum(ready[ops], latest[followers[places[part][ops] + further]])
        ready -= duration[part]
        if some:
            here = meets[part]
            ready[here] = ready[here].min(axis=1, keepdims=True)
        latest[order[part]] = ready
    return np.asarray(latest[:count] - timeline.start)


def _preferred(program: Program, op: int, needs: IntArray, same_lane: np.ndarray) -> int:
    """Which of several needs that ended together is followed."""
    if len(needs) == 1:
        return 0
    same = (program.rank[needs] == program.rank[op]) * 4 + (program.stream[needs] == COMPUTE) * 2 + same_lane
    return int(same.argmax())


def _priced(timeline: Timeline, ops: IntArray, lanes: IntArray, waits: FloatArray) -> CriticalPath:
    """Seconds of the chain by family of kernels and stream of communication, and by pipeline rank."""
    program, prices = timeline.program, timeline.prices
    seconds = timeline.end[ops, lanes] - timeline.start[ops, lanes]
    stream = program.stream[ops]
    kernels = stream == COMPUTE
    families = seconds[kernels] @ prices.share[program.cls[ops[kernels]]]
    terms = [(name, float(value)) for name, value in zip(prices.families, families, strict=True)]
    terms += [(name, float(seconds[stream == which].sum())) for which, name in EXPOSED.items()]
    terms.append((WAITING, float(waits.sum())))
    by_rank = np.zeros(program.ranks)
    np.add.at(by_rank, program.rank[ops], seconds + waits)
    return CriticalPath(ops, lanes, Ledger([(name, value) for name, value in terms if abs(value) > 1e-12]), by_rank)


__all__ = ["NO_SLACK", "CriticalPath", "critical_path", "slack"]
