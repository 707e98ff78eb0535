"""Predictions against published runs: how errors are formed, and that what is written down belongs to this code."""

from __future__ import annotations

import json
import math

import pytest

from simulator.campaign import uncertainty
from validation.accuracy import baseline, judge
from validation.accuracy_page import PAGE, fingerprints
from validation.evidence import sources
from validation.families import release_spread, summary
from validation.predictions import predict
from validation.stack import StackTerm

RECORD = json.loads(uncertainty.FILE.read_text("utf-8"))
CHEAP = ("korthikanti-2022/kor-0", "vtrain-multi/", "llm-foundry/", "simumax-b200/")


def test_the_page_belongs_to_the_evidence_and_the_profiles() -> None:
    """Otherwise: moesim validate --runs --write."""
    assert RECORD["fingerprints"] == fingerprints()
    assert PAGE.exists()


@pytest.mark.parametrize(
    "row", [row for row in RECORD["rows"] if row["name"].startswith(CHEAP)], ids=lambda row: str(row["name"])
)
def test_the_page_belongs_to_the_code(row: dict[str, object]) -> None:
    """Some rows predicted again, with the stack term that was stored; its response is linear, hence 3 %."""
    name, quantity = str(row["name"]).split(": ")
    source, run_id = name.split("/")
    run = next(run for each in sources() if each.name == source for run in each.runs() if run.id == run_id)
    (again,) = predict([(run, frozenset({quantity}))], jobs=1)
    term = StackTerm(float(row["gap_fraction"]), row["issue_s"])  # type: ignore[arg-type]

    assert again.under(term).values(quantity)[0] == pytest.approx(row["reached"], rel=0.03)


def test_speeds_and_times_of_one_run_err_by_the_same_factor() -> None:
    """DeepSeek-V3: step time, GPU-hours and MFU are one measurement; time errors count once."""
    found = {check["name"].split(": ")[1]: check for check in judge(["deepseek-v3"])}
    step, mfu = found["step_time_s"]["error_percent"], found["mfu"]["error_percent"]

    assert (1.0 + step / 100.0) * (1.0 + mfu / 100.0) == pytest.approx(1.0, abs=0.005)
    assert [check["time_error_percent"] is not None for check in found.values()].count(True) == 1
    assert summary(list(found.values()))["deepseek-v3-h800"]["layouts"] == 1


def test_an_incomplete_row_is_met_inside_its_range_and_says_how_wide_it_is() -> None:
    """Its range holds what every swept value gives, and the width is that of the range."""
    rows = [check for check in judge(["llama3-405b", "bloom"]) if check["time_error_percent"] is not None]

    assert len(rows) >= 2
    for row in rows:
        low, high = row["range"]
        assert row["ok"] == (low <= row["expected"] <= high)
        assert low < row["reached"] < high
        assert row["range_width_percent"] == pytest.approx(100.0 * (high / low - 1.0))
        assert 0.0 < sum(row["terms_percent"].values()) <= 100.0


def test_one_layout_under_two_releases_tells_how_far_reality_lies_apart() -> None:
    row = {"group": "runs", "layout": "s/a", "time_error_percent": 0.0, "reached": 5.0}
    checks = [
        row | {"name": "s/1: step_time_s", "expected": 10.0},
        row | {"name": "s/2: step_time_s", "expected": 12.0},
        row | {"name": "s/3: step_time_s", "expected": 99.0, "reached": 6.0},  # another prediction: not the same run
    ]

    assert release_spread(checks) == {"s/a: step_time_s": pytest.approx(20.0)}


def test_a_baseline_has_never_seen_its_own_row() -> None:
    """Two layouts: each gets the MFU of the other, so that the errors are inverse to each other."""
    source = next(each for each in sources() if each.name == "vtrain-multi")
    by_layout = {run.layout: run for run in source.runs() if run.role == "fit"}
    runs = list(by_layout.values())[:2]
    found = predict([(run, frozenset(quantity.name for quantity in run.quantities)) for run in runs], jobs=1)
    rules = baseline(found)
    errors = [math.log(rules[id(each)] / (each.points[0].published_s or math.nan)) for each in found]

    assert len(errors) == 2
    assert errors[0] != 0.0
    assert sum(errors) == pytest.approx(0.0, abs=1e-9)


def test_every_miss_of_a_complete_run_has_its_explanation() -> None:
    """Over 10 %: the source says which terms could explain it, and with what evidence."""
    by_layout = {f"{each.name}/{run.layout}": (each, run) for each in sources() for run in each.runs()}
    missed = [row["layout"] for row in RECORD["layouts"] if abs(math.expm1(row["log_error"])) > 0.1]

    assert missed
    for layout in missed:
        source, run = by_layout[layout]
        assert source.why(run.id), f"{layout} is over 10 % off and {source.name}.yaml has no word on it under misses"
