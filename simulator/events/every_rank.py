"""The same Program with every expert rank as events of its own: slow, and an oracle for the vector clocks.

One op in one lane is one event; a collective is one event for all lanes, counted down by what each of them waits for.
Links belong to lanes too: a collective puts the same flow on the link of every lane, a message only on its own. As
long as the lanes of a group carry nothing but collectives, one link stands for all of them; a lane with a message has
a link of its own, with copies of the flows that were already there.
"""

from __future__ import annotations

from array import array
from heapq import heappush
from itertools import repeat
from typing import Any

import numpy as np
import simpy
from simpy.events import NORMAL

from simulator.events.machine import Communication, deadlock, run
from simulator.events.network import Alarm, Callback, Flow, Link
from simulator.events.timeline import Timeline, rows_of
from simulator.program import Program
from simulator.timing import Prices


def play_every_rank(program: Program, prices: Prices) -> Timeline:
    """Play one step with one event for every op in every lane.

    Raises:
        ValueError: the Program deadlocks.
    """
    machine = _Machine(program, prices)
    run(machine.env)
    shape = (len(program), prices.lanes)
    if machine.done != len(program) * prices.lanes:
        left = np.where(program.barrier, machine.together, np.reshape(machine.missing, shape).max(axis=1))
        raise deadlock(program, int(np.flatnonzero(left > 0)[0]))
    return Timeline(
        program, prices, np.frombuffer(machine.start).reshape(shape), np.frombuffer(machine.end).reshape(shape)
    )


class _Machine:
    """State of one play. Op o in lane l is number o x lanes + l."""

    def __init__(self, program: Program, prices: Prices) -> None:
        self.env = simpy.Environment()
        self.lanes = prices.lanes
        needs = np.diff(program.start)
        rows = rows_of(program, prices)
        self.barrier: list[bool] = program.barrier.tolist()
        self.together: list[int] = (needs * self.lanes).tolist()  # what a collective still waits for
        self.missing = array("q", np.repeat(needs, self.lanes).tobytes())
        begin, followers = program.waiters
        starts, after = begin.tolist(), followers.tolist()
        self.followers = [after[starts[op] : starts[op + 1]] for op in range(len(program))]
        self.row: list[int] = rows.tolist()
        self.rank: list[int] = program.rank.tolist()
        seconds = prices.seconds[rows] if prices.noise is None else prices.seconds[rows] * prices.noise
        self.seconds = array("d", seconds.tobytes())
        self.communication = Communication(program, prices)
        self.moves = self.communication.moves
        self.ports: dict[tuple[int, int], _Ports] = {}
        self.start = array("d", bytes(8 * len(program) * self.lanes))
        self.end = array("d", bytes(8 * len(program) * self.lanes))
        self.done = 0
        self.one_finished: list[Any] = [self.finish_one]
        self.all_finished: list[Callback] = [self.finish_all]
        for op in np.flatnonzero(needs == 0).tolist():
            self.begin_all(op)

    def begin_all(self, op: int) -> None:
        """Start an op in every lane at once; where all lanes end together, that is one event."""
        now, first, lanes = self.env.now, op * self.lanes, self.lanes
        seconds = self.seconds[first : first + lanes]
        if not self.barrier[op] or (not self.moves[op] and min(seconds) < max(seconds)):
            for number in range(first, first + lanes):
                self.begin_one(op, number)
            return
        self.start[first : first + lanes] = array("d", repeat(now, lanes))
        if self.moves[op]:
            _Sending(self, op, None)
            return
        self.end[first : first + lanes] = array("d", repeat(now + seconds[0], lanes))
        Alarm(self.env, seconds[0], self.all_finished, op)

    def begin_one(self, op: int, number: int) -> None:
        """Start an op in one lane."""
        env = self.env
        self.start[number] = now = env._now
        if self.moves[op]:
            _Sending(self, op, number - op * self.lanes)
            return
        event = simpy.Event.__new__(simpy.Event)  # as Alarm does, without its calls
        event.env, event.callbacks, event._ok, event._value = env, self.one_finished, True, number
        heappush(env._queue, (now + self.seconds[number], NORMAL, next(env._eid), event))

    def finish_one(self, event: simpy.Event) -> None:
        """An op has ended in one lane."""
        self.release_one(event._value)

    def release_one(self, number: int) -> None:
        """Release what waits for an op in one lane."""
        lanes, missing, together = self.lanes, self.missing, self.together
        self.end[number] = self.env._now
        self.done += 1
        op = number // lanes
        lane = number - op * lanes
        for follower in self.followers[op]:
            if self.barrier[follower]:
                together[follower] -= 1
                if not together[follower]:
                    self.begin_all(follower)
            else:
                other = follower * lanes + lane
                left = missing[other] - 1
                missing[other] = left
                if not left:
                    self.begin_one(follower, other)

    def finish_all(self, event: simpy.Event) -> None:
        """A collective has ended in every lane."""
        self.release_all(event._value)

    def release_all(self, op: int) -> None:
        """Release what waits for a collective."""
        lanes, missing = self.lanes, self.missing
        self.done += lanes
        for follower in self.followers[op]:
            if self.barrier[follower]:
                self.together[follower] -= lanes
                if not self.together[follower]:
                    self.begin_all(follower)
                continue
            first = follower * lanes
            for number in range(first, first + lanes):
                left = missing[number] - 1
                missing[number] = left
                if not left:
                    self.begin_one(follower, number)


