"""A profile fitted to measurements: it finds a known machine, predicts unseen shapes, and says when it may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator import estimate, load_scenario, simulate_step
from simulator.errors import InvalidInput
from simulator.spec import load_profile
from simulator.spec.fields import sourced_numbers
from tests.machines import ENVIRONMENT, known_machine, measured, small_suite
from validation import calibration, holdout
from validation.baselines import work
from validation.calibrate import Calibration, calibrated
from validation.cases import all_to_all, gemm, memory
from validation.compose import layer_load, layer_seconds, measured_seconds
from validation.fit import fit
from validation.forms import with_values
from validation.least_squares import Data, Parameter, cross_validated, solution
from validation.predict import exchanged_bytes, piece_seconds
from validation.profile_file import document, write
from validation.records import Recording, append
from validation.samples import halves, samples

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def recording() -> Recording:
    return measured(small_suite(), 0.03)


@pytest.fixture(scope="module")
def found(recording: Recording) -> Calibration:
    return calibrated(recording)


def value(profile: Any, path: str) -> float:
    return float(dict(sourced_numbers(profile))[path].value)


def write_records(recording: Recording, path: Path) -> Path:
    lines = [{"environment": asdict(recording.environment)}, *(asdict(each) for each in recording.records)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# What the forms say about single cases


def test_pieces_are_priced_as_the_simulator_prices_them() -> None:
    """104 GFLOP/s at 0.95, every side saturating, beside the time to move the operands, in the fourth power."""
    profile = known_machine()
    m, n, k = 512.0, 1024.0, 256.0
    compute = 2 * m * n * k / (104e9 * 0.95) * (1 + 16 / m) * (1 + 39 / n) * (1 + 6 / k)
    moved = 4 * (m * k + k * n + m * n) / (19e9 * 0.8)
    expected = 4e-6 + (compute**4 + moved**4) ** 0.25
    assert piece_seconds(profile, "gemm", [gemm("F", "fp32", 512, 1024, 256).fields])[0] == pytest.approx(expected)

    norm = memory("norm", "F", "fp32", 1000, 2000).fields  # 16 MB: 4 of them from the cache
    assert piece_seconds(profile, "memory", [norm])[0] == pytest.approx(5e-6 + 4e6 / 35e9 + 12e6 / (19e9 * 0.8))


def test_what_curves_may_state_is_by_default_what_shipped_profiles_mean() -> None:
    """DeepSeek-V3's step with every optional number of the kernel forms written out, and without."""
    scenario = load_scenario("deepseek-v3")
    profile = scenario.cluster.profile
    stated = {"kernels.memory.backward_scale": 1.0}
    stated["kernels.memory.update_fraction"] = profile.kernels.memory.fraction.value
    for kind in ("gemm", "grouped_gemm"):
        for form in getattr(profile.kernels, kind):
            path = f"kernels.{kind}.{form}"
            stated[f"{path}.stream_fraction"] = profile.kernels.memory.fraction.value
    cluster = scenario.cluster.model_copy(update={"profile": with_values(profile, stated)})
    written = scenario.model_copy(update={"cluster": cluster})
    assert simulate_step(written, "max-plus").seconds == pytest.approx(
        simulate_step(scenario, "max-plus").seconds, rel=1e-12
    )


def test_operands_may_stream_at_another_bandwidth_than_other_bytes() -> None:
    """One row of a wide product is bound by its weights, whatever memory-bound ops reach."""
    case = gemm("F", "fp32", 1, 4096, 4096).fields
    profile = with_values(known_machine(), {"kernels.gemm.fp32.stream_fraction": 0.4, "kernels.memory.fraction": 0.9})
    moved = 4 * (4096 * 4096 + 2 * 4096) / (19e9 * 0.4)
    compute = 2 * 4096**2 / (104e9 * 0.95) * 17 * (1 + 39 / 4096) * (1 + 6 / 4096)
    assert piece_seconds(profile, "gemm", [case])[0] == pytest.approx(4e-6 + (compute**4 + moved**4) ** 0.25)


