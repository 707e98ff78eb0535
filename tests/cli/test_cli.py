"""The command line as a user meets it: verbs, exit codes, JSON contract, errors without tracebacks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simulator.spec import available, load_profile
from validation.checks import at_most

Run = Callable[..., tuple[int, str, str]]

KEYS = set(
    """schema_version simulator_version name engine seed scenario profile profile_sha256 stack assumptions warnings
    gpu_hours gpu_hours_interval days cost_usd tokens_per_s_per_accelerator step_time_s step_breakdown_s bubble_s
    exposed_communication_s model_flop_per_token model_flop_per_token_noncausal mfu mfu_noncausal mfu_peak_flop_per_s
    hfu parameters_total parameters_active memory_peak_bytes memory_breakdown_bytes fits dropped_token_fraction
    dropped_token_fraction_by_position lost_token_fraction padding_fraction expert_load_max_over_mean
    expert_rank_load_max_over_mean all_to_all_bytes_per_token""".split()  # noqa: SIM905 (readable as text)
)

SMALL = """\
name: small
model: olmoe-1b-7b
cluster: {profile: h100-sxm, accelerators: 8}
parallelism: {expert: 8}
training: {tokens: 1B, sequence_length: 1024, global_batch_sequences: 16}
routing: {load: {kind: logits, population: 0.5}}
cost: {price_per_accelerator_hour: 2 USD}
variants:
  capacity-1.25: {routing.capacity_factor: 1.25}
sweep:
  routing.capacity_factor: [1.0, 2.0]
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.mark.parametrize("name", sorted(available("scenarios")))
def test_every_shipped_scenario_keeps_the_contract(moesim: Run, name: str) -> None:
    code, output, _ = moesim("estimate", name, "--json", "--engine", "max-plus")
    values = json.loads(output)
    assert KEYS - values.keys() == set()
    assert sum(values["step_breakdown_s"].values()) == pytest.approx(values["step_time_s"], rel=1e-9)
    assert sum(values["memory_breakdown_bytes"].values()) == pytest.approx(values["memory_peak_bytes"], rel=1e-9)
    exposed = sum(v for k, v in values["step_breakdown_s"].items() if k.startswith("exposed_"))
    assert values["exposed_communication_s"] == pytest.approx(exposed)
    assert all(math.isfinite(v) for v in values.values() if isinstance(v, float))
    assert code == (0 if values["fits"] else 1)


def test_deepseek_v3_in_the_event_engine(moesim: Run) -> None:
    code, output, errors = moesim("estimate", "deepseek-v3", "--json")
    values = json.loads(output)
    assert (code, errors) == (0, "")
    assert values["engine"] == "events"
    assert values["model_flop_per_token"] == pytest.approx(249.81e9, rel=1e-3)
    assert values["model_flop_per_token_noncausal"] == pytest.approx(280.51e9, rel=1e-3)
    assert values["parameters_total"] == pytest.approx(671.03e9, rel=1e-3)
    hours = values["gpu_hours"]
    assert hours == pytest.approx(14.8e12 / (15360 * 4096) * values["step_time_s"] * 2048 / 3600)
    assert values["cost_usd"] == pytest.approx(2.0 * hours)


def test_an_estimate_says_how_far_it_is_from_what_was_published(moesim: Run) -> None:
    _, output, _ = moesim("estimate", "deepseek-v3", "--engine", "max-plus")
    assert "Against the published run" in output
    _, changed, _ = moesim("estimate", "deepseek-v3", "--engine", "max-plus", "--set", "routing.seed=1")
    assert "Against the published run" not in changed


def test_a_run_that_does_not_fit_exits_with_1(moesim: Run, small: str) -> None:
    code, output, errors = moesim(
        "estimate", small, "--json", "--set", "cluster.overrides={accelerator.memory_bytes: 4 GB}"
    )
    assert code == 1
    assert json.loads(output)["fits"] is False
    assert errors.startswith("warning: does not fit: rank 0 needs")


