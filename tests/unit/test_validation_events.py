"""The checks of the event room: all rooms are asked, what is static holds, and directions point where they should."""

from __future__ import annotations

import itertools

import pytest

from validation import events
from validation.checks import at_most
from validation.events import directions, static, steps


def test_what_a_step_rests_on_holds() -> None:
    found = list(static.checks())
    assert [check["name"] for check in found if check["ok"] is not True] == []
    assert {check["group"] for check in found} == {"static"}


def test_directions_hold_where_a_small_job_shows_them() -> None:
    found = list(directions._mixtral())
    assert len(found) == 6
    assert [check["name"] for check in found if check["ok"] is not True] == []


def test_the_parts_of_deepseeks_step_are_its_published_step() -> None:
    """Table 4 of arXiv 2505.09343 sums to 19.90 s beside a step of 19.926 s."""
    assert sum(steps.PARTS.values()) == pytest.approx(steps.STEP_S, rel=2e-3)


def test_the_baseline_and_other_splits_are_for_the_record_and_the_step_is_judged() -> None:
    found = {check["name"]: check for check in steps.checks()}
    judged = [name for name, check in found.items() if check["ok"] is not None]
    assert judged == ["step", "absolute errors of the parts together"]
    assert found["the same at the constant MFU of DeepSeek-67B"]["reached"] == pytest.approx(179.4e3, rel=0.01)
    parts = sum(check["reached"] for name, check in found.items() if name.startswith("part "))
    assert parts == pytest.approx(found["step"]["reached"])


def test_every_room_is_asked_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    number = itertools.count()
    for room in events.ROOMS:
        monkeypatch.setattr(room, "checks", lambda: [at_most("g", str(next(number)), 1.0, 0.0, "", "")])
    assert [check["name"] for check in events.judge()] == [str(index) for index in range(len(events.ROOMS))]