def test_a_backward_of_several_kernels_moves_its_bytes_more_often() -> None:
    profile = with_values(known_machine(), {"kernels.memory.backward_scale": 0.5})
    forward, backward = (memory("norm", which, "fp32", 1000, 2000).fields for which in "FI")
    moved = [float(piece_seconds(profile, "memory", [case])[0]) - 5e-6 - 4e6 / 35e9 for case in (forward, backward)]
    assert moved == pytest.approx([12e6 / 15.2e9, (2 * 24e6 - 4e6) / 15.2e9])


def test_the_optimizer_streams_at_a_bandwidth_of_its_own() -> None:
    case = memory("adam", "F", "fp32", 10_000_000, 1).fields
    profile = with_values(known_machine(), {"kernels.memory.update_fraction": 0.95})
    assert piece_seconds(profile, "memory", [case])[0] == pytest.approx(5e-6 + 280e6 / (19e9 * 0.95))


def test_an_exchange_counts_what_leaves_a_rank() -> None:
    case = all_to_all([[10, 1, 2], [3, 10, 4], [5, 6, 10]], "equal", "gloo").fields
    assert exchanged_bytes(case, "total") == 21
    assert exchanged_bytes(case, "max") == 11  # the last rank sends 5 + 6


def test_a_layer_is_the_sum_of_its_kernels_times_the_composition() -> None:
    """Padded rows cost what real ones cost; without noise the parts that the simulator prices add up."""
    profile = known_machine()
    case = next(case for case in small_suite() if case.kind == "layer" and case.fields["pad"]).fields
    load = layer_load(case)
    assert (load.computed == load.computed.max()).all()
    forward, backward = layer_seconds(case, profile)
    kernels = profile.kernels.model_copy(update={"composition": None})
    plain = layer_seconds(case, profile.model_copy(update={"kernels": kernels}))
    assert (forward, backward) == pytest.approx((1.09 * plain[0], 1.05 * plain[1]))

    keys = {key: 1.0 for key, _ in case["pieces"]}
    assert measured_seconds(case, keys) == sum(count for _, count in case["pieces"])
    assert measured_seconds(case, dict(list(keys.items())[1:])) is None


# Least squares


def test_a_line_is_found_through_outliers_and_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(3)
    x = np.geomspace(1.0, 1e4, 60)
    seconds = (2.0 + 0.05 * x) * np.exp(rng.normal(0.0, 0.05, 60))
    seconds[::13] *= 5.0  # a disturbed measurement now and then
    parameters = [Parameter("overhead", 1.0, 1e-3, 1e3), Parameter("slope", 1.0, 1e-6, 1e3)]
    data = Data(seconds, np.ones(60), [str(index) for index in range(60)])

    found = solution(parameters, lambda p: p[0] + p[1] * x, data)
    low, high = np.percentile(found.resampled, [2.5, 97.5], axis=0)

    assert found.values == pytest.approx([2.0, 0.05], rel=0.1)
    assert (low < [2.0, 0.05]).all()
    assert (high > [2.0, 0.05]).all()
    flat = [Parameter("overhead", 1.0, 1e-3, 1e3)]
    straight = cross_validated(parameters, lambda p: p[0] + p[1] * x, data)
    assert straight < 0.2 * cross_validated(flat, lambda p: p[0] + 0.0 * x, data)


def test_a_parameter_stays_within_its_bounds() -> None:
    data = Data(np.full(10, 0.5), np.ones(10), [str(index) for index in range(10)])
    found = solution([Parameter("efficiency", 0.5, 0.01, 1.0)], lambda p: 1.0 / p[0] * np.ones(10), data)
    assert found.values[0] == pytest.approx(1.0, abs=1e-6)  # the times ask for 2
    assert found.resampled.max() <= 1.0


