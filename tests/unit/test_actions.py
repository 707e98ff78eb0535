"""A played step by the actions of its schedule: lone passes, pairs, bubbles in both notions.

Bubbles of fixed durations: (P-1)(F+B) for 1F1B and (P-1)(F+I-W) for ZB1P of the makespan (arXiv 2401.10241, Table 2);
of the span they fall by one share from rank to rank, because every rank starts and ends later than the one before.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from simulator import schedules
from simulator.events import ACTIONS, BUBBLE, Timeline, action_ledger, bubbles, by_action, evaluate, spans
from simulator.events.actions import steps_of
from simulator.program import COMPUTE, Draft
from simulator.schedules import Action, Overlapped, Schedule, parts
from simulator.timing import Fixed, Prices
from tests.scenarios import SCHEDULES, played

SECONDS = {"F": 10.0, "I": 13.0, "W": 8.0}
EQUAL = dict.fromkeys("FIW", 10.0)


def replayed(schedule: Schedule, seconds: dict[str, float]) -> Timeline:
    """One kernel per pass, one after the other; ranks wait for each other, and for all at the end."""
    draft, done = Draft(schedule.ranks), dict[Action, int]()
    left = [list(steps) for steps in schedule.steps]
    ready: list[list[int]] = [[] for _ in left]

    def needs(stage: int, kind: str, microbatch: int) -> list[Action]:
        if kind == "F":
            return [Action(stage - 1, "F", microbatch)] if stage else []
        if kind == "W":
            return [Action(stage, "I", microbatch)]
        following = [Action(stage + 1, "I", microbatch)] if stage < schedule.stages - 1 else []
        return [Action(stage, "F", microbatch), *following]

    while any(left):
        for rank, steps in enumerate(left):
            while steps and all(need in done for each in parts(steps[0]) for need in needs(*each)):
                for stage, kind, microbatch in parts(steps.pop(0)):
                    for each in kind.replace("B", "IW"):
                        number = draft.op(
                            rank=rank,
                            stream=COMPUTE,
                            cls=Fixed(each, seconds[each]),
                            label=f"{each} dense",
                            after=[done[need] for need in needs(stage, kind, microbatch)],
                            microbatch=microbatch,
                            stage=stage,
                        )
                        ready[rank].append(number)
                    done[Action(stage, "I" if kind == "B" else kind, microbatch)] = number  # sent when B is complete
    last = [ops[-1] for ops in ready]
    for rank in range(schedule.ranks):
        draft.op(rank=rank, stream=COMPUTE, cls=Fixed("barrier", 0.0), label="end of step", after=last)
    program = draft.finish()
    cost = np.array([[each.seconds] for each in program.classes if isinstance(each, Fixed)])
    none, count = np.zeros_like(cost), len(cost)
    ones = np.ones(count, dtype=np.int64)
    prices = Prices(np.arange(count), ones, cost, none[:, 0], none, none + 1.0, none + 1.0, ("work",))
    return evaluate(program, prices)


@pytest.mark.parametrize(
    ("name", "seconds", "makespan", "whole", "within"),
    [
        ("1f1b", EQUAL, 330.0, 90.0, [90.0, 60.0, 30.0, 0.0]),
        ("zb1p", EQUAL, 270.0, 30.0, [30.0, 20.0, 10.0, 0.0]),
        ("zb1p", SECONDS, 293.0, 45.0, None),
    ],
)
def test_both_bubbles_of_four_ranks_and_eight_microbatches(
    name: Any, seconds: dict[str, float], makespan: float, whole: float, within: list[float] | None
) -> None:
    timeline = replayed(schedules.build(name, 4, 8), seconds)
    of_makespan, of_span = bubbles(timeline)
    assert timeline.step_s == makespan
    assert of_makespan.tolist() == pytest.approx([whole] * 4)
    if within is not None:
        assert of_span.tolist() == pytest.approx(within)
    assert (of_span <= of_makespan).all()


def test_lone_passes_by_kind_of_action() -> None:
    """B unsplit is its I and its W; eight microbatches of one stage per rank."""
    for name in ("1f1b", "zb1p"):
        schedule = schedules.build(name, 4, 8)
        timeline = replayed(schedule, SECONDS)
        terms = by_action(timeline, schedule)
        assert {key: values.ravel().tolist() for key, values in terms.items() if key != BUBBLE} == {
            "1F": [80.0] * 4,
            "1B": [104.0] * 4,
            "1W": [64.0] * 4,
        }
        assert action_ledger(timeline, schedule).total == pytest.approx(timeline.step_s)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: str(each["schedule"]))
@pytest.mark.parametrize("changes", [{}, {"parallelism.zero_stage": 3}, {"parallelism.overlap": []}], ids=str)
def test_kinds_of_action_sum_to_the_step_on_every_rank_and_lane(schedule: Any, changes: dict[str, Any]) -> None:
    step = played(schedule, **changes)
    terms = by_action(step.timeline, step.schedule)
    assert set(terms) <= set(ACTIONS)
    assert all((values >= -1e-12).all() for values in terms.values())
    total = np.asarray(sum(terms.values()))
    assert total == pytest.approx(np.full(total.shape, step.seconds), rel=1e-9)
    assert ("1F1B" in terms) == schedule["schedule"].startswith("dualpipe")
    makespan, span = bubbles(step.timeline)
    assert makespan.mean() == pytest.approx(step.timeline.breakdown.get(BUBBLE, 0.0))
    assert (span <= makespan + 1e-12).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: str(each["schedule"]))
def test_the_steps_of_a_rank_follow_each_other(schedule: Any) -> None:
    step = played(schedule, "events")
    found = spans(step.timeline, step.schedule)
    assert [len(span) for span in found] == [len(steps) for steps in step.schedule.steps]
    for span in found:
        assert (span[:, 1] >= span[:, 0]).all()
        assert all(after[0] >= before[1] for before, after in pairwise(span))
        assert (span >= 0.0).all()
        assert span.max() <= step.seconds


def test_every_kernel_of_an_action_belongs_to_its_step() -> None:
    step = played({"schedule": "dualpipe"})
    program, number = step.program, steps_of(step.program, step.schedule)
    listed = [(rank, each) for rank, steps in enumerate(step.schedule.steps) for each in steps]
    kernels = np.flatnonzero((program.stream == COMPUTE) & (number < 0))
    ends = {"optimizer", "step overhead", "end of step", "wait for replicas"}
    assert {program.labels[label] for label in program.label[kernels]} <= ends
    seen = set()
    for op in np.flatnonzero(number >= 0).tolist():
        rank, each = listed[number[op]]
        assert rank == program.rank[op]
        assert (program.stage[op], program.microbatch[op]) in {(a.stage, a.microbatch) for a in parts(each)}
        seen.add(int(number[op]))
    assert len(seen) == len(listed)
    assert any(isinstance(each, Overlapped) for _, each in listed)
