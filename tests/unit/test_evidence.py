"""Published runs are data that holds: every row is a scenario, says where it is from, and cannot be impossible."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from simulator import load_scenario
from simulator.layout import resolve
from simulator.spec.scenario import Scenario
from simulator.workload import flops, parameters
from validation.evidence import PublishedRun, Source, published_runs, role_of, sources
from validation.quantities import UNITS, Convention, flop_per_token, from_memory, from_step_time, step_time_behind

SPEEDS = {"step_time_s", "step_time_ms", "tokens_per_s_per_accelerator", "samples_per_s", "mfu_percent", "mfu"}
SPEEDS |= {"tflop_per_s_per_accelerator", "mfu_noncausal", "gpu_hours", "gpu_hours_per_trillion_tokens"}

every_source = pytest.mark.parametrize("source", sources(), ids=lambda source: source.name)


def all_runs(source: Source) -> tuple[PublishedRun, ...]:
    return (*source.runs(), *source.memory_runs())


def implied(run: PublishedRun, scenario: Scenario, convention: Convention) -> dict[str, float]:
    """Step time behind each printed speed of a run."""
    return {
        quantity.name: step_time_behind(quantity.name, quantity.value, scenario, convention)
        for quantity in run.quantities
        if quantity.name in SPEEDS
    }


@cache
def first_points() -> tuple[tuple[PublishedRun, Scenario, Convention], ...]:
    """Every run with the scenario and convention of the first of its swept values."""
    return tuple((run, *run.at(next(run.points()))) for source in sources() for run in source.runs())


@every_source
def test_every_row_at_every_swept_value_is_a_scenario(source: Source) -> None:
    placed: set[str] = set()
    for run in all_runs(source):
        for point in run.points():
            scenario, _ = run.at(point)
        if run.layout not in placed:
            resolve(scenario)
        placed.add(run.layout)


@every_source
def test_a_source_says_where_it_is_from_and_what_it_leaves_out(source: Source) -> None:
    assert source.source.url.startswith(("https://arxiv.org/abs/", "https://github.com/"))
    assert all((source.source.title, source.rule, source.conventions))
    for run in all_runs(source):
        assert run.complete is not bool(run.sweep), f"{run.id}: incomplete rows sweep what is left open, complete none"
        assert all(len(values) > 1 for values in run.sweep.values()), run.id
        assert all(UNITS[quantity.name] == quantity.unit and quantity.source for quantity in run.quantities)
        judged_alone = run.quantities and run.complete
        assert not judged_alone or run.tolerance is not None, run.id


@every_source
def test_ids_are_unique_and_contrasts_name_rows_that_have_the_quantity(source: Source) -> None:
    runs = {run.id: run for run in all_runs(source)}
    assert len(runs) == len(all_runs(source))
    for contrast in source.contrasts:
        assert contrast.quantity in UNITS
        for end in contrast.of:
            measured = {quantity.name for quantity in runs[end].quantities}
            stated = contrast.ratio is not None or contrast.difference is not None
            assert stated or contrast.quantity in measured, f"{contrast.name}: {end}"


def test_ids_differ_between_sources_too() -> None:
    names = Counter((source.name, run.id) for source in sources() for run in all_runs(source))
    assert set(names.values()) == {1}


def test_a_third_of_the_layouts_is_set_aside_by_their_hash() -> None:
    layouts = {(run.source, run.layout): run.role for source in sources() for run in all_runs(source)}
    example = ("deepseek-v3", "mpft")
    assert layouts.pop(example) == "fit"
    for (source, layout), role in layouts.items():
        digest = hashlib.sha256(f"{source}/{layout}".encode()).hexdigest()
        assert role == role_of(source, layout) == ("test" if int(digest, 16) % 3 == 0 else "fit")
    share = sum(role == "test" for role in layouts.values()) / len(layouts)
    assert share == pytest.approx(1 / 3, abs=0.03)


def test_rows_of_one_layout_share_a_role() -> None:
    for source in sources():
        roles = {(run.layout, run.role) for run in all_runs(source)}
        assert len(roles) == len({layout for layout, _ in roles})


def test_the_page_lists_every_source_with_its_counts() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "evidence.md").read_text("utf-8")
    listed = {
        cells[1].strip(" `"): cells[3:7] for cells in (line.split("|") for line in page.splitlines()) if len(cells) == 8
    }
    for source in sources():
        runs = source.runs()
        counts = (len(runs), sum(run.complete for run in runs), len(source.memory), len(source.contrasts))
        assert [int(cell.strip() or 0) for cell in listed[source.name]] == list(counts), source.name


def test_rows_by_family() -> None:
    counts: Counter[str] = Counter()
    for source in sources():
        counts.update(run.family for run in source.runs())
    assert counts == {
        "deepseek-v3-h800": 1,
        "moe-h100": 48,
        "moe-b200": 5,
        "moe-b200-node": 6,
        "moe-a100": 2,
        "moe-tpu": 14,
        "dense-h100": 36,
        "dense-h100-fsdp": 41,
        "dense-b200": 4,
        "dense-b200-node": 12,
        "dense-a100": 67,
        "dense-a100-fsdp": 76,
        "dense-a100-node": 376,
        "dense-tpu": 6,
    }


def test_no_measured_speed_exceeds_the_chips_peak() -> None:
    """The causal FLOPs of a step within the implied time stay below the dense peak of the products' format."""
    for run, scenario, convention in first_points():
        peaks = {str(name): peak.value for name, peak in scenario.cluster.profile.accelerator.peak.items()}
        peak = peaks[scenario.training.precision.gemm]
        for name, seconds in implied(run, scenario, convention).items():
            rate = from_step_time("tflop_per_s_per_accelerator", seconds, scenario, Convention(flop="causal"))
            assert 0.0 < rate * 1e12 < peak, f"{run.source}/{run.id}: {name} implies {rate:.0f} TFLOP/s"