# A machine is found again


def test_the_known_machine_is_found_again(found: Calibration) -> None:
    """From times with 3 % noise, on a machine where every size is in units of the best measured rates."""
    profile, truth = found.fitted.profile, known_machine()
    for path in ("fp32.rows_half", "fp32.columns_half"):
        assert value(profile, f"kernels.gemm.{path}") == pytest.approx(value(truth, f"kernels.gemm.{path}"), rel=0.2)
        assert value(profile, f"kernels.grouped_gemm.{path}") == pytest.approx(
            value(truth, f"kernels.grouped_gemm.{path}"), rel=0.2
        )

    def rate(each: Any, kind: str) -> float:
        return value(each, "accelerator.peak.fp32") * value(each, f"kernels.{kind}.fp32.efficiency")

    assert rate(profile, "gemm") == pytest.approx(rate(truth, "gemm"), rel=0.06)
    assert rate(profile, "grouped_gemm") == pytest.approx(rate(truth, "grouped_gemm"), rel=0.06)
    streaming = value(profile, "accelerator.memory_bandwidth") * value(profile, "kernels.memory.fraction")
    assert streaming == pytest.approx(19e9 * 0.8, rel=0.05)
    assert value(profile, "kernels.memory.cache_bytes") == pytest.approx(4e6, rel=0.1)
    assert value(profile, "kernels.memory.routing_launch") == pytest.approx(120e-6, rel=0.1)
    assert value(profile, "kernels.memory.routing_per_token") == pytest.approx(0.2e-6, rel=0.1)
    exchange = "tiers.loopback.collectives.all_to_all"
    assert value(profile, f"{exchange}.latency") == pytest.approx(166e-6, rel=0.1)
    assert value(profile, f"{exchange}.hop") == pytest.approx(200e-6, rel=0.15)
    assert value(profile, f"{exchange}.knee_bytes") == pytest.approx(2.7e6, rel=0.3)
    assert found.fitted.factors["composition.forward"][0] == pytest.approx(1.09, rel=0.04)
    assert found.fitted.factors["composition.backward"][0] == pytest.approx(1.05, rel=0.04)
    assert found.fitted.factors["pytorch-2-ranks"][0] == pytest.approx(1.12, rel=0.05)


def test_the_forms_with_the_right_parameters_are_chosen(found: Calibration) -> None:
    chosen = {curve.name: curve.form.name for curve in found.fitted.curves}
    assert chosen["memory"] == "cache"
    assert chosen["gemm.fp32"] == "sides"
    assert chosen["grouped_gemm.fp32 (batched)"] == "sides"
    assert chosen["all_to_all"] == "total, knee"
    assert set(found.fitted.profiles) == {"batched", "grouped", "loop"}
    assert found.fitted.main == "batched"


def test_intervals_hold_the_fitted_values_and_no_efficiency_is_above_1(found: Calibration) -> None:
    for curve in found.fitted.curves:
        for path, (fitted, low, high) in curve.intervals().items():
            assert low * 0.98 <= fitted <= high * 1.02, path
    every = sourced_numbers(found.fitted.profile)
    assert max(each.value for path, each in every if path.endswith(("efficiency", "fraction"))) <= 1.0


def test_unseen_shapes_are_predicted_better_than_by_simple_rules(found: Calibration) -> None:
    rows = {row.name: row for row in found.rows()}
    for name in ("layer forward", "layer forward and backward", "products over 1 ms", "step", "all_to_all 2 ranks"):
        row = rows[name]
        assert row.profile is not None
        assert row.rate is not None
        assert row.overhead is not None
        assert row.profile.mape < 0.06, name
        assert row.profile.mape < 0.6 * min(row.rate.mape, row.overhead.mape), name
    assert found.beaten_by() == []


