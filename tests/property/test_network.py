"""Flows over several links, max-min fairly; and an expert exchange flow by flow between every pair of ranks.

The engines put one flow per rank on its link, that of the busier direction. Here the same exchange is played with one
flow for every pair: both agree when all ranks are loaded alike, and an exchange between pairs is never faster than what
its busiest rank sends or receives takes on that rank's link.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.events.network import Flow, Link, fair_shares, max_min_rates

FloatArray = npt.NDArray[np.float64]
Case = tuple[list[list[int]], list[float]]


@st.composite
def networks(draw: st.DrawFn) -> Case:
    """Up to four links and eight flows, each over some of them."""
    capacities = draw(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4))
    links = st.integers(0, len(capacities) - 1)
    paths = draw(st.lists(st.lists(links, min_size=1, max_size=3, unique=True), min_size=1, max_size=8))
    return paths, capacities


def users(paths: list[list[int]], link: int) -> list[int]:
    return [flow for flow, path in enumerate(paths) if link in path]


# Cases worked out by hand


@pytest.mark.parametrize(
    ("paths", "capacities", "rates"),
    [
        ([[0]], [2.0], [2.0]),
        ([[0], [0]], [2.0], [1.0, 1.0]),
        ([[0, 1]], [2.0, 1.0], [1.0]),
        # A long flow over both links and a short one on each: the long one is held where there is less room.
        ([[0, 1], [0], [1]], [1.0, 2.0], [0.5, 0.5, 1.5]),
        # Two bottlenecks: three flows share the first link, what is left of the second goes to the last flow.
        ([[0], [0], [0, 1], [1]], [3.0, 5.0], [1.0, 1.0, 1.0, 4.0]),
        # A ring of three links, each flow over two of them.
        ([[0, 1], [1, 2], [2, 0]], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]),
    ],
)
def test_rates_by_hand(paths: list[list[int]], capacities: list[float], rates: list[float]) -> None:
    assert max_min_rates(paths, capacities) == pytest.approx(rates)


def test_what_a_flow_asks_for_limits_it_and_a_flow_without_a_link_needs_a_limit() -> None:
    assert max_min_rates([[0], [0], []], [3.0], [0.5, 9.0, 2.0]) == pytest.approx([0.5, 2.5, 2.0])
    with pytest.raises(ValueError, match="finite rate"):
        max_min_rates([[]], [1.0])


# Laws


@settings(max_examples=300)
@given(networks())
def test_no_link_is_overfull_and_every_flow_has_a_full_link_on_which_nobody_is_faster(case: Case) -> None:
    paths, capacities = case
    rates = max_min_rates(*case)
    load = [sum(rates[flow] for flow in users(paths, link)) for link in range(len(capacities))]

    assert all(used <= room * (1 + 1e-9) for used, room in zip(load, capacities, strict=True))
    for flow, path in enumerate(paths):
        assert any(
            load[link] == pytest.approx(capacities[link])
            and rates[flow] == pytest.approx(max(rates[other] for other in users(paths, link)))
            for link in path
        )


@settings(max_examples=300)
@given(networks())
def test_every_flow_has_at_least_an_equal_share_of_its_tightest_link(case: Case) -> None:
    paths, capacities = case
    for flow, rate in enumerate(max_min_rates(*case)):
        least = min(capacities[link] / len(users(paths, link)) for link in paths[flow])
        assert rate >= least * (1 - 1e-9)


@settings(max_examples=200)
@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=8), st.floats(0.1, 3.0))
def test_one_link_is_shared_as_the_engine_shares_it(demands: list[float], capacity: float) -> None:
    rates = max_min_rates([[0]] * len(demands), [capacity], demands)

    assert rates == pytest.approx(fair_shares(demands, capacity))


@settings(max_examples=200)
@given(networks(), st.randoms(use_true_random=False))
def test_rates_do_not_depend_on_the_order_of_the_flows(case: Case, random: object) -> None:
    paths, capacities = case
    order = list(range(len(paths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rates, shuffled = max_min_rates(*case), max_min_rates([paths[flow] for flow in order], capacities)

    assert shuffled == pytest.approx([rates[flow] for flow in order])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.0, 3.0), st.floats(0.1, 1.0)), min_size=1, max_size=8))
def test_a_link_is_never_overfull_and_carries_every_flow_to_its_end(flows: list[tuple[float, float, float]]) -> None:
    """(start, seconds alone, demand): no flow ends sooner than alone, and the link needs time for all of them."""
    env = simpy.Environment()
    link = Link(env)
    ends: list[tuple[int, float]] = []

    def begin(number: int, seconds: float, demand: float) -> None:
        link.start(Flow(seconds, demand, lambda: ends.append((number, env.now))))

    def sender(number: int, start: float, seconds: float, demand: float) -> Iterator[simpy.Event]:
        yield env.timeout(start)
        begin(number, seconds, demand)

    for number, flow in enumerate(flows):
        env.process(sender(number, *flow))  # type: ignore[arg-type]  # SimPy wants a Generator
    env.run()

    assert sorted(number for number, _ in ends) == list(range(len(flows)))
    assert all(end >= flows[number][0] + flows[number][1] - 1e-9 for number, end in ends)
    assert link.carried == pytest.approx(sum(seconds * demand for _, seconds, demand in flows))
    assert env.now >= min(start for start, *_ in flows) + link.carried - 1e-9


# An expert exchange between pairs of ranks


def exchange_seconds(sizes: FloatArray, bandwidth: float = 1.0) -> float:
    """Play an exchange flow by flow [from, to]; every rank has one link out and one in."""
    ranks = len(sizes)
    pairs = [(a, b) for a, b in itertools.product(range(ranks), repeat=2) if a != b and sizes[a, b] > 0]
    left = {pair: float(sizes[pair]) for pair in pairs}
    now = 0.0
    while left:
        rates = max_min_rates([[a, ranks + b] for a, b in left], [bandwidth] * 2 * ranks)
        passed = min(size / rate for size, rate in zip(left.values(), rates, strict=True))
        now += passed
        left = {
            pair: size - rate * passed
            for (pair, size), rate in zip(left.items(), rates, strict=True)
            if size - rate * passed > 1e-9 * float(sizes[pair])
        }
    return now


def busiest_seconds(sizes: FloatArray, bandwidth: float = 1.0) -> float:
    """The model of the engines: the busiest rank's busier direction on one link."""
    between = sizes * (1.0 - np.eye(len(sizes)))
    return float(max(between.sum(axis=1).max(), between.sum(axis=0).max())) / bandwidth


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_one_flow_for_each_rank_is_exact_when_all_are_loaded_alike(ranks: int) -> None:
    alike = np.full((ranks, ranks), 3.0)

    assert exchange_seconds(alike, 2.0) == pytest.approx(busiest_seconds(alike, 2.0))
    assert busiest_seconds(alike, 2.0) == 3.0 * (ranks - 1) / 2.0


def test_it_is_exact_when_one_rank_receives_more_from_everybody() -> None:
    sizes = np.ones((5, 5))
    sizes[:, 2] = 4.0

    assert exchange_seconds(sizes) == pytest.approx(busiest_seconds(sizes)) == pytest.approx(16.0)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1), st.floats(0.5, 4.0))
def test_pairs_are_never_faster_than_their_busiest_rank(ranks: int, seed: int, bandwidth: float) -> None:
    sizes = np.random.default_rng(seed).pareto(1.5, (ranks, ranks))

    assert exchange_seconds(sizes, bandwidth) >= busiest_seconds(sizes, bandwidth) * (1 - 1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_more_bytes_never_make_the_busiest_rank_faster(ranks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.0, 1.0, (ranks, ranks))

    assert busiest_seconds(sizes + rng.uniform(0.0, 1.0, sizes.shape)) >= busiest_seconds(sizes)