def test_set_reaches_model_profile_and_routing(moesim: Run, small: str) -> None:
    _, base, _ = moesim("estimate", small, "--json")
    _, changed, _ = moesim(
        "estimate", small, "--json", "--set", "routing.capacity_factor=1.0", "--set", "model.layers=8"
    )
    before, after = json.loads(base), json.loads(changed)
    assert after["dropped_token_fraction"] > before["dropped_token_fraction"] == 0.0
    assert after["scenario"]["model"]["layers"] == 8
    assert after["parameters_total"] < before["parameters_total"]


def test_same_scenario_and_seed_give_the_same_bytes(moesim: Run, small: str) -> None:
    assert moesim("estimate", small, "--json") == moesim("estimate", small, "--json")


def test_a_bad_input_gets_one_message_and_exit_2(moesim: Run, bad_input: Any, tmp_path: Path) -> None:
    target = str(bad_input.make(tmp_path))
    code, output, errors = moesim("estimate", target)
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert bad_input.expected(target) in errors


def test_what_is_not_simulated_is_refused(moesim: Run, small: str) -> None:
    code, _, errors = moesim("estimate", small, "--set", "training.offload=[optimizer]")
    assert (code, errors) == (2, "training.offload: host offload is not simulated yet; leave the list empty\n")


def test_faults_and_jitter_cost_time_and_are_said(moesim: Run, small: str) -> None:
    plain = json.loads(moesim("estimate", small, "--json")[1])
    source = next(iter(load_profile(plain["profile"]).sources))
    for change, said in (
        ("cluster.faults=[{rank: 1, compute: 0.5}]", "1 fault lasts the whole training"),
        (f"cluster.overrides.jitter={{value: 0.05, source: {source}, kind: assumed}}", "kernel times vary by 0.05"),
    ):
        code, output, _ = moesim("estimate", small, "--json", "--set", change)
        answer = json.loads(output)
        assert code == 0
        assert answer["step_time_s"] > plain["step_time_s"]
        assert any(said in line for line in answer["assumptions"])


def test_a_broken_assignment_says_how_to_write_one(moesim: Run, small: str) -> None:
    code, _, errors = moesim("estimate", small, "--set", "routing.capacity_factor")
    assert code == 2
    assert "write --set dotted.path=value" in errors