def test_measured_pieces_are_scaled_by_what_wholes_of_the_training_half_take(found: Calibration) -> None:
    """Layers take 1.09 and 1.07 times their kernels here: without the factor every sum would fall short by that."""
    layers = [each for each in found.held if each.sample.kind == "layer" and np.isfinite(each.pieces)]
    scaled = holdout.errors(each.error("pieces") for each in layers)
    alone = {each.key: each.seconds for each in found.samples}
    plain = [(measured_seconds(each.sample.case, alone) or 0.0) / each.sample.seconds - 1.0 for each in layers]
    assert scaled is not None
    assert scaled.cases > 50
    assert abs(scaled.bias) < 0.02
    assert abs(scaled.bias) < abs(float(np.mean(plain)))


def test_shuffled_times_destroy_the_fit(recording: Recording, found: Calibration) -> None:
    """The errors are those of predictions, not of a form that would follow any times."""
    seconds = np.array([each.seconds for each in recording.records])
    mixed = np.random.default_rng(0).permutation(len(seconds))
    records = tuple(
        replace(each, seconds=float(seconds[at])) for each, at in zip(recording.records, mixed, strict=True)
    )
    held = holdout.held_out(samples(records), ENVIRONMENT, seeds=(0,))
    layers = [each for each in held if each.sample.kind == "layer"]
    shuffled = holdout.errors(each.error() for each in layers)
    assert shuffled is not None
    assert shuffled.mape > 0.5
    broken = Calibration(recording, found.samples, found.fitted, held)
    assert broken.beaten_by() != []


def test_halves_keep_shapes_whole_and_share_nothing(recording: Recording) -> None:
    every = samples(recording.records)
    for seed in (0, 1):
        training, left = halves(every, seed)
        assert {each.shape for each in training}.isdisjoint({each.shape for each in left})
        assert sorted(each.key for each in (*training, *left)) == sorted(each.key for each in every)
        kinds = [{each.kind for each in half} for half in (training, left)]
        assert kinds[0] == kinds[1]
    layer = next(each for each in every if each.kind == "layer" and each.case["which"] == "FB")
    pieces = {key for key, _ in layer.case["pieces"]}
    belonging = [each for each in every if each.key in pieces and each.shape == layer.shape]
    assert len(belonging) > 0.8 * len(pieces)


def test_too_few_cases_get_one_message(recording: Recording) -> None:
    steps = [each for each in samples(recording.records) if each.kind == "step"]
    with pytest.raises(InvalidInput) as caught:
        fit(steps, ENVIRONMENT)
    assert "needs matrix products and memory-bound ops" in str(caught.value)


# The profile as a file


