"""Schedules from files: the same step as the schedule of the same lists, wherever the lists come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator import load_scenario, schedules, simulate_step
from simulator.campaign import Step
from simulator.layout import resolve
from simulator.program import schedule_of
from simulator.schedules import Schedule
from validation.events.torch_tables import whole

Run = Callable[..., tuple[int, str, str]]


def small(**parallelism: Any) -> dict[str, Any]:
    """Twelve layers on four pipeline ranks of two expert-parallel members; eight microbatches per pipeline."""
    return {
        "name": "small",
        "model": {
            "name": "small",
            "layers": 12,
            "hidden_size": 256,
            "vocabulary_size": 1000,
            "context": 512,
            "mixer": {"kind": "mha", "heads": 4, "head_dim": 64},
            "moe": {"experts": 8, "top_k": 2, "expert_ffn_size": 512},
        },
        "cluster": {"profile": "h100-sxm", "accelerators": 8},
        "parallelism": {"pipeline": 4, "expert": 2, **parallelism},
        "training": {"tokens": "1B", "sequence_length": 512, "global_batch_sequences": 16},
    }


def written(folder: Path, schedule: Schedule) -> str:
    return listed(folder, [" ".join(map(str, steps)) for steps in schedule.steps])


def listed(folder: Path, rows: list[str], name: str = "actions.csv") -> str:
    file = folder / name
    file.write_text("".join(f"{row.replace(' ', ',')}\n" for row in rows), encoding="utf-8")
    return str(file)


def step(**parallelism: Any) -> Step:
    return simulate_step(load_scenario(small(**parallelism)))


def same(found: Step, expected: Step) -> None:
    """The same order, the same program, the same time, and the same memory."""
    assert replace(found.schedule, name=expected.schedule.name) == expected.schedule
    assert (found.layout.overlap, found.layout.stage_replicas) == (
        expected.layout.overlap,
        expected.layout.stage_replicas,
    )
    for column in ("rank", "stream", "cls", "microbatch", "stage", "start", "needs"):
        np.testing.assert_array_equal(getattr(found.program, column), getattr(expected.program, column))
    assert found.timeline.step_s == expected.timeline.step_s
    assert dict(found.memory.terms) == dict(expected.memory.terms)


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        *((name, 1) for name in ("gpipe", "1f1b", "zb1p", "zbh2", "dualpipe")),
        *((name, 2) for name in ("interleaved", "zbv", "dualpipev")),
    ],
)
def test_a_file_gives_the_step_of_the_schedule_that_it_was_written_from(name: str, chunks: int, tmp_path: Path) -> None:
    file = written(tmp_path, schedules.build(name, 4, 8, chunks))

    same(
        step(schedule={"file": file}, virtual_stages=chunks),
        step(schedule=name, virtual_stages=chunks),
    )


@pytest.mark.parametrize(
    "case",
    [case for case in whole()["cases"] if (case["ranks"], case["microbatches"]) == (4, 8)],
    ids=lambda case: f"{case['name']}-v{case['virtual_stages']}",
)
def test_a_recorded_list_gives_the_step_of_the_schedule_of_its_name(case: dict[str, Any], tmp_path: Path) -> None:
    chunks = case["virtual_stages"]
    file = listed(tmp_path, case["steps"])

    same(
        step(schedule={"file": file}, virtual_stages=chunks),
        step(schedule=case["name"], virtual_stages=chunks),
    )


def test_cells_without_work_and_empty_rows_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "actions.csv"
    file.write_bytes(
        b"\xef\xbb\xbf0UNSHARD, 0F0 ,0SEND_F0,,0F1,0RECV_B0,0B0,0B1,0REDUCE_GRAD,0RESHARD\r\n"
        b"\r\n"
        b',,\r\n1RECV_F0,"1F0",1B0,1SEND_B0,1F1,1B1\r\n'
    )

    assert schedules.read(file, 2, 2).steps == schedules.build("1f1b", 2, 2).steps


def test_a_rank_may_hold_more_stages_than_another(tmp_path: Path) -> None:
    file = listed(tmp_path, ["0F0 1F0 2F0 2B0 1B0 0B0", "3F0 3B0"])
    found = schedules.read(file, 2, 1, 2)

    assert found.placement == ((0, 1, 2), (3,))
    assert schedules.in_flight(found) == (3, 1)
    assert [found.pairs, found.bidirectional, found.splits_backward] == [False, False, False]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    first = schedules.read(written(tmp_path, schedules.build("gpipe", 2, 4)), 2, 4)
    second = schedules.read(written(tmp_path, schedules.build("zbh2", 2, 4)), 2, 4)

    assert first.steps == schedules.build("gpipe", 2, 4).steps
    assert second.steps == schedules.build("zbh2", 2, 4).steps
    assert schedules.read(tmp_path / "actions.csv", 2, 4) is second


# Where the file is


def scenario_file(folder: Path, file: str) -> Path:
    scenario = folder / "scenario.yaml"
    scenario.write_text(
        f"""\
name: small
model: mixtral-8x7b
cluster: {{profile: h100-sxm, accelerators: 32}}
parallelism: {{pipeline: 2, expert: 8, schedule: {{file: {file}}}}}
training: {{tokens: 1B, sequence_length: 4096, global_batch_sequences: 128}}
""",
        encoding="utf-8",
    )
    return scenario


def test_the_file_lies_beside_the_scenario_or_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "scenarios", tmp_path / "here"
    (beside / "lists").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    written(beside / "lists", schedules.build("gpipe", 2, 8))
    scenario = load_scenario(scenario_file(beside, "lists/actions.csv"))
    assert schedule_of(scenario, resolve(scenario)).steps == schedules.build("gpipe", 2, 8).steps

    written(here, schedules.build("zb1p", 2, 8))
    scenario = load_scenario(scenario_file(beside, "actions.csv"))
    assert schedule_of(scenario, resolve(scenario)).steps == schedules.build("zb1p", 2, 8).steps


def test_the_command_line_takes_a_file(tmp_path: Path, moesim: Run) -> None:
    written(tmp_path, schedules.build("1f1b", 2, 8))
    scenario = str(scenario_file(tmp_path, "actions.csv"))

    assert moesim("check", scenario)[0] == 0
    named = ("--set", "parallelism.schedule=1f1b")
    of_file, of_name = (json.loads(moesim("estimate", scenario, "--json", *more)[1]) for more in ((), named))
    assert of_file["step_time_s"] == of_name["step_time_s"]
    assert moesim("estimate", scenario)[0] == 0
    assert moesim("estimate", scenario, "--set", f"parallelism.schedule={{file: {tmp_path / 'actions.csv'}}}")[0] == 0


def test_every_bad_schedule_file_gets_one_line(bad_schedule: Any, tmp_path: Path, moesim: Run) -> None:
    target = bad_schedule.make(tmp_path)
    for verb in ("check", "estimate"):
        code, _, message = moesim(verb, target)

        assert code == 2
        assert bad_schedule.message.replace("{folder}", str(tmp_path)) in message
        assert message.count("\n") == 1
        assert "Traceback" not in message