def test_step_writes_a_trace(moesim: Run, small: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    code, output, _ = moesim("step", small, "--json", "--trace", str(path))
    assert code == 0
    values = json.loads(output)
    assert sum(values["step_breakdown_s"].values()) == pytest.approx(values["step_time_s"])
    assert json.loads(path.read_text())["traceEvents"]


def test_step_opens_the_step_by_critical_path_action_and_rank(moesim: Run, small: str) -> None:
    two = ("--set", "parallelism={pipeline: 2, expert: 4}")
    code, output, _ = moesim("step", small, "--json", *two)
    values = json.loads(output)
    assert code == 0
    path = values["critical_path"]
    for terms in (path["terms"], values["step_by_action_s"]):
        assert sum(terms.values()) == pytest.approx(values["step_time_s"])
    assert sum(path["seconds_by_rank"]) == pytest.approx(values["step_time_s"])
    assert path["ranks"] == [0, 1]
    assert 0 < path["ops"] < values["ops"]
    makespan, span = values["bubble_makespan_s"], values["bubble_span_s"]
    assert len(makespan) == len(span) == len(values["memory_peak_bytes_by_rank"]) == 2
    assert sum(makespan) / 2 == pytest.approx(values["step_breakdown_s"]["bubble"])
    assert all(own <= whole + 1e-12 for own, whole in zip(span, makespan, strict=True))
    assert max(values["memory_peak_bytes_by_rank"]) == pytest.approx(values["memory_peak_bytes"])
    code, table, _ = moesim("step", small, *two)
    assert code == 0
    for word in ("critical path", "1F", "1B", "1W", "bubble in own span", "peak memory", "forward alone"):
        assert word in table


def test_step_writes_a_protobuf_trace_or_says_what_is_missing(
    moesim: Run, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("perfetto")
    path = tmp_path / "step.pftrace"
    assert moesim("step", small, "--json", "--trace", str(path))[0] == 0
    assert path.stat().st_size > 1000
    monkeypatch.setattr("simulator.report.protobuf.find_spec", lambda name: None)
    code, output, errors = moesim("step", small, "--trace", str(path))
    assert (code, output) == (2, "")
    assert errors.startswith("--trace: a .pftrace file needs the package perfetto: pip install 'moesim[trace]'")


def test_step_shows_the_load_over_training_steps(moesim: Run, small: str, tmp_path: Path) -> None:
    path = tmp_path / "load.html"
    code, output, errors = moesim("step", small, "--over-steps", "20", "--json", "--figure", str(path))
    rows = json.loads(output)["rows"]
    assert (code, errors) == (0, f"wrote {path}\n")
    assert {row["step"] for row in rows} == set(range(0, 21, 2))
    assert {row["strategy"] for row in rows} == {"none", "importance loss", "load-balance loss", "bias"}
    assert "Expert load over training steps" in path.read_text("utf-8")
    code, table, _ = moesim("step", small, "--over-steps", "2")
    assert code == 0
    for word in ("training step", "load-balance loss", "MaxVio", "capacity factor of 1.25"):
        assert word in table


def test_the_load_over_steps_needs_a_load_that_changes(moesim: Run, small: str, tmp_path: Path) -> None:
    balanced = ("--set", "routing.load={kind: balanced}")
    assert moesim("step", small, "--over-steps", "2", *balanced)[2].startswith("routing.load is even by itself")
    dense = ("--set", "model=mistral-7b", "--set", "parallelism={}", "--set", "routing={}", "--set", "variants={}")
    code, output, errors = moesim("step", small, "--over-steps", "2", *dense, "--set", "sweep={}")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("routing.load: ")
    assert moesim("step", small, "--figure", str(tmp_path / "x.html"))[0] == 2
    assert moesim("step", small, "--over-steps", "2", "--trace", str(tmp_path / "x.json"))[0] == 2
    assert list(tmp_path.glob("x.*")) == []


def test_sweep_draws_its_rows(moesim: Run, small: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.html"
    code, output, errors = moesim("sweep", small, "--json", "--figure", str(path))
    assert (code, len(json.loads(output)["rows"]), errors) == (0, 4, f"wrote {path}\n")
    assert path.read_text("utf-8").count('class="plotly-graph-div"') == 2


@pytest.mark.parametrize("verb", [("sweep",), ("step", "--over-steps", "2")])
def test_a_figure_that_cannot_be_written_is_one_message(moesim: Run, small: str, tmp_path: Path, verb: Any) -> None:
    missing = tmp_path / "missing" / "page.html"
    message = f"{missing}: cannot be written: no such file or directory\n"
    assert moesim(*verb, small, "--figure", str(missing)) == (2, "", message)
    message = f"{tmp_path}: cannot be written: is a directory\n"
    assert moesim(*verb, small, "--figure", str(tmp_path)) == (2, "", message)


def test_points_of_a_sweep_are_named_briefly(moesim: Run, small: str) -> None:
    axes = "sweep={routing.load: [{kind: logits, population: 0.5}], routing.balance: [[], [{kind: bias}]]}"
    _, output, _ = moesim("sweep", small, "--json", "--set", axes, "--set", "variants={}")
    names = [row["name"] for row in json.loads(output)["rows"][1:]]
    assert names == ["load logits population 0.5, balance none", "load logits population 0.5, balance bias"]


def test_sweep_gives_rows_with_changes_and_estimates(moesim: Run, small: str) -> None:
    code, output, _ = moesim("sweep", small, "--json")
    rows = json.loads(output)["rows"]
    assert code == 0
    assert [row["name"] for row in rows] == ["base", "capacity-1.25", "capacity_factor 1.0", "capacity_factor 2.0"]
    assert [row.get("routing.capacity_factor") for row in rows] == [None, 1.25, 1.0, 2.0]
    drops = {row["routing.capacity_factor"]: row["dropped_token_fraction"] for row in rows[1:]}
    assert drops[1.0] > drops[1.25] > drops[2.0] > 0.0 == rows[0]["dropped_token_fraction"]


def test_an_interrupted_sweep_resumes_from_its_file(moesim: Run, small: str, tmp_path: Path) -> None:
    store = tmp_path / "rows.jsonl"
    _, first, _ = moesim("sweep", small, "--json", "--out", str(store), "--jobs", "1")
    lines = store.read_text().splitlines()
    store.write_text("\n".join(lines[:2]) + '\n{"key": "half a li')  # as if killed while writing the third row
    _, second, _ = moesim("sweep", small, "--json", "--out", str(store), "--jobs", "1")
    assert json.loads(first) == json.loads(second)
    assert len(lines) == 4


def test_a_point_that_breaks_a_law_is_reported_in_its_row(moesim: Run, small: str) -> None:
    code, output, _ = moesim("sweep", small, "--json", "--set", "sweep={parallelism.expert: [4, 5]}")
    rows = json.loads(output)["rows"]
    assert code == 0
    assert "error" not in rows[-2]
    assert "divide" in rows[-1]["error"]


def test_capacity_factors_drops_never_grow_and_padded_steps_never_shrink(moesim: Run) -> None:
    axes = "sweep={routing.capacity_factor: [1.0, 1.25, 1.5, 2.0, null], routing.pad_to_capacity: [false, true]}"
    _, output, _ = moesim("sweep", "capacity-factor", "--json", "--set", axes, "--set", "variants={}")
    rows = [row for row in json.loads(output)["rows"][1:] if "error" not in row]
    padded = {r["routing.capacity_factor"]: r for r in rows if r["routing.pad_to_capacity"]}
    plain = {r["routing.capacity_factor"]: r for r in rows if not r["routing.pad_to_capacity"]}
    factors = [1.0, 1.25, 1.5, 2.0]
    assert sorted(padded) == factors  # without a capacity there is nothing to pad to
    assert set(plain) == {*factors, None}
    drops = [plain[factor]["dropped_token_fraction"] for factor in (*factors, None)]
    assert drops == sorted(drops, reverse=True)
    assert drops[0] > 0.0 == drops[-1]
    for key in ("step_time_s", "padding_fraction", "memory_peak_bytes"):
        values = [padded[factor][key] for factor in factors]
        assert values == sorted(values), key


def test_moe_stride_keeps_active_parameters_and_sheds_total_ones(moesim: Run) -> None:
    _, output, _ = moesim("sweep", "moe-stride", "--json")
    rows = {row["model.moe.stride"]: row for row in json.loads(output)["rows"][1:]}
    assert list(rows) == [1, 2, 4, 6]
    totals = [rows[stride]["parameters_total"] for stride in rows]
    assert totals == sorted(totals, reverse=True)
    active = [rows[stride]["parameters_active"] for stride in rows]
    assert max(active) / min(active) < 1.01


def test_compare_opens_the_difference_into_terms(moesim: Run, small: str) -> None:
    code, output, _ = moesim("compare", small, "--json")
    rows = json.loads(output)["rows"]
    assert (code, [row["name"] for row in rows]) == (0, ["base", "capacity-1.25"])
    code, table, _ = moesim("compare", small, small)
    assert code == 0
    assert "Step time against the base, term by term" in table


def test_check_says_what_a_scenario_resolves_to(moesim: Run, small: str) -> None:
    assert moesim("check", small) == (0, f"{small}: ok; data 8, expert_data 1, microbatches 2\n", "")
    code, _, errors = moesim("check", small, "--set", "parallelism.expert=3")
    assert code == 2
    assert errors.startswith("--set parallelism.expert")


def test_explain_opens_a_number(moesim: Run, small: str) -> None:
    code, output, _ = moesim("explain", small, "step_time_s")
    assert code == 0
    for word in ("meaning", "formula", "expert", "attention"):
        assert word in output
    code, _, errors = moesim("explain", small, "step_tim")
    assert (code, "did you mean 'step_time_s'?" in errors) == (2, True)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v2-lite", "t5-base", "switch-base-32", "mistral-7b"])
def test_init_writes_a_scenario_that_runs(moesim: Run, tmp_path: Path, model: str) -> None:
    path = tmp_path / "mine.yaml"
    assert moesim("init", str(path), "--model", model)[0] == 0
    code, output, _ = moesim("estimate", str(path), "--json", "--engine", "max-plus")
    assert code == 0, json.loads(output)["warnings"]
    code, _, errors = moesim("init", str(path), "--model", model)
    assert (code, "exists already" in errors) == (2, True)


def test_models_lists_computed_against_published(moesim: Run) -> None:
    _, output, _ = moesim("models", "--json")
    rows = json.loads(output)
    assert len(rows) == len(available("models"))
    errors = [abs(row["total_error_percent"]) for row in rows if row["total_error_percent"] is not None]
    assert max(errors) < 2.7
    assert moesim("models")[0] == 0


def test_profiles_show_every_source(moesim: Run) -> None:
    assert len(json.loads(moesim("profiles", "--json")[1])) == len(available("profiles"))
    _, output, _ = moesim("profiles", "h800-sxm")
    assert "accelerator.memory_bandwidth" in output
    code, _, errors = moesim("profiles", "h80-sxm")
    assert (code, "did you mean 'h800-sxm'?" in errors) == (2, True)


@pytest.mark.parametrize("kind", ["scenario", "model", "profile"])
def test_schema_prints_json(moesim: Run, kind: str) -> None:
    assert json.loads(moesim("schema", kind)[1])["type"] == "object" or "$defs" in json.loads(moesim("schema", kind)[1])


def test_report_writes_one_page(moesim: Run, small: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert moesim("report", small, "-o", str(path))[0] == 0
    assert "small" in path.read_text("utf-8")
    code, _, errors = moesim("report", small, "-o", str(tmp_path / "missing" / "page.html"))
    assert (code, errors.count("\n")) == (2, 1)


def test_validate_holds_predictions_against_published_runs(moesim: Run) -> None:
    code, output, _ = moesim("validate", "--only", "deepseek-v3", "--json", "--engine", "max-plus")
    result = json.loads(output)
    assert code == 0
    assert {check["group"] for check in result["checks"]} == {"runs"}
    assert result["summary"]["runs"]["deepseek-v3-h800"]["rows"] == 1
    assert {check["ok"] for check in result["checks"]} == {True}


def test_validate_events_prints_what_its_rooms_find(moesim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [at_most("directions", "a against b", 2.0, reached, "s", "here") for reached in (1.0, 3.0)]
    monkeypatch.setattr("validation.events.judge", lambda: found)
    code, output, _ = moesim("validate", "--events", "--json")
    result = json.loads(output)
    assert code == 1  # one of them is missed
    assert result["checks"] == found
    assert result["summary"]["events"]["directions"] == {
        "checks": 2,
        "ok": 1,
        "missed": ["a against b"],
        "for_the_record": 0,
    }


def test_check_finds_what_is_wrong_in_variants_and_sweeps(moesim: Run, small: str) -> None:
    code, _, errors = moesim("check", small, "--set", "variants={v: {model.moe.top_k: 100}}")
    assert code == 2
    assert errors == "variant 'v', model.moe.top_k: top_k 100 exceeds the 64 experts\n"
    code, _, errors = moesim("check", small, "--set", "sweep={routing.capacity_factor: [1.0, -3]}")
    assert code == 0
    assert f"{small}: sweep point capacity_factor -3: " in errors


def test_version(moesim: Run) -> None:
    code, output, _ = moesim("--version")
    assert (code, output.count(".")) in {(0, 2), (0, 0)}  # a version, or unknown outside an installation


def test_a_file_for_rows_that_cannot_be_written_is_one_message(moesim: Run, small: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "rows.jsonl"
    assert moesim("sweep", small, "--out", str(missing)) == (
        2,
        "",
        f"{missing}: cannot be written: no such file or directory\n",
    )
    assert moesim("sweep", small, "--out", str(tmp_path)) == (
        2,
        "",
        f"{tmp_path}: cannot be read as a file of rows\n",
    )


def test_an_interrupted_sweep_shows_what_is_finished(moesim: Run, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from simulator.study import executors

    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return one(*arguments)

    one = executors._one
    monkeypatch.setattr(executors, "_one", interrupted)
    code, output, errors = moesim("sweep", small, "--json", "--jobs", "1")
    assert code == 130
    assert [row["name"] for row in json.loads(output)["rows"]] == ["base", "capacity-1.25"]
    assert errors == "interrupted: 2 of 4 rows are finished; --out FILE keeps them for a later run\n"


def test_another_scenario_of_a_published_name_is_not_compared(moesim: Run, tmp_path: Path) -> None:
    path = tmp_path / "deepseek-v3.yaml"
    path.write_text(SMALL)
    assert "Against the published run" not in moesim("estimate", str(path), "--engine", "max-plus")[1]
