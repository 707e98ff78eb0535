"""What a schedule is worth when it is played: makespans and bubbles of every pipeline schedule, in both engines.

Each schedule is replayed with fixed durations (``validation.events.replay``), which also says how its two bubbles are
counted: of the makespan, and of a rank's own span, the notion of the zero-bubble papers.

Expected values: (P-1)(F+B) and (P-1)(F+I-W) are Table 2 of arXiv 2401.10241 and of arXiv 2412.19437, (P/2-1)(F&B+B-3W)
is DualPipe's (arXiv 2412.19437, Table 2); the rest were measured by replaying the action lists of PyTorch 2.13.0
(torch.distributed.pipelining.schedules) and of deepseek-ai/DualPipe @ 3da1bbe.
"""

from __future__ import annotations

import numpy as np
import pytest

from simulator import schedules
from simulator.events import BUBBLE, evaluate, play
from simulator.program import COMPUTE, Draft
from simulator.schedules import Action
from simulator.timing import Fixed
from validation.events import latencies
from validation.events.replay import Engine, Replayed, Times, played, price, replay
from validation.events.schedules import DUALPIPE_BUBBLES

ENGINES = pytest.mark.parametrize("engine", [play, evaluate], ids=["events", "max-plus"])


def makespan(
    engine: Engine, name: str, ranks: int, microbatches: int, chunks: int = 1, times: Times | None = None
) -> float:
    return played(schedules.build(name, ranks, microbatches, chunks), times, engine).step_s


# Equal times: 4 ranks, 8 microbatches, F = I = W = 10


@ENGINES
def test_the_makespans_and_bubbles_of_four_ranks_and_eight_microbatches(engine: Engine) -> None:
    """Zero-bubble schedules keep a fill of 30 = (P-1) F in the makespan although each rank alone never waits."""
    names = ("gpipe", "1f1b", "zb1p", "zbh2", "zbv")
    found = {name: replay(schedules.build(name, 4, 8), engine=engine) for name in names}

    assert found == {
        "gpipe": Replayed(330, [90, 90, 90, 90], [90, 60, 30, 0], [8, 8, 8, 8]),
        "1f1b": Replayed(330, [90, 90, 90, 90], [90, 60, 30, 0], [4, 3, 2, 1]),
        "zb1p": Replayed(270, [30, 30, 30, 30], [30, 20, 10, 0], [4, 4, 4, 4]),
        "zbh2": Replayed(270, [30, 30, 30, 30], [0, 0, 0, 0], [7, 7, 7, 7]),
        "zbv": Replayed(510, [30, 30, 30, 30], [0, 0, 0, 0], [8, 8, 8, 8]),
    }


@ENGINES
@pytest.mark.parametrize(
    ("ranks", "chunks", "microbatches", "expected"), [(4, 2, 8, 570), (8, 2, 16, 1170), (8, 4, 16, 2130)]
)
def test_interleaving_divides_the_bubble_by_the_chunks(
    engine: Engine, ranks: int, chunks: int, microbatches: int, expected: float
) -> None:
    """(P-1)(F+B) of a chunk: 90 of 570, 210 of 1170 and of 2130."""
    assert (
        makespan(engine, "interleaved", ranks, microbatches, chunks)
        == expected
        == 30 * chunks * microbatches + 30 * (ranks - 1)
    )


# Closed forms, unequal times too


@ENGINES
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("times", [Times(), Times(10, 13, 8), Times(7, 9, 3)])
def test_1f1b_and_gpipe_wait_for_p_minus_1_forwards_and_backwards(engine: Engine, ranks: int, times: Times) -> None:
    work = 3 * ranks * (times.f + times.i + times.w)
    expected = work + (ranks - 1) * (times.f + times.i + times.w)

    assert [makespan(engine, name, ranks, 3 * ranks, times=times) for name in ("1f1b", "gpipe")] == [expected] * 2


@ENGINES
@pytest.mark.parametrize(
    ("ranks", "microbatches", "times", "expected"),
    [(4, 8, Times(), 270), (4, 8, Times(10, 13, 8), 293), (8, 24, Times(10, 13, 8), 24 * 31 + 105)],
)
def test_zb1p_waits_for_p_minus_1_times_f_plus_i_minus_w(
    engine: Engine, ranks: int, microbatches: int, times: Times, expected: float
) -> None:
    bubble = (ranks - 1) * (times.f + times.i - times.w)

    assert makespan(engine, "zb1p", ranks, microbatches, times=times) == expected
    assert expected == microbatches * (times.f + times.i + times.w) + bubble


@ENGINES
def test_bubbles_of_eight_ranks_with_unequal_times(engine: Engine) -> None:
    """F, I, W = 10, 13, 8 and 24 microbatches: of the makespan, and at most of a rank's own span."""
    names = ("1f1b", "zb1p", "zbh2", "zbv")
    found = {name: replay(schedules.build(name, 8, 24), Times(10, 13, 8), engine) for name in names}

    assert {name: (max(each.makespan_bubble), max(each.span_bubble)) for name, each in found.items()} == {
        "1f1b": (217, 217),
        "zb1p": (105, 105),
        "zbh2": (70, 49),
        "zbv": (91, 70),
    }


@ENGINES
@pytest.mark.parametrize("times", [Times(), Times(10, 13, 8), Times(8, 7, 3), Times(5, 12, 5)])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 3), (4, 7), (4, 8), (8, 24), (16, 31)])
def test_zbh2_idles_p_minus_1_times_f_plus_i_minus_2w_in_its_own_span(
    engine: Engine, ranks: int, microbatches: int, times: Times
) -> None:
    """Arxiv 2401.10241, Table 2, from M = 2P-1 on; the makespan keeps a fill of (P-1)F at least."""
    found = replay(schedules.build("zbh2", ranks, microbatches), times, engine)
    left = times.f + times.i - 2 * times.w

    assert found.span_bubble == pytest.approx([(ranks - 1 - rank) * left for rank in range(ranks)])
    assert found.makespan_bubble == pytest.approx([(ranks - 1) * max(times.f, left)] * ranks)


