"""What PyTorch does here and now: a step of a small model runs, and drops agree with the simulator's."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from simulator import load_scenario
from simulator.errors import InvalidInput
from validation import calibration, live
from validation.suites import Effort

TINY = {
    "model.layers": 2,
    "model.hidden_size": 32,
    "model.vocabulary_size": 64,
    "model.mixer": {"kind": "mha", "heads": 2, "head_dim": 16},
    "model.moe.expert_ffn_size": 32,
    "cluster.profile": "h100-sxm",
}


def tiny_step(**changes: Any) -> dict[str, Any]:
    """The tiny step; a profile without FP32 expert products cannot estimate it, but it runs."""
    scenario = load_scenario("small-transformer", TINY)
    return {**calibration.step_case(scenario), "form": "fp32", **changes}


def test_a_scenarios_step_runs_and_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EFFORT", Effort(seconds=0.0, repeats=3, patience_s=1.0))
    found = live.step(tiny_step())
    assert found["repeats"] >= 3
    assert 0.0 < found["seconds"] <= found["median_s"]


def test_a_step_that_pytorch_refuses_gets_one_message() -> None:
    model = {**tiny_step()["model"], "mtp_depth": 1}
    with pytest.raises(InvalidInput) as caught:
        calibration._timed(tiny_step(model=model))
    assert str(caught.value).startswith("the step cannot be run here: ")
    assert "mtp_depth" in str(caught.value)


def test_drops_are_those_of_the_simulator() -> None:
    found = live.drops()
    assert [check["ok"] for check in found] == [True, True, True]
    assert found[0]["reached"] == 0.0
