"""Without a part of the physics: what is taken away is gone, and nothing else."""

from __future__ import annotations

import pytest

from simulator import load_scenario
from simulator.campaign import simulate_step
from simulator.layout import resolve
from simulator.spec import Scenario
from simulator.timing.kernels import Device, gemm_seconds
from validation.ablation import PARTS, Part, without
from validation.evidence import sources

SKEWED = load_scenario(
    "quickstart", {"routing.load": {"kind": "logits", "population": 1.0}, "parallelism.overlap": ["gradient_reduce"]}
)


def test_without_curves_every_shape_runs_at_the_same_rate() -> None:
    flat = Device.of(without("curves", SKEWED).cluster.profile)
    real = Device.of(SKEWED.cluster.profile)

    def rates(device: Device) -> list[float]:
        shapes = [(8192, 8192, 8192), (8192, 8192, 1024), (4096, 1000, 4096)]
        return [2.0 * m * n * k / float(gemm_seconds(device, "bf16", "F", m, n, k)) for m, n, k in shapes]

    assert max(rates(flat)) / min(rates(flat)) < 1.04  # reading the operands still takes time
    assert max(rates(real)) / min(rates(real)) > 1.08


def test_without_skew_every_expert_is_equally_likely() -> None:
    assert without("skew", SKEWED).routing.load.kind == "balanced"
    assert without("skew", without("skew", SKEWED)) == without("skew", SKEWED)


@pytest.mark.parametrize(("part", "slower"), [("overlap", True), ("skew", False), ("curves", False)])
def test_what_is_left_is_slower_without_overlap_and_faster_without_losses(part: Part, slower: bool) -> None:
    def seconds(scenario: Scenario) -> float:
        return simulate_step(scenario, "max-plus").seconds

    ratio = seconds(without(part, SKEWED)) / seconds(SKEWED)

    assert ratio > 1.0 if slower else ratio < 1.0
    assert part in PARTS


def test_no_complete_layout_falls_out_of_a_column() -> None:
    layouts = {
        (source.name, run.layout): run.at(next(run.points()))[0]
        for source in sources()
        for run in source.runs()
        if run.complete and run.role == "fit"
    }
    for part in PARTS:
        changed = [without(part, scenario) for scenario in layouts.values()]
        assert len([resolve(scenario) for scenario in changed]) == len(layouts)  # one that is refused raises
