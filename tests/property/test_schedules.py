"""Laws of pipeline schedules over their whole domain: complete, free of deadlock, and no more in flight than stated."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import errors, schedules
from simulator.schedules import Kind, Schedule
from validation.events.replay import Times, replay

KINDS: tuple[Kind, ...] = ("F", "I", "W", "B")


@st.composite
def built(draw: st.DrawFn) -> Schedule:
    """Draw a schedule from the domain of its kind."""
    name = draw(st.sampled_from(schedules.SCHEDULES))
    ranks, microbatches, virtual_stages = draw(st.integers(1, 8)), draw(st.integers(1, 24)), 1
    if name == "interleaved":
        virtual_stages = draw(st.integers(1, 4))
        microbatches = ranks * draw(st.integers(1, 4))
    elif name == "dualpipe":
        ranks = 2 * draw(st.integers(1, 5))
        microbatches = 2 * ranks + 2 * draw(st.integers(0, 8))
    elif name == "dualpipev":
        microbatches += 2 * ranks
    return schedules.build(name, ranks, microbatches, virtual_stages)


def expected_peaks(schedule: Schedule) -> tuple[int, ...]:
    """Peak activations by the closed forms of the papers."""
    p, m = schedule.ranks, schedule.microbatches
    v = schedule.stages // p
    return tuple(
        {
            "gpipe": m,
            "1f1b": min(p - rank, m),
            "interleaved": min(v * m, 2 * (p - 1 - rank) + (v - 1) * p + 1),
            "zb1p": min(p, m),
            "zbh2": min(2 * p - 1, m),
            "zbv": min(2 * p, 2 * m, m + 1 + rank),
            "dualpipe": p + 1,
            "dualpipev": 2 * p + 1,
        }[schedule.name]
        for rank in range(p)
    )


@settings(deadline=None, max_examples=200)
@given(built())
def test_schedules_are_complete_ordered_and_free_of_deadlock(schedule: Schedule) -> None:
    schedules.check(schedule)


@settings(deadline=None, max_examples=200)
@given(built())
def test_work_is_conserved(schedule: Schedule) -> None:
    """Every stage meets every microbatch: S x M forwards, as many input and as many weight gradients."""
    kinds = Counter(action.kind for rank in range(schedule.ranks) for action in schedule.actions(rank))
    everything = schedule.stages * schedule.microbatches

    assert kinds["F"] == everything
    assert kinds["B"] + kinds["I"] == everything
    assert kinds["I"] == kinds["W"]
    assert schedule.splits_backward == (kinds["I"] > 0)


@settings(deadline=None, max_examples=200)
@given(built())
def test_peak_activations_have_closed_forms(schedule: Schedule) -> None:
    assert schedules.in_flight(schedule) == expected_peaks(schedule)


@settings(deadline=None, max_examples=100)
@given(built())
def test_activations_are_never_negative_and_end_at_the_last_release(schedule: Schedule) -> None:
    """The first step holds the first forward's activation alone, the last step the one that it releases."""
    for rank in range(schedule.ranks):
        held = schedules.in_flight_by_stage(schedule, rank)

        assert held.shape == (len(schedule.steps[rank]), len(schedule.placement[rank]))
        assert held.min() >= 0
        assert held[0].sum() == held[-1].sum() == 1


@settings(deadline=None, max_examples=100)
@given(built())
def test_every_action_is_on_the_rank_that_holds_its_stage(schedule: Schedule) -> None:
    for rank in range(schedule.ranks):
        assert {schedule.rank_of(action.stage, action.microbatch) for action in schedule.actions(rank)} == {rank}
        assert {action.stage for action in schedule.actions(rank)} == set(schedule.placement[rank])


@settings(deadline=None, max_examples=100)
@given(built(), st.data())
def test_a_schedule_without_one_of_its_steps_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    gap = data.draw(st.integers(0, len(schedule.steps[rank]) - 1))
    rest = schedule.steps[rank][:gap] + schedule.steps[rank][gap + 1 :]
    broken = replace(schedule, steps=(*schedule.steps[:rank], rest, *schedule.steps[rank + 1 :]))

    with pytest.raises(ValueError) as caught:
        schedules.check(broken)

    # What is named is the missing action, or one of the same rank, stage and microbatch that now comes too early.
    assert f"{schedule.name}: rank {rank}, " in str(caught.value)
    stated = str(caught.value).split(": ")[1].split(", ")[1]
    lost = schedules.parts(schedule.steps[rank][gap])
    assert stated in {str(action._replace(kind=kind)) for action in lost for kind in KINDS}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 12), st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)))
def test_zbh2_idles_as_its_paper_says_where_w_is_the_shortest(
    ranks: int, more: int, times: tuple[int, int, int]
) -> None:
    """(P-1-r)(F+I-2W) inside a rank's own span, from M = 2P-1 on."""
    w = times[2]
    f, i = w + times[0], w + times[1]
    found = replay(schedules.build("zbh2", ranks, 2 * ranks - 1 + more), Times(f, i, w))

    assert found.span_bubble == pytest.approx([(ranks - 1 - rank) * (f + i - 2 * w) for rank in range(ranks)])
    assert max(found.makespan_bubble) == pytest.approx((ranks - 1) * max(f, f + i - 2 * w))


def written(schedule: Schedule, folder: str) -> Path:
    """Write the schedule as PyTorch writes its own, with a few cells that are skipped."""
    file = Path(folder) / "actions.csv"
    rows = [
        ["", *map(str, steps), f"{schedule.placement[rank][0]}REDUCE_GRAD"] for rank, steps in enumerate(schedule.steps)
    ]
    file.write_text("".join(",".join(row) + "\r\n" for row in rows), encoding="utf-8")
    return file


def of_file(schedule: Schedule) -> Schedule:
    with tempfile.TemporaryDirectory() as folder:
        chunks = schedule.stages // schedule.ranks
        return schedules.read(written(schedule, folder), schedule.ranks, schedule.microbatches, chunks)


@settings(deadline=None, max_examples=100)
@given(built())
def test_a_schedule_that_is_written_to_a_file_is_read_back(schedule: Schedule) -> None:
    assert replace(of_file(schedule), name=schedule.name) == schedule


@settings(deadline=None, max_examples=60)
@given(built(), st.data())
def test_a_file_without_one_of_its_steps_is_refused_with_its_line(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    gap = data.draw(st.integers(0, len(schedule.steps[rank]) - 1))
    rest = schedule.steps[rank][:gap] + schedule.steps[rank][gap + 1 :]
    broken = replace(schedule, steps=(*schedule.steps[:rank], rest, *schedule.steps[rank + 1 :]))

    with pytest.raises(errors.InvalidInput) as caught:
        of_file(broken)

    assert "actions.csv" in str(caught.value)
    assert "\n" not in str(caught.value)
