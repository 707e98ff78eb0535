"""Many scenarios that share a Program through the max-plus recursion at once; only the end of each step is kept.

The recursion runs over a :mod:`tape <simulator.events.tape>` of array operations, each over a block of scenarios (and,
where lanes differ, over the lanes), so that numpy's cost of a call is shared by all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from simulator.events.max_plus import evaluate
from simulator.events.tape import ZERO, Mask, Tape, tape_of
from simulator.events.timeline import FloatArray
from simulator.program import Program
from simulator.timing import Exchange, Prices

BLOCK, BLOCK_BYTES = 256, 3 * 2**28
"""Scenarios that are evaluated together, in one block or in equal parts by the bytes that their prices may take."""
COLUMNS = 32
"""Scenarios whose narrow prices are written at once."""
CHUNK = 256
"""Rows of wide prices that are read, and multiplied by their noise, at once."""


def evaluate_batch(program: Program, prices: Iterable[Prices]) -> FloatArray:
    """Seconds of the step under each of many price tables, as :func:`evaluate` gives them [scenarios].

    The tables are read one by one: an iterator that makes them on the way never holds all of them. Those with the noise
    of the first one are evaluated together, one with other noise alone.

    Raises:
        ValueError: tables with different rows or lanes.
    """
    found: list[float] = []
    together: list[int] = []
    alone: dict[int, float] = {}
    first: Prices | None = None
    block: _Block | None = None
    uneven = np.zeros(len(program.classes), dtype=bool)
    for number, each in enumerate(prices):
        first = first or each
        _same(each, first)
        if not _equal(each.noise, first.noise):
            alone[number] = evaluate(program, each).step_s
            continue
        known, uneven = uneven, _uneven(program, each, uneven)
        if block is None or (uneven != known).any():  # lanes differ where they did not before
            found += block.flush() if block is not None else []
            block = _Block(tape_of(program, each, uneven), each)
        together.append(number)
        block.add(each)
        if block.filled == block.size:
            found += block.flush()
    found += block.flush() if block is not None else []
    steps = np.zeros(len(together) + len(alone))
    steps[together], steps[list(alone)] = found, list(alone.values())
    return steps


def _same(prices: Prices, first: Prices) -> None:
    rows = prices.row is first.row or np.array_equal(prices.row, first.row)
    if not rows or not np.array_equal(prices.rows, first.rows) or prices.lanes != first.lanes:
        raise ValueError("the price tables of a batch need the same rows and lanes")


def _equal(noise: FloatArray | None, other: FloatArray | None) -> bool:
    return noise is other or (noise is not None and other is not None and np.array_equal(noise, other))


def _uneven(program: Program, prices: Prices, known: Mask) -> Mask:
    """Classes that take longer in some lanes than in others, the known ones included; no exchange does [classes]."""
    if prices.lanes == 1:
        return known
    even = np.flatnonzero([not isinstance(each, Exchange) for each in program.classes] & ~known)
    owner = np.repeat(even, prices.rows[even])
    place = np.arange(len(owner)) - np.repeat(np.cumsum(prices.rows[even]) - prices.rows[even], prices.rows[even])
    seconds = prices.seconds[prices.row[owner] + place]
    found = known.copy()
    found[owner[(seconds != seconds[:, :1]).any(axis=1)]] = True
    return found


class _Block:
    """A tape and the arrays of one block of scenarios: narrow ones [scenarios], wide ones [lanes, scenarios]."""

    def __init__(self, tape: Tape, prices: Prices) -> None:
        self.tape, self.filled, self.lanes = tape, 0, prices.lanes
        bytes_each = 8 * (len(tape.narrow) + len(tape.wide) * self.lanes)
        self.size = -(-BLOCK // -(-BLOCK * bytes_each // BLOCK_BYTES))  # equal parts: no block is left half full
        self.narrow = np.zeros((len(tape.narrow), self.size))
        self.wide = np.empty((self.size, len(tape.wide), self.lanes))
        self.wide.fill(0.0)  # not np.zeros: its pages would be met one by one
        self.chunk = np.zeros((CHUNK, self.lanes))
        self.columns = np.zeros((COLUMNS, len(tape.narrow)))
        self.noise, self.wide_noise = np.zeros((0, self.lanes, 1)), None
        if prices.noise is not None:
            noise = prices.noise[tape.noise]
            self.noise = noise if self.lanes == 1 else noise[:, :, None]
            self.wide_noise = np.where(tape.wide_noise[:, None] < 0, 1.0, prices.noise[tape.wide_noise])
        self.arrays = self._views(self.size)

    def add(self, prices: Prices) -> None:
        """Note the prices of one more scenario."""
        narrow, wide = self.tape.narrow, self.tape.wide
        self.columns[self.filled % COLUMNS] = prices.seconds[narrow, 0]
        for first in range(0, len(wide), CHUNK):
            rows, out = wide[first : first + CHUNK], self.wide[self.filled, first : first + CHUNK]
            if self.wide_noise is None:
                np.take(prices.seconds, rows, axis=0, out=out, mode="clip")  # other modes copy twice
            else:
                alone = np.take(prices.seconds, rows, axis=0, out=self.chunk[: len(rows)], mode="clip")
                np.multiply(alone, self.wide_noise[first : first + CHUNK], out=out)
        self.filled += 1
        if self.filled % COLUMNS == 0:
            self._store()

    def _store(self) -> None:
        """Write some scenarios at once: one by one, every number would touch a cache line of its own."""
        first = (self.filled - 1) // COLUMNS * COLUMNS
        self.narrow[:, first : self.filled] = self.columns[: self.filled - first].T

    def _views(self, count: int) -> list[FloatArray]:
        """The numbered arrays of the tape, for so many scenarios."""
        slots = [np.zeros((self.lanes, count) if wide else count) for wide in self.tape.slots]
        prices = [*self.narrow[:, :count], *self.wide[:count].transpose(1, 2, 0)]
        return [*slots, *reversed([*prices, *self.noise])]

    def flush(self) -> list[float]:
        """Seconds of the step of each scenario since the last call."""
        if not self.filled:
            return []
        self._store()
        count, self.filled = self.filled, 0
        if len(self.arrays[ZERO]) != count:
            self.arrays = self._views(count)
        arrays = self.arrays
        for operate, left, right, out in self.tape.code:
            operate(arrays[left], arrays[right], out=arrays[out])
        step = np.maximum.reduce([arrays[end].reshape(-1, count).max(axis=0) for end in self.tape.ends])
        return list(step.tolist())
