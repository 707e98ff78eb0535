"""Many scenarios that share a Program through the max-plus recursion at once; only the end of each step is kept.

The recursion is written down once as a tape of array operations, each over a block of scenarios (and, where lanes
differ, over the lanes). The end of an op lives in a slot that is used again as soon as nobody waits for it any more,
so that a block stays in the cache however long the Program is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from simulator.events.max_plus import evaluate
from simulator.events.timeline import FloatArray, IntArray, rows_of
from simulator.program import Program
from simulator.timing import Exchange, Prices

BLOCK, BLOCK_BYTES = 256, 3 * 2**28
"""Scenarios that are evaluated together at most, and bytes that their prices may take."""
COLUMNS = 32
"""Scenarios whose narrow prices are written at once."""

Mask = npt.NDArray[np.bool_]


def evaluate_batch(program: Program, prices: Iterable[Prices]) -> FloatArray:
    """Seconds of the step under each of many price tables, as :func:`evaluate` gives them [scenarios].

    The tables are read one by one: an iterator that makes them on the way never holds all of them.

    Raises:
        ValueError: tables with different rows or lanes.
    """
    found: list[float] = []
    first: Prices | None = None
    block: _Block | None = None
    wide = np.zeros(len(program.classes), dtype=bool)
    for each in prices:
        first = first or each
        _same(each, first)
        if each.noise is not None:
            found += [*(block.flush() if block is not None else []), evaluate(program, each).step_s]
            continue
        uneven = _uneven(program, each, wide)
        if block is None or (uneven != wide).any():  # lanes differ where they did not before
            found += block.flush() if block is not None else []
            block, wide = _Block(_tape(program, each, uneven), each.lanes), uneven
        block.add(each)
        if block.filled == block.size:
            found += block.flush()
    return np.array(found + (block.flush() if block is not None else []))


def _same(prices: Prices, first: Prices) -> None:
    rows = prices.row is first.row or np.array_equal(prices.row, first.row)
    if not rows or not np.array_equal(prices.rows, first.rows) or prices.lanes != first.lanes:
        raise ValueError("the price tables of a batch need the same rows and lanes")


def _uneven(program: Program, prices: Prices, known: Mask) -> Mask:
    """Classes that take longer in some lanes than in others, the known ones included; no exchange does [classes]."""
    found = known.copy()
    for number in np.flatnonzero(~known).tolist() if prices.lanes > 1 else ():
        if not isinstance(program.classes[number], Exchange):
            rows = prices.seconds[prices.row[number] : prices.row[number] + prices.rows[number]]
            found[number] = bool((rows != rows[:, :1]).any())
    return found


@dataclass(frozen=True)
class _Tape:
    """Array operations in order, on numbered arrays: slots 0, 1, ..., and price rows -1, -2, ....

    Slots and rows are wide (all lanes) or narrow (one value stands for all). ``rows``: narrow and wide ones in use.
    ``code``: (operation, left, right, output). ``ends``: slots of the ops that nobody waits for.
    """

    wide_classes: Mask
    rows: tuple[IntArray, IntArray]
    slots: list[bool] = field(default_factory=lambda: [False] * 3)  # whether each slot is wide
    code: list[tuple[Callable[..., object], int, int, int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


ZERO, LATEST, OTHER = range(3)
"""Slots of their own: nothing to wait for, and the latest end of all lanes where these meet."""


_TAPES: dict[int, tuple[Program, tuple[bytes, ...], _Tape]] = {}


def _tape(program: Program, prices: Prices, wide: Mask) -> _Tape:
    """The tape of a Program, kept for the last few."""
    key = (prices.row.tobytes(), prices.rows.tobytes(), wide.tobytes())
    known = _TAPES.get(id(program))
    if known is not None and known[0] is program and known[1] == key:
        return known[2]
    tape = _write(program, prices, wide)
    while len(_TAPES) >= 4:
        _TAPES.pop(next(iter(_TAPES)))
    _TAPES[id(program)] = (program, key, tape)
    return tape


def _write(program: Program, prices: Prices, wide_classes: Mask) -> _Tape:
    """Give every op a slot, in waves; a slot is free again after the last op that needs it."""
    rows, uneven = rows_of(program, prices), wide_classes[program.cls]
    order = np.concatenate(program.levels)
    used = tuple(_in_order(rows[order[uneven[order] == wide]]) for wide in (False, True))
    number = np.zeros(len(prices.seconds), dtype=np.int64)
    number[np.concatenate(used)] = -1 - np.arange(len(used[0]) + len(used[1]))
    tape = _Tape(wide_classes, (used[0], used[1]))
    slots, code = tape.slots, tape.code
    begin, needs = program.start.tolist(), program.needs.tolist()
    left: list[int] = np.bincount(program.needs, minlength=len(program)).tolist()
    price, wide, meets = number[rows].tolist(), uneven.tolist(), program.barrier.tolist()
    slot: list[int] = [0] * len(program)
    free: tuple[list[int], list[int]] = ([], [])  # slots, narrow and wide
    for op in order.tolist():
        before = needs[begin[op] : begin[op + 1]]
        if not meets[op]:  # wide so far: the price; from here on: the end
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
        code.append((np.add, price[op], ready, out))
        slot[op] = out
        if not left[op]:
            tape.ends.append(out)
    return tape


def _in_order(rows: IntArray) -> IntArray:
    """Each row once, in the order of its first use: neighbours on the tape are neighbours in memory."""
    found, first = np.unique(rows, return_index=True)
    return np.asarray(found[np.argsort(first)])


class _Block:
    """A tape and the arrays of one block of scenarios: narrow ones [scenarios], wide ones [lanes, scenarios]."""

    def __init__(self, tape: _Tape, lanes: int) -> None:
        self.tape, self.filled = tape, 0
        bytes_each = 8 * (len(tape.rows[0]) + len(tape.rows[1]) * lanes)
        self.size = int(min(BLOCK, max(1, BLOCK_BYTES // bytes_each)))
        self.narrow = np.zeros((len(tape.rows[0]), self.size))
        self.wide = np.empty((self.size, len(tape.rows[1]), lanes))
        self.wide.fill(0.0)  # not np.zeros: its pages would be met one by one
        self.columns = np.zeros((COLUMNS, len(tape.rows[0])))
        slots = [np.zeros((lanes, self.size) if wide else self.size) for wide in tape.slots]
        self.arrays = [*slots, *reversed([*self.narrow, *self.wide.transpose(1, 2, 0)])]

    def add(self, prices: Prices) -> None:
        """Note the prices of one more scenario."""
        narrow, wide = self.tape.rows
        self.columns[self.filled % COLUMNS] = prices.seconds[narrow, 0]
        np.take(prices.seconds, wide, axis=0, out=self.wide[self.filled], mode="clip")  # other modes copy twice
        self.filled += 1
        if self.filled % COLUMNS == 0:
            self._store()

    def _store(self) -> None:
        """Write some scenarios at once: one by one, every number would touch a cache line of its own."""
        first = (self.filled - 1) // COLUMNS * COLUMNS
        self.narrow[:, first : self.filled] = self.columns[: self.filled - first].T

    def flush(self) -> list[float]:
        """Seconds of the step of each scenario since the last call."""
        if not self.filled:
            return []
        self._store()
        arrays = self.arrays
        for operate, left, right, out in self.tape.code:
            operate(arrays[left], arrays[right], out=arrays[out])
        step = np.maximum.reduce([arrays[end].reshape(-1, self.size).max(axis=0) for end in self.tape.ends])
        seconds: list[float] = step[: self.filled].tolist()
        self.filled = 0
        return seconds


def _meet(ends: FloatArray, _: FloatArray, out: FloatArray) -> None:
    """Where the lanes meet: the latest of their ends."""
    np.maximum.reduce(ends, axis=0, out=out)