def test_the_written_profile_loads_and_estimates_one_rank_and_two(found: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "my-machine.yaml"
    write(found, path)
    profile = load_profile(str(path))

    assert profile.name == "Known processor"
    for name, each in sourced_numbers(profile):
        assert each.source == "this-machine", name
    assert "90 % of resamples" in (profile.kernels.gemm["fp32"].efficiency.error or "")
    assert "MAPE held out" in (profile.kernels.gemm["fp32"].efficiency.error or "")
    assert profile.kernels.gemm["fp32"].wave_weight.kind == "assumed"
    assert "layer forward" in profile.sources["this-machine"]

    changes = {"cluster.profile": str(path), "training.precision": "fp32"}
    one = estimate(load_scenario("small-transformer", changes))
    assert 0.1 < one.step_time_s < 2.0
    two = {"cluster.accelerators": 2, "parallelism.expert": 2, "training.global_batch_sequences": 4}
    both = estimate(load_scenario("small-transformer", {**changes, **two, "cluster.stack": "pytorch-2-ranks"}))
    assert both.step_time_s > one.step_time_s
    assert both.as_dict()["exposed_communication_s"] > 0.0


def test_numbers_are_written_as_a_person_would(found: Calibration) -> None:
    text = document(found)
    assert "rows_half: {value: 1" in text
    numbers = [
        line.split("{value: ")[1].split(",")[0].split(" ")[0] for line in text.splitlines() if "{value: " in line
    ]
    assert max(len(each) for each in numbers) <= 12
    assert text.startswith("# Measured and fitted by moesim calibrate.")


# The command line


def test_calibrate_fits_recorded_measurements_and_draws_them(
    moesim: Run, recording: Recording, found: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("validation.calibrate.calibrated", lambda recording: found)
    records = write_records(recording, tmp_path / "known.jsonl")
    out, page = tmp_path / "known.yaml", tmp_path / "page.html"
    code, output, errors = moesim(
        "calibrate", "--fit-only", "--records", str(records), "--out", str(out), "--figure", str(page), "--json"
    )
    values = json.loads(output)
    assert code == 0, errors
    assert values["beaten_by"] == []
    assert {row["name"] for row in values["errors"]} >= {"layer forward", "step", "gemm"}
    assert values["curves"][0]["parameters"]["kernels.memory.launch"]["value"] > 0.0
    assert load_profile(str(out)).kernels.composition is not None
    assert "moesim estimate small-transformer --set cluster.profile=" in errors
    drawn = page.read_text()
    assert all(title in drawn for title in ("Measured against predicted", "Errors by size", "Fitted curves"))


def test_a_fit_that_does_not_beat_one_fixed_mfu_is_written_only_by_force(
    moesim: Run, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose layers run at one rate whatever their shape, beside products that depend on theirs."""
    every = samples(recording.records)
    rates = {each.key: work(each) / 50e9 for each in every if each.kind == "layer"}
    kept = [each for each in recording.records if each.kind in ("gemm", "grouped_gemm", "memory", "layer")]
    even = tuple(replace(each, seconds=rates.get(each.key, each.seconds)) for each in kept)
    records = write_records(Recording(ENVIRONMENT, even), tmp_path / "even.jsonl")
    out, once = tmp_path / "even.yaml", cache(lambda: calibrated(Recording(ENVIRONMENT, even)))
    monkeypatch.setattr("validation.calibrate.calibrated", lambda recording: once())
    arguments = ("calibrate", "--fit-only", "--records", str(records), "--out", str(out), "--json")
    code, _, errors = moesim(*arguments)
    assert (code, out.exists()) == (1, False)
    assert "is not written: a simple rule predicts layer forward" in errors
    code, _, _ = moesim(*arguments, "--force")
    assert (code, out.exists()) == (0, True)


def test_calibrate_without_pytorch_names_the_extra(
    moesim: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("validation.calibrate.find_spec", lambda name: None)
    code, output, errors = moesim("calibrate", "--quick", "--out", str(tmp_path / "mine.yaml"))
    assert (code, output) == (2, "")
    assert errors.splitlines()[-1] == "measuring needs PyTorch: pip install 'moesim[validation]'"


def test_calibrate_without_a_file_to_write_says_so(moesim: Run, tmp_path: Path) -> None:
    assert moesim("calibrate")[::2] == (2, "--out: name the profile to write, for example --out my-machine.yaml\n")
    code, _, errors = moesim("calibrate", "--fit-only", "--out", str(tmp_path / "x.yaml"))
    assert (code, errors) == (2, f"{tmp_path / 'x.jsonl'}: cannot be read: No such file or directory\n")


# Judging recordings


def test_every_target_is_judged_with_noise_and_simple_rules_beside(
    found: Calibration, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "find_spec", lambda name: None)
    monkeypatch.setattr(calibration, "calibration_of", lambda path: found)
    write_records(recording, tmp_path / "known.jsonl")
    rows = calibration.judge(tmp_path)
    judged = [row for row in rows if row["ok"] is not None]
    assert len(judged) == len(calibration.TARGETS["cpu"])
    assert {row["group"] for row in rows} == {"calibration: known"}
    missed = [row["name"] for row in judged if not row["ok"]]
    assert missed == []
    names = [row["name"] for row in rows]
    assert "layer, forward, MAPE: second pass against first" in names
    assert "layer, forward, MAPE: one fixed rate" in names
    assert "stride ratio, MAPE: rate and overhead" in names


def test_without_recordings_a_notice_says_so(tmp_path: Path) -> None:
    assert calibration.recordings(tmp_path) == []
    assert "validation/measured holds no recording yet: no timing is judged" in calibration.notices(tmp_path)


def test_a_record_is_judged_once_until_it_changes(recording: Recording, tmp_path: Path) -> None:
    few = Recording(recording.environment, tuple(each for each in recording.records if each.kind in ("gemm", "memory")))
    path = write_records(few, tmp_path / "few.jsonl")
    first = calibration.calibration_of(path)
    assert calibration.calibration_of(path) is first
    assert {row.name for row in first.rows()} == {"gemm", "memory", "products over 1 ms"}
    append(path, replace(few.records[0], number=3))
    assert len(calibration.calibration_of(path).recording.records) == len(few.records) + 1


# Live


def test_a_live_step_stands_beside_the_estimate_and_the_simple_rules(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, found: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "known.yaml"
    write(found, path)
    scenario = load_scenario("small-transformer", {"cluster.profile": str(path), "training.precision": "fp32"})
    asked: list[dict[str, Any]] = []

    def timed(fields: dict[str, Any]) -> dict[str, float]:
        asked.append(fields)
        return {"seconds": 0.5, "median_s": 0.6, "repeats": 8}

    monkeypatch.setattr(calibration, "_timed", timed)
    rows = calibration.judge_live(scenario, recording)
    assert [row["name"] for row in rows] == [
        "step of Small transformer",
        "median of the steps",
        "one fixed MFU of the calibration's steps",
        "MFU and overhead of the calibration's steps",
    ]
    assert rows[0]["expected"] == 0.5
    assert rows[0]["reached"] == pytest.approx(estimate(scenario).step_time_s)
    assert asked[0]["implementation"] == "batched"
    assert asked[0]["model"]["moe"]["stride"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training.global_batch_sequences": 4}, "one accelerator and one microbatch"),
        ({"training.precision": "fp16"}, "run in fp32 or bf16"),
    ],
)
def test_a_step_that_cannot_be_run_live_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        calibration.step_case(load_scenario("small-transformer", change))
    assert message in str(caught.value)


def test_validate_live_needs_a_profile(moesim: Run) -> None:
    code, output, errors = moesim("validate", "--live")
    assert (code, output) == (2, "")
    assert errors == "--profile: name the profile of this machine: moesim calibrate --out FILE writes it\n"


def test_validate_calibration_prints_rows_and_draws(
    moesim: Run, found: Calibration, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(recording, tmp_path / "known.jsonl")
    monkeypatch.setattr(calibration, "calibration_of", lambda path: found)
    monkeypatch.setattr("validation.calibration.judge", lambda: list(calibration.judge_recording("known", found)))
    monkeypatch.setattr("validation.calibration.recordings", lambda: [tmp_path / "known.jsonl"])
    monkeypatch.setattr("validation.calibration.notices", lambda: ["a notice"])
    page = tmp_path / "page.html"
    code, output, errors = moesim("validate", "--calibration", "--figure", str(page), "--json")
    result = json.loads(output)
    assert (code, errors) == (0, f"a notice\nwrote {page}\n")
    assert result["summary"]["calibration"]["calibration: known"]["missed"] == []
    assert "Measured against predicted" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--figure", "x.html"), "--figure: draws recorded timings; add --calibration\n"),
        (("--profile", "x.yaml"), "--profile: is that of this machine; add --live\n"),
    ],
)
def test_options_without_their_check_are_refused(moesim: Run, arguments: tuple[str, ...], message: str) -> None:
    assert moesim("validate", *arguments) == (2, "", message)