class _Sending:
    """Communication of one lane, or of all: latency, then one flow per tier; ends when the last flow ends."""

    __slots__ = ("lane", "left", "machine", "op")

    def __init__(self, machine: _Machine, op: int, lane: int | None) -> None:
        self.machine, self.op, self.lane, self.left = machine, op, lane, 0
        Alarm(machine.env, machine.communication.latency[machine.row[op]], [self.depart])

    def depart(self, _: simpy.Event) -> None:
        """Put the flows on their links."""
        machine, lane, row = self.machine, self.lane, self.machine.row[self.op]
        early = machine.communication.early.get(row)
        ahead = 0.0 if early is None or lane is None else float(early[lane])
        self.left = 1  # until all flows are on their way
        for tier, seconds, demand in machine.communication.flows[row]:
            place = (machine.rank[self.op], tier)
            ports = machine.ports.get(place)
            if ports is None:
                ports = machine.ports[place] = _Ports(machine.env)
            if lane is None:
                ports.start_all(seconds, demand, self)
            else:
                ports.start_one(lane, max(0.0, seconds - ahead), demand, self)
        self.arrive()

    def arrive(self) -> None:
        """One more flow has ended."""
        self.left -= 1
        if self.left:
            return
        machine, first = self.machine, self.op * self.machine.lanes
        if self.lane is not None:
            machine.release_one(first + self.lane)
            return
        machine.end[first : first + machine.lanes] = array("d", repeat(machine.env.now, machine.lanes))
        machine.release_all(self.op)


class _Part(Flow):
    """A flow of some communication, on the link that stands for all lanes or on that of one lane."""

    __slots__ = ("sending",)

    def __init__(self, seconds: float, demand: float, sending: _Sending) -> None:
        super().__init__(seconds, demand, sending.arrive)
        sending.left += 1
        self.sending = sending


class _Ports:
    """The links of all lanes of one pipeline rank on one tier."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.alike = Link(env)
        self.own: dict[int, Link] = {}

    def start_all(self, seconds: float, demand: float, sending: _Sending) -> None:
        """A flow of the same size in every lane."""
        self.alike.start(_Part(seconds, demand, sending))
        for link in self.own.values():
            if link.flows:
                link.start(_Part(seconds, demand, sending))

    def start_one(self, lane: int, seconds: float, demand: float, sending: _Sending) -> None:
        """A flow in one lane, beside the collectives that are under way there."""
        link = self.own.get(lane)
        if link is None:
            link = self.own[lane] = Link(self.env)
        if not link.flows and self.alike.flows:
            self.alike.advance()
            for flow in self.alike.flows:
                assert isinstance(flow, _Part)
                if flow.left > 0.0:
                    link.start(_Part(flow.left, flow.demand, flow.sending))
        link.start(_Part(seconds, demand, sending))
