"""Links shared by flows, max-min fairly.

Each (pipeline rank, tier) is one link of capacity 1: the ranks of an expert group are symmetric, so a collective is
one flow per rank and tier that carries the busier direction. A flow alone on its link proceeds at rate 1 and takes
its demand d of the capacity (its efficiency: d < 1 leaves room for others). When the demands exceed the capacity, it
is shared by progressive filling: nobody gets more than it asks for, and nobody could get more without taking from
someone who has less. :func:`max_min_rates` does the same for flows that cross several links, as between pairs of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappush

import simpy
from simpy.events import NORMAL

Callback = Callable[[simpy.Event], None]


def fair_shares(demands: Sequence[float], capacity: float = 1.0) -> list[float]:
    """Max-min fair shares of one link.

    >>> fair_shares([0.2, 0.9, 0.9])
    [0.2, 0.4, 0.4]
    """
    shares = [0.0] * len(demands)
    left, open_ = capacity, sorted(range(len(demands)), key=lambda index: demands[index])
    while open_:
        equal = left / len(open_)
        index = open_.pop(0)
        shares[index] = min(demands[index], equal)
        left -= shares[index]
    return shares


def max_min_rates(
    paths: Sequence[Sequence[int]], capacities: Sequence[float], demands: Sequence[float] | None = None
) -> list[float]:
    """Max-min fair rates of flows over several links, by progressive filling.

    All rates rise together. A flow stops rising when it has what it asks for, or when one of its links is full: that
    link is its bottleneck, on which no other flow is faster.

    >>> max_min_rates([[0], [0, 1], [1]], [1.0, 3.0])  # the second is held to half of link 0, the third takes the rest
    [0.5, 0.5, 2.5]
    """
    wanted = list(demands) if demands is not None else [float("inf")] * len(paths)
    rates, left = [0.0] * len(paths), list(capacities)
    rising = set(range(len(paths)))
    while rising:
        users = [sum(1 for flow in rising if link in paths[flow]) for link in range(len(left))]
        room = [left[link] / users[link] for link in range(len(left)) if users[link]]
        rise = min(room + [wanted[flow] - rates[flow] for flow in rising])
        if rise == float("inf"):
            raise ValueError("a flow without a link must ask for a finite rate")
        for flow in rising:
            rates[flow] += rise
        left = [free - rise * count for free, count in zip(left, users, strict=True)]
        full = {link for link, free in enumerate(left) if users[link] and free <= 1e-12 * capacities[link]}
        rising -= {flow for flow in rising if wanted[flow] - rates[flow] <= 1e-12 * wanted[flow] < float("inf")}
        rising -= {flow for flow in rising if not full.isdisjoint(paths[flow])}
    return rates


class Alarm(simpy.Event):
    """An event that is decided when it is made: after a delay it calls back with its value. Cheaper than a process."""

    def __init__(self, env: simpy.Environment, delay: float, callbacks: list[Callback], value: int = 0) -> None:
        self.env = env
        self.callbacks = callbacks  # SimPy reads the list and never changes it, so that alarms can share one
        self._ok, self._value = True, value
        heappush(env._queue, (env._now + delay, NORMAL, next(env._eid), self))  # env.schedule, without its calls


class Flow:
    """One flow on one link: what is left of it, in seconds at rate 1."""

    __slots__ = ("demand", "done", "left", "rate")

    def __init__(self, seconds: float, demand: float, done: Callable[[], None]) -> None:
        self.left, self.demand, self.done, self.rate = seconds, demand, done, 1.0


class Link:
    """A link and the flows on it. Rates change only when a flow starts or ends."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.flows: list[Flow] = []
        self.since = 0.0
        self.version = 0
        self.carried = 0.0
        self._alarm: list[Callback] = [self._wake]

    def start(self, flow: Flow) -> None:
        """Put a flow on the link."""
        self.advance()
        self.flows.append(flow)
        self._plan()

    def advance(self) -> None:
        """Account for what has passed since the rates were last set."""
        passed = self.env.now - self.since
        for flow in self.flows:
            flow.left -= flow.rate * passed
            self.carried += flow.rate * passed * flow.demand
        self.since = self.env.now

    def _plan(self) -> None:
        """Set the rates and wake up at the next end."""
        self.version += 1
        flows = self.flows
        if len(flows) == 1:
            flows[0].rate = 1.0
            Alarm(self.env, max(flows[0].left, 0.0), self._alarm, self.version)
        elif flows:
            shares = fair_shares([flow.demand for flow in flows])
            for flow, share in zip(flows, shares, strict=True):
                flow.rate = share / flow.demand
            next_end = min(max(flow.left, 0.0) / flow.rate for flow in flows)
            Alarm(self.env, next_end, self._alarm, self.version)

    def _wake(self, alarm: simpy.Event) -> None:
        if alarm._value != self.version:
            return  # a flow has started since: another alarm is set
        self.advance()
        least = 1e-15 + 1e-12 * self.env.now
        ended = [flow for flow in self.flows if flow.left <= least]
        self.flows = [flow for flow in self.flows if flow.left > least]
        self._plan()
        for flow in ended:
            flow.done()
