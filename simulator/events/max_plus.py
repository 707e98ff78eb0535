"""The fast reader: the same Program without shared links, evaluated as a max-plus recursion.

    start_i = max over needs of end_j,    end_i = start_i + price_i

wave by wave over the dependency graph, vectorised over lanes. Equal to the event engine to rounding where no two
flows meet on a link, and never later than it otherwise. Nothing is chosen at run time, so a warm evaluation costs a
few numpy calls per wave.
"""

from __future__ import annotations

import numpy as np

from simulator.events.timeline import Timeline, rows_of
from simulator.program import Program
from simulator.timing import Prices


def evaluate(program: Program, prices: Prices) -> Timeline:
    """Start and end of every op [ops, lanes] with every flow alone on its link."""
    rows = rows_of(program, prices)
    count, lanes = len(program), prices.lanes
    start = np.zeros((count, lanes))
    end = np.zeros((count + 1, lanes))  # the last row stands for "nothing to wait for"
    for wave, needs, meets in _plan(program):
        ready = end[needs[:, 0]] if needs.shape[1] == 1 else end[needs].max(axis=1)
        if lanes > 1 and meets.any():
            ready[meets] = ready[meets].max(axis=1, keepdims=True)
        start[wave] = ready
        seconds = prices.seconds[rows[wave]]
        end[wave] = ready + (seconds if prices.noise is None else seconds * prices.noise[wave])
    return Timeline(program, prices, start, end[:-1])


_PLANS: dict[int, tuple[Program, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]] = {}


def _plan(program: Program) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Waves with their needs padded to a rectangle, kept for the last few Programs."""
    known = _PLANS.get(id(program))
    if known is not None and known[0] is program:
        return known[1]
    degree = np.diff(program.start)
    none = len(program)
    plan = []
    for wave in program.levels:
        width = max(1, int(degree[wave].max()))
        offsets = np.arange(width)
        inside = offsets < degree[wave][:, None]
        places = np.where(inside, program.start[wave][:, None] + offsets, 0)
        needs = np.where(inside, program.needs[places], none) if len(program.needs) else np.full(places.shape, none)
        plan.append((wave, needs, program.barrier[wave]))
    while len(_PLANS) >= 4:
        _PLANS.pop(next(iter(_PLANS)))
    _PLANS[id(program)] = (program, plan)
    return plan


def forget_plans() -> None:
    """Drop the sorted waves of earlier Programs (for timing a cold evaluation)."""
    _PLANS.clear()