def test_no_measured_peak_exceeds_the_chips_memory() -> None:
    for run, scenario, _ in first_points():
        limit = scenario.cluster.profile.accelerator.memory_bytes.value
        peaks = [quantity.value * 2**30 for quantity in run.quantities if quantity.name == "memory_peak_gib"]
        assert all(0.0 < peak < limit for peak in peaks), run.id


def test_speeds_that_a_source_prints_twice_agree_through_its_convention() -> None:
    """Tokens per second, TFLOP/s, MFU and step time of one row are one measurement: shapes and convention are right.

    Printed numbers are rounded, some releases of Megatron-Bridge to multiples of 16 tokens per second.
    """
    compared = 0
    for run, scenario, convention in first_points():
        times = list(implied(run, scenario, convention).values())
        if len(times) > 1:
            compared += 1
            assert max(times) / min(times) < 1.025, f"{run.source}/{run.id}"
    assert compared == 51


def test_parameter_counts_that_a_source_prints_are_those_of_our_shapes() -> None:
    for run, scenario, _ in first_points():
        for quantity in run.quantities:
            if quantity.name == "parameters_total":
                assert parameters.count(scenario.model).total.total == pytest.approx(quantity.value, rel=1e-3), run.id


def test_flops_with_recomputation_are_those_of_equation_3() -> None:
    """96 B s l h^2 (1 + s/6h + V/16lh) of arXiv 2104.04473, per token."""
    runs = {run.id: run for source in sources() if source.name == "megatron-sc21" for run in source.runs()}
    scenario, convention = runs["sc21-7"].at(next(runs["sc21-7"].points()))
    layers, hidden, length, vocabulary = 105, 20480, 2048, 51200
    expected = 96 * layers * hidden**2 * (1 + length / (6 * hidden) + vocabulary / (16 * layers * hidden))
    assert flop_per_token(scenario, convention) == pytest.approx(expected, rel=1e-12)


def test_quantities_and_step_time_are_inverse() -> None:
    scenario = load_scenario("deepseek-v3")
    for name in SPEEDS:
        value = from_step_time(name, 20.0, scenario, Convention(flop="noncausal"))
        assert step_time_behind(name, value, scenario, Convention(flop="noncausal")) == pytest.approx(20.0)
    for name in ("bubble_s", "states_gib"):
        with pytest.raises(KeyError):
            from_step_time(name, 20.0, scenario, Convention())


def test_conventions_order_as_they_should() -> None:
    """More is counted with MTP, with the whole matrix, and with recomputation under full recomputation only."""
    scenario = load_scenario("deepseek-v3")
    counted = [
        flop_per_token(scenario, Convention()),
        flop_per_token(scenario, Convention(mtp_counted=True)),
        flop_per_token(scenario, Convention(flop="noncausal", mtp_counted=True)),
    ]
    assert counted[0] == flops.count(scenario).model_flop_per_token
    assert all(before < after for before, after in pairwise(counted))
    assert flop_per_token(scenario, Convention(recompute_counted=True)) == counted[0]


def test_memory_quantities_sum_their_terms() -> None:
    terms = {"weights_dense": 2e9, "gradients_expert": 4e9, "optimizer_dense": 6e9, "saved_norm": 8e9, "logits": 1e9}
    assert [from_memory(name, terms) for name in ("weights_and_gradients_gb", "optimizer_gb", "activations_gb")] == [
        6.0,
        6.0,
        8.0,
    ]
    assert from_memory("memory_peak_gib", terms) == 21e9 / 2**30


def test_swept_axes_are_paths_or_named_cases() -> None:
    runs = {run.id: run for source in sources() if source.name == "parallel-folding" for run in source.runs()}
    run = runs["mpf-04"]
    points = list(run.points())
    assert len(points) == 8
    seen = set()
    for point in points:
        scenario, convention = run.at(point)
        seen.add((scenario.parallelism.virtual_stages, scenario.training.recompute, convention.flop))
    assert len(seen) == 8


def test_shipped_scenarios_that_were_published_as_they_are() -> None:
    assert [(run.scenario, run.id, run.role, run.complete) for run in published_runs()] == [
        ("deepseek-v3", "mpft", "fit", True)
    ]
