"""The max-plus recursion of a Program written down once, as a tape of array operations, to be played many times.

The end of an op lives in a slot that is used again as soon as nobody waits for it any more, so that what the tape works
on stays in the cache however long the Program is. A slot is wide (one number for each lane) only behind an op that
takes longer in some lanes than in others, up to where the lanes meet. The noise of kernel jitter belongs to the ops,
whatever their prices: prices that differ between lanes are multiplied by it as they are read, others by one more
operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from simulator.events.timeline import FloatArray, IntArray, rows_of
from simulator.program import Program
from simulator.timing import Prices

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tape:
    """Array operations in order, on numbered arrays: slots 0, 1, ..., and prices and noise -1, -2, ....

    Slots and prices are wide (all lanes) or narrow (one value stands for all). ``narrow`` and ``wide``: price rows in
    use, the wide ones once for every op with noise; ``wide_noise``: that op, -1 for none; ``noise``: ops with narrow
    prices and noise. ``code``: (operation, left, right, output). ``ends``: slots of the ops that nobody waits for.
    """

    narrow: IntArray
    wide: IntArray
    wide_noise: IntArray
    noise: IntArray
    slots: list[bool] = field(default_factory=lambda: [False] * 4 + [True])  # whether each slot is wide
    code: list[tuple[Callable[..., object], int, int, int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


ZERO, LATEST, OTHER, LASTS, LASTS_BY_LANE = range(5)
"""Slots of their own: nothing to wait for, the latest end of all lanes where these meet, a price times its noise."""


_TAPES: dict[int, tuple[Program, tuple[bytes, ...], Tape]] = {}


def tape_of(program: Program, prices: Prices, uneven: Mask) -> Tape:
    """The tape of a Program where the classes of ``uneven`` differ between lanes, kept for the last few."""
    noisy = np.zeros(len(program), dtype=bool) if prices.noise is None else (prices.noise != 1.0).any(axis=1)
    key = tuple(each.tobytes() for each in (prices.row, prices.rows, uneven, noisy))
    known = _TAPES.get(id(program))
    if known is not None and known[0] is program and known[1] == key:
        return known[2]
    tape = _write(program, prices, uneven, noisy)
    while len(_TAPES) >= 4:
        _TAPES.pop(next(iter(_TAPES)))
    _TAPES[id(program)] = (program, key, tape)
    return tape


def _write(program: Program, prices: Prices, uneven: Mask, noisy: Mask) -> Tape:
    """Give every op a slot, in waves; a slot is free again after the last op that needs it."""
    order = np.concatenate(program.levels)
    tape, numbers = _numbered(rows_of(program, prices), order, uneven[program.cls], noisy)
    slots, code = tape.slots, tape.code
    begin, needs = program.start.tolist(), program.needs.tolist()
    left: list[int] = np.bincount(program.needs, minlength=len(program)).tolist()
    meets = program.barrier.tolist()
    price, noise = numbers.tolist()
    wide: list[bool] = (uneven[program.cls] | (noisy & (prices.lanes > 1))).tolist()
    slot: list[int] = [0] * len(program)
    free: tuple[list[int], list[int]] = ([], [])  # slots, narrow and wide
    for op in order.tolist():
        before, lasts = needs[begin[op] : begin[op + 1]], price[op]
        if noise[op]:
            lasts = LASTS_BY_LANE if wide[op] else LASTS
            code.append((_spread if wide[op] else np.multiply, price[op], noise[op], lasts))
        if not meets[op]:  # wide so far: the duration; from here on: the end
            for need in before:
                wide[op] = wide[op] or wide[need]
        kind = wide[op]
        if free[kind]:
            out = free[kind].pop()
        else:
            out = len(slots)
            slots.append(kind)
        into = LATEST if meets[op] and kind else out
        ready = ZERO
        for need in before:
            end, spare = slot[need], into if ready == ZERO else OTHER
            if meets[op] and wide[need]:
                code.append((_meet, end, end, spare))
                end = spare
            if ready != ZERO:
                code.append((np.maximum, ready, end, into))
                end = into
            ready = end
            left[need] -= 1
            if not left[need]:
                free[wide[need]].append(slot[need])
        code.append((np.add, lasts, ready, out))
        slot[op] = out
        if not left[op]:
            tape.ends.append(out)
    return tape


def _numbered(rows: IntArray, order: IntArray, uneven: Mask, noisy: Mask) -> tuple[Tape, IntArray]:
    """An empty tape, and for every op the numbers of its price and of its noise, 0 for none [2, ops].

    Numbers go in the order of use: neighbours on the tape are neighbours in memory.
    """
    several = int(rows.max()) + 1  # beyond all rows: a wide row of one op, multiplied by its noise already
    kept = np.where(uneven & noisy, several + np.arange(len(rows)), rows)
    narrow, wide = (_in_order(kept[order[uneven[order] == kind]]) for kind in (False, True))
    op = np.where(wide >= several, wide - several, -1)
    noise = order[(noisy & ~uneven)[order]]
    tape = Tape(narrow, np.where(op < 0, wide, rows[op]), op, noise)
    number = np.zeros(several + len(rows), dtype=np.int64)
    number[np.concatenate([narrow, wide])] = -1 - np.arange(len(narrow) + len(wide))
    numbers = np.zeros((2, len(rows)), dtype=np.int64)
    numbers[0], numbers[1, noise] = number[kept], -1 - len(narrow) - len(wide) - np.arange(len(noise))
    return tape, numbers


def _in_order(rows: IntArray) -> IntArray:
    """Each row once, in the order of its first use."""
    found, first = np.unique(rows, return_index=True)
    return np.asarray(found[np.argsort(first)])


def _meet(ends: FloatArray, _: FloatArray, out: FloatArray) -> None:
    """Where the lanes meet: the latest of their ends."""
    np.maximum.reduce(ends, axis=0, out=out)


def _spread(price: FloatArray, noise: FloatArray, out: FloatArray) -> None:
    """The same price in all lanes, times the noise of each: a product of matrices is the fastest way to say so."""
    np.dot(noise, price[None, :], out=out)
