"""A played step by the actions of its schedule: when each ran, and what the time of every rank went into.

A step of the schedule (an action, or an overlapped pair) lasts on its rank from the start of its first kernel to the
end of its last one. Communication that nothing hides inside that stretch belongs to it, as in a profile of the real
thing: DeepSeek reports its step in these terms (arXiv 2505.09343, Table 4).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from simulator.events.timeline import BUBBLE, REASONS, FloatArray, IntArray, Timeline
from simulator.program import COMPUTE, EXPOSED, GRADIENT, PARAMETER, Program
from simulator.schedules import Overlapped, Schedule, Step, parts
from simulator.workload import Ledger

LONE_F, LONE_I, LONE_W, PAIR, OPTIMIZER, OTHER = "1F", "1B", "1W", "1F1B", "optimizer", "other"
ACTIONS = (LONE_F, LONE_I, LONE_W, PAIR, BUBBLE, OPTIMIZER, OTHER)
"""Terms of :func:`by_action`. 1B is the backward for the input, as in DeepSeek's table; B unsplit is 1B and 1W."""

_LETTERS = {"F": 0, "I": 1, "recompute": 1, "W": 2}
"""First words of the labels of kernels, and the pass that they are part of."""
_PASSES = {"F": (0,), "I": (1,), "W": (2,), "B": (1, 2)}


def passes(program: Program) -> IntArray:
    """Pass of every kernel: 0 forward, 1 backward for the input, 2 for the weight; -1 for all other ops [ops]."""
    words = np.array([_LETTERS.get(label.split()[0], -1) for label in program.labels])
    return np.where(program.stream == COMPUTE, words[program.label], -1)


def steps_of(program: Program, schedule: Schedule) -> IntArray:
    """Which step of the schedule every kernel is part of, counted rank after rank; -1 for all other ops [ops]."""
    table = np.full((3, schedule.stages, schedule.microbatches), -1)
    for number, step in enumerate(step for steps in schedule.steps for step in steps):
        for action in parts(step):
            for each in _PASSES[action.kind]:
                table[each, action.stage, action.microbatch] = number
    which = passes(program)
    return np.where(which >= 0, table[which, program.stage, program.microbatch], -1)


def spans(timeline: Timeline, schedule: Schedule, lane: int = 0) -> list[FloatArray]:
    """Start and end of every step of the schedule in one lane, for every rank [steps, 2].

    A step without kernels has no length; it stands where the next one starts.
    """
    number = steps_of(timeline.program, schedule)
    ops = np.flatnonzero(number >= 0)
    sizes = [len(steps) for steps in schedule.steps]
    begin, end = np.full(sum(sizes), np.inf), np.full(sum(sizes), -np.inf)
    np.minimum.at(begin, number[ops], timeline.start[ops, lane])
    np.maximum.at(end, number[ops], timeline.end[ops, lane])
    found = []
    for rank in np.split(np.stack([begin, end], axis=1), np.cumsum(sizes)[:-1]):
        following = np.minimum.accumulate(np.append(rank[:, 0], timeline.step_s)[::-1])[::-1][1:]
        empty = np.isinf(rank[:, 0])
        found.append(np.where(empty[:, None], following[:, None], rank))
    return found


def by_action(timeline: Timeline, schedule: Schedule) -> dict[str, FloatArray]:
    """The step of every rank by kind of action [ranks, explained lanes]; the terms sum to the step.

    ``1F``, ``1B``, ``1W``: steps that run alone, ``1F1B``: overlapped pairs; ``bubble``: until a step can start;
    ``optimizer``: the update, and gathers and reductions that nothing hides; ``other``: whatever else ends the step.
    """
    program, lanes = timeline.program, timeline.lanes
    order, first = timeline.compute_order
    number = steps_of(program, schedule)
    own = _own_terms(program, schedule, number)
    sums = np.zeros((len(ACTIONS), program.ranks, len(lanes)))
    pick = np.ix_(order, lanes)
    np.add.at(sums, (own[order], program.rank[order]), timeline.end[pick] - timeline.start[pick])

    gaps = timeline.gaps
    begins = np.ones(len(program), dtype=bool)  # the first kernel of a step, or no part of one
    begins[order[1:]] = first[1:] | (number[order[1:]] != number[order[:-1]]) | (number[order[1:]] < 0)
    states = [REASONS.index(EXPOSED[stream]) for stream in (GRADIENT, PARAMETER)]
    for_states = gaps.seconds[:, states].sum(axis=1)
    rest = gaps.seconds.sum(axis=1) - for_states
    rank = program.rank[gaps.op]
    np.add.at(sums[ACTIONS.index(OPTIMIZER)], (rank, gaps.lane), for_states)
    np.add.at(sums, (np.where(begins[gaps.op], ACTIONS.index(BUBBLE), own[gaps.op]), rank, gaps.lane), rest)
    return {name: sums[index] for index, name in enumerate(ACTIONS) if sums[index].any()}


def action_ledger(timeline: Timeline, schedule: Schedule) -> Ledger:
    """Mean over ranks of :func:`by_action`."""
    return Ledger({name: float(values.mean()) for name, values in by_action(timeline, schedule).items()})


def bubbles(timeline: Timeline) -> tuple[FloatArray, FloatArray]:
    """Bubble of every rank, mean over its explained lanes, of the makespan and of the rank's own span [ranks].

    Of the makespan: all time in which the rank has nothing to do because other stages work. Of the span: only between
    the start of its first and the end of its last action, which is the notion of the zero-bubble papers
    (arXiv 2401.10241); they synchronise after the optimizer, so that ranks may start and end one after another.
    """
    program, gaps = timeline.program, timeline.gaps
    order, first = timeline.compute_order
    action = passes(program)[order] >= 0
    starts = np.flatnonzero(first)
    before: IntArray = np.cumsum(action) - action  # kernels of actions before this one, so far of all ranks
    size = np.diff(np.append(starts, len(order)))
    before -= np.repeat(before[starts], size)
    total = np.repeat(np.add.reduceat(action.astype(np.int64), starts), size)
    between = np.zeros(len(program), dtype=bool)
    between[order] = (before > 0) & (before < total)
    idle = gaps.seconds[:, REASONS.index(BUBBLE)]
    found = []
    for seconds in (idle, np.where(between[gaps.op], idle, 0.0)):
        sums = np.zeros((program.ranks, len(timeline.lanes)))
        np.add.at(sums, (program.rank[gaps.op], gaps.lane), seconds)
        found.append(sums.mean(axis=1))
    return found[0], found[1]


def _own_terms(program: Program, schedule: Schedule, number: IntArray) -> IntArray:
    """Index in :data:`ACTIONS` of every compute op."""
    kinds = np.array([_kind(step) for steps in schedule.steps for step in steps], dtype=np.int64)
    updates = np.array([label.startswith("optimizer") for label in program.labels])
    outside = np.where(updates[program.label], ACTIONS.index(OPTIMIZER), ACTIONS.index(OTHER))
    own: npt.NDArray[np.int64] = np.where(number >= 0, kinds[number], outside)
    weight = (own == ACTIONS.index(LONE_I)) & (passes(program) == 2)
    return np.where(weight, ACTIONS.index(LONE_W), own)


def _kind(step: Step) -> int:
    if isinstance(step, Overlapped):
        return ACTIONS.index(PAIR)
    return ACTIONS.index({"F": LONE_F, "I": LONE_I, "W": LONE_W, "B": LONE_I}[step.kind])


__all__ = ["ACTIONS", "action_ledger", "bubbles", "by_action", "passes", "spans", "steps_of"]
