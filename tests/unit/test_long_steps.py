"""A long step from two shorter ones: the same to rounding where microbatches cost the same, else the whole."""

from __future__ import annotations

from typing import Any

import pytest

from simulator import load_scenario
from simulator.campaign import simulate_step
from validation.long_steps import played, shortened

DENSE: dict[str, Any] = {
    "name": "long",
    "model": "llama-2-70b",
    "cluster": {"profile": "a100-sxm-80gb", "accelerators": 64},
    "parallelism": {"tensor": 8, "pipeline": 4, "schedule": "1f1b"},
    "training": {"tokens": "1T", "sequence_length": 2048, "global_batch_sequences": 96},
    "cost": {"price_per_accelerator_hour": "1 USD"},
}
MOE: dict[str, Any] = {
    "name": "long",
    "model": "mixtral-8x7b",
    "cluster": {"profile": "h100-sxm", "accelerators": 32},
    "parallelism": {"pipeline": 4, "expert": 8, "schedule": "1f1b"},
    "training": {"tokens": "1T", "sequence_length": 4096, "global_batch_sequences": 320},
    "cost": {"price_per_accelerator_hour": "1 USD"},
}
PADDED = {"routing.capacity_factor": 1.0, "routing.pad_to_capacity": True, "routing.capacity_scope": "rank"}


@pytest.mark.parametrize(
    ("base", "changes", "engine"),
    [
        (DENSE, {}, "max-plus"),
        (DENSE, {"parallelism.schedule": "interleaved", "parallelism.virtual_stages": 3}, "max-plus"),
        (
            DENSE,
            {"parallelism.pipeline": 1, "parallelism.zero_stage": 3, "training.global_batch_sequences": 192},
            "max-plus",
        ),
        (MOE, PADDED, "events"),
    ],
    ids=["1f1b", "interleaved", "fsdp", "moe"],
)
def test_two_short_steps_tell_a_long_one(base: dict[str, Any], changes: dict[str, Any], engine: Any) -> None:
    scenario = load_scenario(base, changes)

    short, whole = played(scenario, engine), simulate_step(scenario, engine)

    assert len(short.parts) == 2
    assert short.longest.layout.microbatches < whole.layout.microbatches
    assert short.seconds == pytest.approx(whole.seconds, rel=1e-9)
    assert sum(short.breakdown.values()) == pytest.approx(whole.seconds, rel=1e-9)
    # Which part of a pause is a bubble and which a send on its way is told less exactly.
    assert _merged(short.breakdown) == pytest.approx(_merged(dict(whole.timeline.breakdown)), rel=1e-6, abs=1e-6)
    assert short.longest.memory.terms == pytest.approx(whole.memory.terms)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (MOE, {"routing.load": {"kind": "logits", "population": 0.5}}),
        (DENSE, {"parallelism.schedule": "gpipe"}),
        (DENSE, {"parallelism.schedule": "dualpipe"}),
        (DENSE, {"training.global_batch_sequences": 20}),
        (DENSE, {"training.global_batch_sequences": 98}),
    ],
    ids=["uneven loads", "gpipe", "dualpipe", "short", "not whole rounds"],
)
def test_other_steps_are_played_to_the_end(base: dict[str, Any], changes: dict[str, Any]) -> None:
    scenario = load_scenario(base, changes)

    step = played(scenario, "max-plus")

    assert [weight for weight, _ in step.parts] == [1.0]
    assert step.seconds == simulate_step(scenario, "max-plus").seconds


@pytest.mark.parametrize("seed", [0, 1])
def test_loads_that_differ_by_chance_alone_are_told_by_some_of_them(seed: int) -> None:
    scenario = load_scenario(MOE, {"routing.seed": seed, "training.global_batch_sequences": 640})

    step = played(scenario, "max-plus")

    assert len(step.parts) == 2
    assert step.seconds == pytest.approx(simulate_step(scenario, "max-plus").seconds, rel=2e-3)


def test_uneven_loads_are_shortened_when_asked() -> None:
    scenario = load_scenario(MOE, {"routing.load": {"kind": "logits", "population": 0.5}})

    step = shortened(scenario, "max-plus")

    assert step is not None
    assert step.seconds == pytest.approx(simulate_step(scenario, "max-plus").seconds, rel=0.05)


def _merged(terms: dict[str, float]) -> dict[str, float]:
    pauses = ("bubble", "exposed_pipeline")
    return {name: value for name, value in terms.items() if name not in pauses} | {
        "pauses": sum(terms.get(name, 0.0) for name in pauses)
    }