# DualPipe


@ENGINES
@pytest.mark.parametrize(("ranks", "microbatches", "times", "bubble", "formula"), DUALPIPE_BUBBLES)
def test_dualpipes_formula_is_exact_for_equal_times_and_a_bound_otherwise(
    engine: Engine, ranks: int, microbatches: int, times: Times, bubble: float, formula: float
) -> None:
    found = replay(schedules.build("dualpipe", ranks, microbatches), times, engine)

    assert max(found.makespan_bubble) == bubble
    assert formula == (ranks // 2 - 1) * (times.pair + times.i + times.w - 3 * times.w)
    assert bubble <= formula
    assert (bubble == formula) == (times.f == times.i == times.w)


@ENGINES
def test_the_outer_ranks_of_dualpipe_idle_less_when_pairs_gain_time(engine: Engine) -> None:
    found = replay(schedules.build("dualpipe", 8, 32), Times(10, 10, 10, 24), engine)

    assert found.makespan_bubble == [30, 36, 42, 42, 42, 42, 36, 30]


@ENGINES
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_dualpipev_has_the_bubble_of_dualpipe_on_half_of_the_ranks(
    engine: Engine, ranks: int, microbatches: int
) -> None:
    """(P-1)(F&B+B-3W) with P ranks of two chunks each: 30 - 10 for every rank but the last, F = I = W and F&B = 30."""
    found = replay(schedules.build("dualpipev", ranks, microbatches), engine=engine)

    assert max(found.makespan_bubble) == (ranks - 1) * (30 + 20 - 30)
    assert found.makespan == 60 * microbatches + (ranks - 1) * 20


# Messages between ranks


@ENGINES
@pytest.mark.parametrize(("ranks", "by_microbatches"), latencies.GROWING.items())
def test_latency_grows_with_the_microbatches_in_1f1b(
    engine: Engine, ranks: int, by_microbatches: dict[int, float]
) -> None:
    """P microbatches in flight just cover the round trip: every P microbatches 2(P-1) latencies come on top."""
    found = {
        count: makespan(engine, "1f1b", ranks, count, times=Times(message=1)) - makespan(engine, "1f1b", ranks, count)
        for count in by_microbatches
    }

    assert found == by_microbatches
    assert found == {count: 2 * (ranks - 1) * count // ranks + 2 * (ranks - 2) for count in by_microbatches}


@ENGINES
@pytest.mark.parametrize(("name", "chunks", "form", "by_ranks"), latencies.PAID_ONCE)
def test_latency_is_paid_once_where_more_is_in_flight(
    engine: Engine, name: str, chunks: int, form: str, by_ranks: dict[int, float]
) -> None:
    """2(vP-1) for interleaving, 4(P-1) for ZB1P, whatever the number of microbatches."""
    for ranks, extra in by_ranks.items():
        for microbatches in (2 * ranks, 4 * ranks):
            slow = makespan(engine, name, ranks, microbatches, chunks, Times(message=1))
            assert slow - makespan(engine, name, ranks, microbatches, chunks) == extra, form


# The account of a played step


@ENGINES
def test_every_rank_accounts_for_the_whole_step_when_a_barrier_ends_it(engine: Engine) -> None:
    """1F1B of four ranks: 240 of work, 90 of bubble on each, with a barrier at the end."""
    schedule, times = schedules.build("1f1b", 4, 8), Times()
    draft = Draft(4)
    made: dict[Action, int] = {}
    order = {rank: list(schedule.actions(rank)) for rank in range(4)}
    while any(order.values()):
        for rank, left in order.items():
            while left and all(need in made for need in _inputs(left[0])):
                action = left.pop(0)
                cls = Fixed("work", times.of(action))
                after = [made[need] for need in _inputs(action)]
                made[action] = draft.op(rank=rank, stream=COMPUTE, cls=cls, label=str(action), after=after)
    for rank in range(4):
        draft.op(rank=rank, stream=COMPUTE, cls=Fixed("work", 0.0), label="end", after=made.values())
    program = draft.finish()
    timeline = engine(program, price(program))

    assert {name: values.ravel().tolist() for name, values in timeline.by_rank.items()} == {
        "work": [240.0] * 4,
        BUBBLE: [90.0] * 4,
    }
    assert dict(timeline.breakdown) == {"work": 240.0, BUBBLE: 90.0}
    assert timeline.step_s == 330.0


def _inputs(action: Action) -> list[Action]:
    stage, kind, microbatch = action
    if kind == "F":
        return [Action(stage - 1, "F", microbatch)] if stage else []
    return [Action(stage + 1, "B", microbatch)] if stage < 3 else [Action(stage, "F", microbatch)]


@ENGINES
def test_a_cycle_of_waiting_ranks_is_reported_as_a_deadlock(engine: Engine) -> None:
    """Two ranks that each await the other's second op before their first."""
    draft = Draft(2)
    ops = [draft.op(rank=r, stream=COMPUTE, cls=Fixed("work", 1.0), label=f"op {r}", after=()) for r in (0, 0, 1, 1)]
    draft.depend(np.array([ops[0], ops[2]]), np.array([ops[3], ops[1]]))
    program = draft.finish()

    with pytest.raises(ValueError, match="deadlock"):
        engine(program, price(program))
