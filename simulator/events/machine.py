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
from simulator.events.timeline import Timeline, rows_of
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
    return Timeline(program, prices, machine.start, machine.end)


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
        self.needs_begin, self.needs = program.start.tolist(), program.needs
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
        self.start = np.zeros((len(program), self.lanes))
        self.end = np.zeros((len(program), self.lanes))
        self.done = 0
        for op in np.flatnonzero(np.diff(program.start) == 0).tolist():
            self.begin_op(op)

    def begin_op(self, op: int) -> None:
        """All needs have ended: start the op in every lane."""
        now = self.env.now
        if self.lanes == 1:
            self.start[op, 0] = now
            if self.moves[op]:
                self.send(op, now)
            else:
                self.end[op, 0] = now + self.scalar[op]
                Alarm(self.env, self.scalar[op], self.finished, op)
            return
        needs = self.needs[self.needs_begin[op] : self.needs_begin[op + 1]]
        if len(needs) == 0:
            start = np.zeros(self.lanes)
        elif len(needs) == 1:
            start = self.end[needs[0]]
        else:
            start = np.maximum.reduce(self.end[needs])
        if self.barrier[op]:
            start = np.full(self.lanes, start.max())
        self.start[op] = start
        if self.moves[op]:
            self.send(op, now)
            return
        seconds = self.seconds[self.row[op]]
        end = start + (seconds if self.noise is None else seconds * self.noise[op])
        self.end[op] = end
        delay = float(end.max()) - now
        Alarm(self.env, delay if delay > 0.0 else 0.0, self.finished, op)

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
                self.end[op] = self.start[op] + (self.env.now - now)
                if early is not None:
                    self.end[op] -= early
                self.release(op)

        def depart(_: simpy.Event) -> None:
            for tier, seconds, demand in flows:
                place = (self.rank[op], tier)
                if place not in self.links:
                    self.links[place] = Link(self.env)
                self.links[place].start(Flow(seconds, demand, flow_done))

        Alarm(self.env, self.communication.latency[row], [depart])
