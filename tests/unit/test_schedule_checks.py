"""Validation of the schedules: every stated number is met, and what stands only for the record is known."""

from __future__ import annotations

from typing import Any

import pytest

from validation.checks import summary
from validation.events import schedules, torch_tables


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return list(schedules.checks())


def test_every_check_of_the_schedules_holds(found: list[dict[str, Any]]) -> None:
    counts = summary(found)

    assert set(counts) == {"schedules"}
    assert counts["schedules"]["missed"] == []
    assert counts["schedules"]["ok"] + counts["schedules"]["for_the_record"] == len(found) > 200


def test_only_other_orders_and_an_unpublished_rule_stand_for_the_record(found: list[dict[str, Any]]) -> None:
    assert {check["name"]: (check["expected"], check["reached"]) for check in found if check["ok"] is None} == {
        "bubble of the own span: zbv, P 8, M 24, F I W 10 13 8, other order": (62.0, 70.0),
        "bubble of the own span: zbh2, P 8, M 24, F I W 10 13 8, other order": (41.0, 49.0),
        "latency of messages: dualpipe, P 8, M 32": (41.0, 37.0),
        "latency of messages: dualpipe, P 16, M 120": (149.0, 133.0),
    }


def test_names_are_unique_and_every_check_has_a_source(found: list[dict[str, Any]]) -> None:
    names = [check["name"] for check in found]

    assert len(set(names)) == len(names)
    assert all(check["source"] for check in found)


def test_every_recorded_list_is_compared(found: list[dict[str, Any]]) -> None:
    compared = [check["reached"] for check in found if check["name"].startswith("lists equal")]

    assert sum(compared) == len(torch_tables.tables())
    assert len(compared) == 7
