"""Our action lists against those of PyTorch 2.13.0 and of DeepSeek's ``DualPipe.step``, action for action.

The tables are recorded by ``record_torch_schedules.py``, which also says what was dropped and repaired. Those of every
number of ranks from 2 to 16 are kept as digests. The files in ``dumps`` are as PyTorch's ``_dump_csv`` writes them:
compute only, and with communication.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from simulator import schedules
from validation.events.torch_tables import Table, digest, rows, tables, whole

FIXTURE = whole()
DUMPS = Path(__file__).parent / "dumps"


def label(case: dict[str, Any]) -> str:
    return f"{case['name']}-P{case['ranks']}-M{case['microbatches']}-v{case['virtual_stages']}"


def test_the_fixture_holds_every_schedule_of_the_pinned_torch() -> None:
    assert FIXTURE["torch"].split("+")[0] == "2.13.0"
    assert Counter(case["name"] for case in FIXTURE["cases"]) == {
        "gpipe": 4,
        "1f1b": 6,
        "interleaved": 10,
        "zb1p": 5,
        "zbv": 7,
        "dualpipev": 7,
        "dualpipe": 8,
    }


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=label)
def test_action_lists_are_equal_on_every_rank(case: dict[str, Any]) -> None:
    schedule = schedules.build(case["name"], case["ranks"], case["microbatches"], case["virtual_stages"])

    assert rows(schedule) == case["steps"]


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=label)
def test_recorded_tables_count_the_same_stages_and_microbatches(case: dict[str, Any]) -> None:
    """Guards the fixture: P ranks, and F once for each stage and microbatch."""
    chunks = 1 if case["name"] == "dualpipe" else case["virtual_stages"]
    forwards = sum(steps.count("F") - steps.count("OVERLAP_F_B") for steps in case["steps"])

    assert len(case["steps"]) == case["ranks"]
    assert forwards == case["ranks"] * chunks * case["microbatches"]


def test_the_tables_cover_two_to_sixteen_ranks() -> None:
    """DualPipe has even numbers of ranks; ZB-H2 has no table: neither PyTorch nor its authors publish one."""
    covered = {name: {table.ranks for table in tables() if table.name == name} for name in schedules.SCHEDULES}

    assert covered == {
        name: set() if name == "zbh2" else set(range(2, 17, 2 if name == "dualpipe" else 1))
        for name in schedules.SCHEDULES
    }
    assert len(tables()) == 533


@pytest.mark.parametrize("name", sorted({table.name for table in tables()}))
def test_action_lists_of_every_number_of_ranks_have_the_recorded_digests(name: str) -> None:
    assert [str(table) for table in tables() if table.name == name and not table.is_ours()] == []


def test_digests_tell_lists_apart() -> None:
    table = Table("1f1b", 2, 3, 1, digest(rows(schedules.build("1f1b", 2, 3))))

    assert table.is_ours()
    assert not table._replace(name="gpipe").is_ours()
    assert not table._replace(microbatches=4).is_ours()


@pytest.mark.parametrize(
    ("file", "name", "microbatches"),
    [
        ("interleaved-P2-M2-v2.csv", "interleaved", 2),
        ("interleaved-P2-M2-v2-comms.csv", "interleaved", 2),
        ("dualpipev-P2-M4-v2.csv", "dualpipev", 4),
    ],
)
def test_files_that_pytorch_writes_are_read(file: str, name: str, microbatches: int) -> None:
    found, built = schedules.read(DUMPS / file, 2, microbatches, 2), schedules.build(name, 2, microbatches, 2)

    assert (found.steps, found.placement) == (built.steps, built.placement)


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=label)
def test_recorded_lists_are_read_back_from_a_file(case: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "actions.csv"
    file.write_text("".join(f"{row.replace(' ', ',')}\n" for row in case["steps"]), encoding="utf-8")
    built = schedules.build(case["name"], case["ranks"], case["microbatches"], case["virtual_stages"])

    found = schedules.read(file, built.ranks, built.microbatches, built.stages // built.ranks)

    assert (found.steps, found.placement) == (built.steps, built.placement)
