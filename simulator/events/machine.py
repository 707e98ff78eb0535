"""The event engine: SimPy plays a Program. Streams are in-order, links are shared, collectives wait for the slowest.

Every op is one event. An op starts when all ops that it needs have ended; the lanes of an expert group keep their own
clocks (a vector carried by the event) and meet at collectives. Communication occupies links for as long as its bytes
take there, so two exchanges on one port slow each other down: that is what the max-plus reader leaves out.
"""

from __future__ import annotations

import gc

import numpy as np
import simpy

from simulator.events.network import Alarm, Callback, Flow, Link
from simulator.events.timeline import FloatArray, Timeline, rows_of
from simulator.program import COMPUTE, Program
from simulator.timing import Prices


def play(program: Program, prices: Prices) -> Timeline:
    """Play one step and return when every op started and ended, in every lane.

    Raises:
        ValueError: the Program deadlocks.
    """
    machine = _Machine(program, prices)
    run(machine.env)
    if machine.done != len(program):
        stuck = next(op for op, left in enumerate(machine.missing) if left > 0)
        raise deadlock(program, stuck)
    return machine.timeline(program, prices)


def run(env: simpy.Environment) -> None:
    """Run to the last event without Python's cycle collector: events make no cycles, and it walks all of them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        env.run()
    finally:
        if collecting:
            gc.enable()


def deadlock(program: Program, op: int) -> ValueError:
    """The error for a Program in which an op never starts."""
    return ValueError(f"deadlock: first on rank {program.rank[op]}: {program.labels[program.label[op]]}")


class Communication:
    """What the communication of a Program puts on links, ready for the inner loop of an engine."""

    def __init__(self, program: Program, prices: Prices) -> None:
        rows = rows_of(program, prices)
        flows = np.asarray((prices.flow_seconds > 0).any(axis=1))[rows] & (program.stream != COMPUTE)
        self.moves: list[bool] = flows.tolist()  # anything else is a plain delay
        self.latency: list[float] = prices.latency.tolist()
        self.flows = {
            row: [
                (tier, seconds, float(prices.flow_demand[row, tier]))
                for tier, seconds in enumerate(prices.flow_seconds[row].tolist())
                if seconds > 0.0
            ]
            for row in np.unique(rows[flows]).tolist()
        }
        # A message that is slow in some lanes only arrives earlier in the others, by what it takes less alone.
        lag = prices.seconds.max(axis=1, keepdims=True) - prices.seconds if prices.lanes > 1 else np.zeros((0, 1))
        self.early = {row: lag[row] for row in self.flows if len(lag) and lag[row].any()}


class _Machine:
    """State of one play."""

    def __init__(self, program: Program, prices: Prices) -> None:
        self.env = simpy.Environment()
        self.missing: list[int] = np.diff(program.start).tolist()
        begin, followers = program.waiters
        self.begin, self.followers = begin.tolist(), followers.tolist()
        self.needs_begin: list[int] = program.start.tolist()
        self.needs: list[int] = program.needs.tolist()
        rows = rows_of(program, prices)
        self.row = rows.tolist()
        self.seconds, self.noise = prices.seconds, prices.noise
        self.rank = program.rank.tolist()
        self.barrier = program.barrier.tolist()
        self.links: dict[tuple[int, int], Link] = {}
        self.communication = Communication(program, prices)
        self.moves = self.communication.moves
        self.lanes = prices.lanes
        self.finished: list[Callback] = [self.finish]
        alone = prices.seconds[rows, 0]
        self.scalar: list[float] = (alone if prices.noise is None else alone * prices.noise[:, 0]).tolist()
        self.first = [0.0] * len(program)  # start, where all lanes start together
        self.latest = [0.0] * len(program)  # end in the slowest lane
        self.start, self.end = (np.zeros((len(program), self.lanes if self.lanes > 1 else 0)) for _ in range(2))
        self.starts, self.ends = list(self.start), list(self.end)  # one lane needs no vectors
        self.done = 0
        for op in np.flatnonzero(np.diff(program.start) == 0).tolist():
            self.begin_op(op)

    def begin_op(self, op: int) -> None:
        """All needs have ended: start the op in every lane."""
        now = self.env.now
        if self.lanes == 1:
            self.first[op] = now
            if self.moves[op]:
                self.send(op, now)
            else:
                self.latest[op] = now + self.scalar[op]
                Alarm(self.env, self.scalar[op], self.finished, op)
            return
        needs = self.needs[self.needs_begin[op] : self.needs_begin[op + 1]]
        start, ends = self.starts[op], self.ends
        if self.barrier[op]:
            self.first[op] = first = max([self.latest[need] for need in needs], default=0.0)
            start.fill(first)
        elif needs:
            np.maximum(ends[needs[0]], ends[needs[-1]], out=start)
            for need in needs[1:-1]:
                np.maximum(start, ends[need], out=start)
        if self.moves[op]:
            self.send(op, now)
            return
        end, seconds = ends[op], self.seconds[self.row[op]]
        if self.noise is not None:
            seconds = np.multiply(seconds, self.noise[op], out=end)
        np.add(start, seconds, out=end)
        self.latest[op] = latest = float(np.maximum.reduce(end))
        Alarm(self.env, max(0.0, latest - now), self.finished, op)

    def arrive(self, op: int, seconds: float, early: FloatArray | None) -> None:
        """Communication has ended, so many seconds after its start; in some lanes it was there a little ``early``."""
        if self.lanes == 1:
            self.latest[op] = self.first[op] + seconds
        elif self.barrier[op] and early is None:
            self.latest[op] = self.first[op] + seconds
            self.ends[op].fill(self.latest[op])
        else:
            end = np.add(self.starts[op], seconds, out=self.ends[op])
            if early is not None:
                end -= early
            self.latest[op] = float(np.maximum.reduce(end))
        self.release(op)

    def timeline(self, program: Program, prices: Prices) -> Timeline:
        """Start and end of every op."""
        if self.lanes == 1:
            return Timeline(program, prices, np.array(self.first)[:, None], np.array(self.latest)[:, None])
        return Timeline(program, prices, self.start, self.end)

    def finish(self, event: simpy.Event) -> None:
        """The op of an alarm has ended."""
        self.release(event._value)

    def release(self, op: int) -> None:
        """The op has ended: release what waits for it."""
        self.done += 1
        missing = self.missing
        for follower in self.followers[self.begin[op] : self.begin[op + 1]]:
            missing[follower] -= 1
            if missing[follower] == 0:
                self.begin_op(follower)

    def send(self, op: int, now: float) -> None:
        """Communication: latency, then one flow per tier; ends when the last flow ends."""
        row = self.row[op]
        flows = self.communication.flows[row]
        early = self.communication.early.get(row)
        left = len(flows)

        def flow_done() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self.arrive(op, self.env.now - now, early)

        def depart(_: simpy.Event) -> None:
            for tier, seconds, demand in flows:
                place = (self.rank[op], tier)
                if place not in self.links:
                    self.links[place] = Link(self.env)
                self.links[place].start(Flow(seconds, demand, flow_done))

        Alarm(self.env, self.communication.latency[row], [depart])
