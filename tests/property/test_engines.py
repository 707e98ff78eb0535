"""One Program, two readers: the event engine and the max-plus recursion guard each other over random Programs.

* They agree to 1e-9 wherever no two transfers can meet on a link: every rank's communication on one in-order stream, or
  demands that fit side by side.
* Max-plus is never later, op by op: sharing can only slow transfers down, and the order of a stream never changes.
* Every rank as events of its own is an oracle for the vector clocks, and a batch gives what one evaluation gives.
* Work is conserved: a stream is busy for the sum of its ops, and a link carries what was put on it.

Steps of whole scenarios are in ``test_steps``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.events import evaluate, evaluate_batch, play, play_every_rank
from simulator.events.machine import _Machine
from simulator.events.network import fair_shares
from simulator.events.timeline import rows_of
from simulator.program import COMPUTE, EXPERT, GRADIENT, PIPELINE, Draft, Program
from simulator.timing import Bulk, Fixed, OpClass, Prices, Send

FloatArray = npt.NDArray[np.float64]
Played = tuple[Program, Prices]

TIERS = 2
COMMUNICATION = (EXPERT, PIPELINE, GRADIENT)


def classes(ordinal: int, kind: str) -> OpClass:
    """A class of its own per op: fixed work, a barrier over the lanes, a collective (barrier), or a message (none)."""
    if kind == "message":
        return Send(f"stack {ordinal}")
    if kind == "collective":
        return Bulk("all_reduce", "gradient", float(ordinal))
    return Fixed("barrier" if kind == "barrier" else f"work {ordinal}", float(ordinal))


@st.composite
def programs(draw: st.DrawFn, *, streams: tuple[int, ...] = COMMUNICATION, most_demand: float = 1.0) -> Played:
    """A random dependency graph over ranks and streams with random prices, rows (microbatches) and lanes."""
    ranks, lanes, rows = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    kinds = draw(
        st.lists(st.sampled_from(["work", "work", "barrier", "collective", "message"]), min_size=1, max_size=24)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    program = Draft(ranks)
    seconds, latency = np.zeros((len(kinds), rows, lanes)), np.zeros((len(kinds), rows))
    flows, demand = np.zeros((len(kinds), rows, TIERS)), np.ones((len(kinds), rows, TIERS))
    for ordinal, kind in enumerate(kinds):
        moves = kind in ("collective", "message")
        earlier = draw(st.sets(st.integers(0, ordinal - 1), max_size=3)) if ordinal else set()
        program.op(
            rank=draw(st.integers(0, ranks - 1)),
            stream=draw(st.sampled_from(streams)) if moves else COMPUTE,
            cls=classes(ordinal, kind),
            label=kind,
            after=earlier,
            microbatch=draw(st.integers(0, 3)),
        )
        if moves:
            latency[ordinal] = rng.choice([0.0, 0.5], size=rows)
            flows[ordinal] = rng.choice([0.0, 0.0, 1.0, 2.5], size=(rows, TIERS)) * rng.uniform(0.5, 1.5)
            demand[ordinal] = rng.uniform(0.2, 1.0, size=(rows, TIERS)) * most_demand
            seconds[ordinal] = (latency[ordinal] + flows[ordinal].max(-1))[:, None]
            if kind == "message":  # faster in some lanes
                seconds[ordinal, :, 1:] -= flows[ordinal].max(-1)[:, None] * rng.choice([0.0, 0.5], size=lanes - 1)
        else:
            seconds[ordinal] = rng.choice([0.0, 1.0, 3.0], size=(rows, lanes)) * rng.uniform(0.5, 1.5)
    finished = program.finish()
    noise = np.where((finished.stream == COMPUTE)[:, None], rng.uniform(0.5, 1.5, (len(kinds), lanes)), 1.0)
    prices = Prices(
        row=np.arange(len(kinds)) * rows,
        rows=np.full(len(kinds), rows),
        seconds=seconds.reshape(-1, lanes),
        latency=latency.ravel(),
        flow_seconds=flows.reshape(-1, TIERS),
        flow_demand=demand.reshape(-1, TIERS),
        share=np.ones((len(kinds), 1)),
        families=("work",),
        noise=noise if draw(st.booleans()) else None,
    )
    return finished, prices


def durations(case: Played) -> FloatArray:
    """Seconds of every op in every lane, alone."""
    program, prices = case
    seconds = prices.seconds[rows_of(program, prices)]
    return seconds if prices.noise is None else seconds * prices.noise


def assert_agreement(case: Played) -> None:
    """Vector clocks, separate ranks and the recursion end every op at the same time."""
    recursion = evaluate(*case)
    for events in (play(*case), play_every_rank(*case)):
        assert np.allclose(events.start, recursion.start, rtol=1e-9, atol=1e-9)
        assert np.allclose(events.end, recursion.end, rtol=1e-9, atol=1e-9)
        assert events.step_s == pytest.approx(recursion.step_s, rel=1e-9)


# Random Programs


@settings(deadline=None, max_examples=300)
@given(programs(streams=(EXPERT,)))
def test_the_engines_agree_where_each_rank_sends_one_thing_at_a_time(case: Played) -> None:
    assert_agreement(case)


@settings(deadline=None, max_examples=150)
@given(programs(most_demand=1.0 / len(COMMUNICATION)))
def test_the_engines_agree_where_all_transfers_fit_side_by_side(case: Played) -> None:
    """Three streams whose transfers ask for a third of the link or less."""
    assert_agreement(case)


@settings(deadline=None, max_examples=300)
@given(programs())
def test_max_plus_is_never_later_than_the_events(case: Played) -> None:
    recursion = evaluate(*case)
    for events in (play(*case), play_every_rank(*case)):
        assert (recursion.start <= events.start + 1e-9).all()
        assert (recursion.end <= events.end + 1e-9).all()


@settings(deadline=None, max_examples=200)
@given(programs())
def test_one_lane_as_separate_ranks_is_the_same_machine_links_and_all(case: Played) -> None:
    program, prices = case
    one = prices.slowest()

    assert np.allclose(play_every_rank(program, one).end, play(program, one).end, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=200)
@given(programs())
def test_every_op_starts_after_what_it_needs_and_takes_at_least_its_price(case: Played) -> None:
    program, prices = case
    for timeline in (play(*case), evaluate(*case), play_every_rank(*case)):
        for op in range(len(program)):
            needs = program.needs[program.start[op] : program.start[op + 1]]
            ready = timeline.end[needs].max(axis=0) if len(needs) else np.zeros(prices.lanes)
            expected = np.full(prices.lanes, ready.max()) if program.barrier[op] else ready
            assert timeline.start[op] == pytest.approx(expected)
        assert (timeline.end - timeline.start >= durations(case) - 1e-9).all()


@settings(deadline=None, max_examples=150)
@given(programs(), st.integers(0, 2**32 - 1))
def test_shorter_prices_never_end_later_in_max_plus(case: Played, seed: int) -> None:
    program, prices = case
    less = replace(prices, seconds=prices.seconds * np.random.default_rng(seed).uniform(0, 1, prices.seconds.shape))

    assert (evaluate(program, less).end <= evaluate(*case).end + 1e-12).all()


@settings(deadline=None, max_examples=100)
@given(programs())
def test_both_engines_are_deterministic(case: Played) -> None:
    assert play(*case).end.tobytes() == play(*case).end.tobytes()
    assert evaluate(*case).end.tobytes() == evaluate(*case).end.tobytes()


@settings(deadline=None, max_examples=150)
@given(programs())
def test_a_stream_is_busy_for_the_sum_of_its_ops(case: Played) -> None:
    """Kernels take what they cost, in order and one at a time, on every rank and in every lane."""
    program, _ = case
    for timeline in (play(*case), evaluate(*case), play_every_rank(*case)):
        for rank in range(program.ranks):
            ops = np.flatnonzero((program.rank == rank) & (program.stream == COMPUTE))
            busy = timeline.end[ops] - timeline.start[ops]
            assert busy.sum(axis=0) == pytest.approx(durations(case)[ops].sum(axis=0))
            assert (timeline.start[ops[1:]] >= timeline.end[ops[:-1]] - 1e-9).all()


@settings(deadline=None, max_examples=150)
@given(programs())
def test_a_link_carries_what_was_put_on_it(case: Played) -> None:
    program, prices = case
    machine = _Machine(program, prices)
    machine.env.run()
    rows, moves = rows_of(program, prices), np.array(machine.moves)
    for (rank, tier), link in machine.links.items():
        here = rows[moves & (program.rank == rank)]
        assert link.carried == pytest.approx((prices.flow_seconds * prices.flow_demand)[here, tier].sum())
        assert not link.flows


@settings(deadline=None, max_examples=150)
@given(programs(streams=(EXPERT,)), st.floats(0.1, 1.0))
def test_more_bandwidth_never_ends_later_where_no_link_is_shared(case: Played, factor: float) -> None:
    program, prices = case
    flows = prices.flow_seconds * factor
    gain = prices.flow_seconds.max(axis=1) - flows.max(axis=1)
    faster = replace(prices, flow_seconds=flows, seconds=np.maximum(prices.seconds - gain[:, None], 0.0))
    for engine in (play, evaluate, play_every_rank):
        assert (engine(program, faster).end <= engine(program, prices).end + 1e-9).all()


@settings(deadline=None, max_examples=100)
@given(programs(), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_batch_gives_what_one_evaluation_gives(case: Played, count: int, seed: int) -> None:
    """Also where lanes differ only from some scenario on, and where kernels jitter."""
    program, prices = case
    rng = np.random.default_rng(seed)
    even = replace(prices, seconds=np.repeat(prices.seconds[:, :1], prices.lanes, axis=1), noise=None)
    tables = [replace(even, seconds=even.seconds * rng.uniform(0.5, 2.0))]
    tables += [
        replace(prices, seconds=prices.seconds * rng.uniform(0.5, 2.0, prices.seconds.shape)) for _ in range(count)
    ]
    tables += [replace(tables[-1], noise=None), prices, even]

    found = evaluate_batch(program, iter(tables))
    assert found.tolist() == pytest.approx([evaluate(program, each).step_s for each in tables], rel=1e-12, abs=1e-12)
    assert evaluate_batch(program, []).tolist() == []


@settings(deadline=None, max_examples=150)
@given(programs(streams=(EXPERT,)), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_batch_under_jitter_gives_what_the_engines_give(case: Played, count: int, seed: int) -> None:
    """Of one noise, of an equal copy of it, of another noise and of none; prices even at first or over all lanes."""
    program, prices = case
    rng = np.random.default_rng(seed)
    touched = rng.random((len(program), 1)) < 0.7
    noise, other = (np.where(touched, rng.uniform(0.5, 1.5, (len(program), prices.lanes)), 1.0) for _ in range(2))
    moves = np.zeros(len(prices.seconds), dtype=bool)
    moves[rows_of(program, prices)[program.stream != COMPUTE]] = True
    noise[program.stream != COMPUTE] = other[program.stream != COMPUTE] = 1.0
    even = np.where(moves[:, None], prices.seconds, prices.seconds[:, :1])
    computed = np.where(moves, 1.0, rng.uniform(0.5, 2.0, (count, len(moves))))
    tables = [replace(prices, seconds=even * factor[:, None], noise=noise) for factor in computed]
    tables += [replace(prices, noise=noise), replace(prices, noise=noise.copy()), replace(prices, noise=other)]
    tables += [replace(prices, noise=None), tables[0]]

    found = evaluate_batch(program, iter(tables)).tolist()
    assert found == pytest.approx([evaluate(program, each).step_s for each in tables], rel=1e-12, abs=1e-12)
    assert found == pytest.approx([play(program, each).step_s for each in tables], rel=1e-9, abs=1e-9)


def test_a_batch_in_many_blocks_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft(1)
    for ordinal in range(3):
        draft.op(rank=0, stream=COMPUTE, cls=Fixed(f"work {ordinal}", 1.0), label="work", after=())
    program = draft.finish()
    ones, none = np.ones(3, dtype=np.int64), np.zeros((3, 1))
    base = Prices(np.arange(3), ones, none + 1.0, none[:, 0], none, none + 1.0, none + 1.0, ("work",))
    tables = [replace(base, seconds=base.seconds * factor) for factor in range(100)]
    monkeypatch.setattr("simulator.events.batch.BLOCK", 7)

    assert evaluate_batch(program, tables).tolist() == [3.0 * factor for factor in range(100)]
    noise = np.array([[1.0], [2.0], [0.5]])
    jittery = [replace(each, noise=noise if number != 50 else None) for number, each in enumerate(tables)]
    factors = [3.5 if number != 50 else 3.0 for number in range(100)]
    assert evaluate_batch(program, jittery).tolist() == [factor * number for number, factor in enumerate(factors)]
    with pytest.raises(ValueError, match="same rows and lanes"):
        evaluate_batch(program, [base, replace(base, seconds=np.ones((3, 2)))])


def test_messages_of_one_lane_share_its_link_alone() -> None:
    """Two lanes, a message of 2 s that one of them sends 1 s later, beside a collective of 3 s over both.

    As separate ranks: lane 0 shares from 0 s on, each of the two at half its rate, so that its message ends at 4 s.
    Lane 1 shares from 1 s on: the collective has 2 s left there, and both end at 5 s. So does the collective.
    """
    draft = Draft(1)
    draft.op(rank=0, stream=COMPUTE, cls=Fixed("work", 1.0), label="work", after=())
    draft.op(rank=0, stream=GRADIENT, cls=Bulk("all_reduce", "gradient", 1.0), label="reduce", after=())
    draft.op(rank=0, stream=PIPELINE, cls=Send("decoder"), label="send", after=[0])
    program = draft.finish()
    seconds, flows = np.array([[0.0, 1.0], [3.0, 3.0], [2.0, 2.0]]), np.array([[0.0], [3.0], [2.0]])
    ones, none = np.ones(3, dtype=np.int64), np.zeros(3)
    prices = Prices(np.arange(3), ones, seconds, none, flows, np.ones((3, 1)), np.ones((3, 1)), ("work",))

    assert play_every_rank(program, prices).end.tolist() == [[0.0, 1.0], [5.0, 5.0], [4.0, 5.0]]
    assert evaluate(program, prices).end.tolist() == [[0.0, 1.0], [3.0, 3.0], [2.0, 3.0]]


def test_nothing_to_wait_for_and_nothing_to_do() -> None:
    """One op without a price: it begins and ends at once, as does a message without latency and bytes."""
    for stream, cls in ((COMPUTE, Fixed("work", 0.0)), (PIPELINE, Send("decoder"))):
        draft = Draft(1)
        draft.op(rank=0, stream=stream, cls=cls, label="nothing", after=())
        none, ones = np.zeros((1, 1)), np.ones((1, 1))
        prices = Prices(np.array([0]), np.array([1]), none, none[0], none, ones, ones, ("work",))
        for engine in (play, evaluate, play_every_rank):
            assert engine(draft.finish(), prices).end.tolist() == [[0.0]]


def test_a_cycle_is_a_deadlock_for_separate_ranks_too() -> None:
    draft = Draft(1)
    for ordinal in range(2):
        draft.op(rank=0, stream=EXPERT, cls=Fixed(f"work {ordinal}", 1.0), label=f"op {ordinal}", after=())
    draft.depend(np.array([0]), np.array([1]))
    none, ones = np.zeros((2, 1)), np.ones((2, 1))
    prices = Prices(np.arange(2), np.ones(2, dtype=np.int64), ones, none[:, 0], none, ones, ones, ("work",))
    for engine in (play, play_every_rank):
        with pytest.raises(ValueError, match="deadlock: first on rank 0: op 0"):
            engine(draft.finish(), prices)


def test_two_transfers_on_one_link_take_turns_in_rate_and_two_links_do_not() -> None:
    """Demands 0.6 and 1.0 of one link for 6 s each: shares 0.5 and 0.5 until the first has its bytes, then alone.

    The first runs at 5/6 of its rate and ends at 7.2 s; the second has then done 3.6 of 6 s and ends at 9.6 s.
    """

    def pair(tiers: tuple[int, int]) -> Played:
        draft = Draft(1)
        for ordinal, stream in enumerate((EXPERT, GRADIENT)):
            draft.op(rank=0, stream=stream, cls=Send(f"stack {ordinal}"), label="send", after=())
        flows = np.zeros((2, TIERS))
        flows[[0, 1], list(tiers)] = 6.0
        demand = np.array([[0.6] * TIERS, [1.0] * TIERS])
        ones, none = np.ones(2, dtype=np.int64), np.zeros(2)
        return draft.finish(), Prices(
            np.arange(2), ones, flows.max(-1)[:, None], none, flows, demand, np.ones((2, 1)), ("work",)
        )

    assert play(*pair((0, 0))).end.ravel().tolist() == pytest.approx([7.2, 9.6])
    assert play(*pair((0, 1))).end.ravel().tolist() == pytest.approx([6.0, 6.0])
    assert evaluate(*pair((0, 0))).end.ravel().tolist() == [6.0, 6.0]


# Sharing one link


DEMANDS = st.lists(st.floats(0.01, 2.0), min_size=1, max_size=8)


@settings(max_examples=300)
@given(DEMANDS, st.floats(0.1, 3.0))
def test_fair_shares_use_the_whole_link_or_satisfy_everyone(demands: list[float], capacity: float) -> None:
    shares = fair_shares(demands, capacity)

    assert sum(shares) == pytest.approx(min(capacity, sum(demands)))
    assert all(share <= demand + 1e-12 for share, demand in zip(shares, demands, strict=True))


@settings(max_examples=300)
@given(DEMANDS, st.floats(0.1, 3.0))
def test_nobody_could_get_more_without_taking_from_someone_who_has_less(demands: list[float], capacity: float) -> None:
    """Max-min: who does not get all it asks for has as much as anybody."""
    shares = fair_shares(demands, capacity)
    unmet = [share for share, demand in zip(shares, demands, strict=True) if share < demand - 1e-9]

    assert all(share == pytest.approx(max(shares)) for share in unmet)
    assert all(
        share >= min(demand, capacity / len(demands)) - 1e-12 for share, demand in zip(shares, demands, strict=True)
    )


@settings(max_examples=200)
@given(DEMANDS, st.randoms(use_true_random=False))
def test_fair_shares_do_not_depend_on_the_order(demands: list[float], random: Any) -> None:
    order = list(range(len(demands)))
    random.shuffle(order)
    shares, shuffled = fair_shares(demands), fair_shares([demands[index] for index in order])

    assert shuffled == pytest.approx([shares[index] for index in order])


@settings(max_examples=200)
@given(DEMANDS, st.floats(0.01, 2.0))
def test_another_flow_never_gives_more_to_those_already_there(demands: list[float], newcomer: float) -> None:
    before, after = fair_shares(demands), fair_shares([*demands, newcomer])

    assert all(now <= then + 1e-12 for now, then in zip(after, before, strict=False))
