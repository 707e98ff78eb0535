"""Records of measurements: what an interruption leaves, what is refused, and what several passes tell."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InvalidInput
from validation import records, steadiness
from validation.records import Environment, Record
from validation.steadiness import Noise

MACHINE = Environment(
    id="abc",
    device="a processor",
    kind="cpu",
    threads=1,
    torch="2.13.0",
    python="3.11.7",
    date="2026-01-01",
    cores=2,
    memory_bytes=16 * 2**30,
    driver=None,
    noise_floor=0.05,
)


def record(key: str = "gemm/a", number: int = 1, seconds: float = 1.0, **changes: Any) -> Record:
    kept = Record(key, key.split("/")[0], number, "abc", {"m": 8}, seconds, 1.1 * seconds, 0.02, 7, 0.003)
    return replace(kept, **changes)


def written(path: Path, *entries: Environment | Record) -> Path:
    for entry in entries:
        records.append(path, entry)
    return path


def test_what_was_appended_is_read_and_a_second_run_knows_what_is_done(tmp_path: Path) -> None:
    done = (record("gemm/a"), record("gemm/b"), record("gemm/a", 2))
    path = written(tmp_path / "new folder" / "set.jsonl", MACHINE, *done)

    found = records.read(path)

    assert found == records.Recording(MACHINE, done)
    assert records.finished_keys(found.records, 1) == {"gemm/a", "gemm/b"}
    assert records.finished_keys(found.records, 2) == {"gemm/a"}
    assert records.finished_keys(found.records, 3) == set()
    assert records.resume(path, replace(MACHINE, date="2026-02-02", noise_floor=0.3)) == found


@settings(max_examples=40)
@given(cut=st.integers(0, 1500))
def test_wherever_writing_stops_finished_records_stay_and_the_rest_can_be_added(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "set.jsonl"
    every = [record(f"gemm/{name}") for name in "abcd"]
    content = written(path, MACHINE, *every).read_bytes()
    kept = content[:cut]
    path.write_bytes(kept)

    found = records.resume(path, MACHINE)
    whole = max(kept.count(b"\n") - 1, 0)
    for missing in every[len(found.records) :]:
        records.append(path, missing)

    assert list(found.records) == every[:whole]
    assert path.read_bytes() == content


LINE = asdict(record())
BAD_LINES = {
    "no JSON": ("{", "is not a line of JSON"),
    "a list": ("[]", "must be a JSON object"),
    "lacks": (json.dumps({"key": "a"}), "lacks kind, number, environment, case"),
    "typo": (json.dumps({**LINE, "second": 1}), "unknown field 'second'; did you mean 'seconds'?"),
    "text for a number": (json.dumps({**LINE, "seconds": "1"}), 'seconds must be a number of zero or more (got "1")'),
    "true for a number": (json.dumps({**LINE, "repeats": True}), "repeats must be a whole number"),
    "negative": (json.dumps({**LINE, "median_s": -1}), "median_s must be a number of zero or more (got -1)"),
    "no time": (json.dumps({**LINE, "seconds": 0}), "seconds must be above 0"),
    "not a number": (json.dumps({**LINE, "seconds": float("nan")}), "seconds must be a number of zero or more"),
    "a second environment": (json.dumps({"environment": asdict(MACHINE)}), "the first line, and no other"),
    "of another machine": (json.dumps({**LINE, "environment": "xyz"}), "is of another environment (xyz)"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_record_is_named_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path / "set.jsonl", MACHINE, record())
    path.write_text(path.read_text() + line + "\n")

    with pytest.raises(InvalidInput) as error:
        records.read(path)

    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_every_bad_line_is_told_and_an_empty_or_missing_file_too(tmp_path: Path) -> None:
    path = written(tmp_path / "set.jsonl", MACHINE)
    path.write_text(path.read_text() + "{\n[]\n")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    cases = [(path, 2), (empty, 1), (tmp_path / "missing.jsonl", 1), (tmp_path, 1)]

    for file, lines in cases:
        with pytest.raises(InvalidInput) as error:
            records.read(file)
        assert len(str(error.value).splitlines()) == lines


def test_a_file_of_another_machine_is_not_continued(tmp_path: Path) -> None:
    path = written(tmp_path / "set.jsonl", MACHINE, record())
    before = path.read_bytes()

    with pytest.raises(InvalidInput, match=r"torch 2\.13\.0 there, 2\.14\.0 here"):
        records.resume(path, replace(MACHINE, id="xyz", torch="2.14.0"))

    assert path.read_bytes() == before


def test_the_best_pass_counts_and_the_noise_is_the_difference_of_two() -> None:
    found = [
        record("gemm/a", 1, 1.0),
        record("gemm/b", 1, 2.0),
        record("layer/c", 1, 4.0),
        record("layer/once", 1, 9.0),
        record("gemm/a", 2, 1.1),
        record("gemm/b", 2, 1.4),
        record("layer/c", 2, 4.0),
        record("layer/c", 3, 8.0),
    ]

    assert {key: each.seconds for key, each in steadiness.best(found).items()} == {
        "gemm/a": 1.0,
        "gemm/b": 1.4,
        "layer/c": 4.0,
        "layer/once": 9.0,
    }
    noise = steadiness.noise(found)
    assert noise["layer"] == Noise(1, 0.0, 0.0, 0.0, 0.0)
    assert noise["gemm"].cases == 2
    assert noise["gemm"].mape == pytest.approx(0.2)
    assert noise["gemm"].maximum == pytest.approx(0.3)
    assert noise["gemm"].bias == pytest.approx(-0.1)
    assert noise["all"].mape == pytest.approx(0.4 / 3)


@given(speeds=st.lists(st.floats(0.71, 1.4), min_size=6, max_size=6))
def test_a_drift_that_the_reference_shares_is_divided_out(speeds: list[float]) -> None:
    keys = [(f"gemm/{name}", number) for number in (1, 2) for name in "abc"]
    found = [
        record(key, number, 2.0 * speed, reference_s=0.003 * speed)
        for (key, number), speed in zip(keys, speeds, strict=True)
    ]

    assert steadiness.noise(steadiness.corrected(found))["all"].maximum == pytest.approx(0.0, abs=1e-12)
    assert steadiness.noise(steadiness.steadier(found))["all"].maximum <= steadiness.noise(found)["all"].maximum + 1e-12


def test_a_reference_that_was_interrupted_itself_changes_nothing() -> None:
    found = tuple(record("gemm/a", number, reference_s=0.003 * (3.0 if number == 2 else 1.0)) for number in (1, 2, 3))

    assert [each.seconds for each in steadiness.corrected(found)] == [1.0, 1.0, 1.0]


def test_a_reference_that_tells_nothing_is_left_alone() -> None:
    found = tuple(record("gemm/a", number, 2.0, reference_s=0.003 * number) for number in (1, 2))

    assert steadiness.steadier(found) == found
    assert steadiness.noise(steadiness.corrected(found))["all"].mape == pytest.approx(0.5)
    assert steadiness.steadier(()) == steadiness.corrected(()) == ()
