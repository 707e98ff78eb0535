"""Kernel times that vary between ranks: drawn once, the same for both engines, and paid for at the barrier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from simulator import estimate, simulate_step
from simulator.campaign import Step
from simulator.events import evaluate_batch
from simulator.events.jitter import expected_largest
from simulator.program import COMPUTE, REPLICAS
from simulator.spec import EngineName, Scenario, load_scenario
from simulator.timing import Compute, Fixed, Update
from tests.scenarios import two_stages

SMALL = two_stages(accelerators=64, sequences=512)


def leaf(value: float) -> dict[str, Any]:
    return {"value": value, "source": next(iter(load_scenario(SMALL).cluster.profile.sources)), "kind": "assumed"}


def small(jitter: float | None, **changes: Any) -> Scenario:
    stated = {} if jitter is None else {"cluster.overrides.jitter": leaf(jitter)}
    return load_scenario(SMALL, {**changes, **stated})


def step(jitter: float | None, engine: EngineName = "max-plus", **changes: Any) -> Step:
    return simulate_step(small(jitter, **changes), engine)


def noise(jitter: float, **changes: Any) -> Any:
    made = step(jitter, **changes)
    assert made.prices.noise is not None
    kernels = np.array([isinstance(cls, Compute | Update) for cls in made.program.classes])[made.program.cls]
    return made.prices.noise[kernels]


def test_without_a_jitter_nothing_changes() -> None:
    plain, none = step(None), step(0.0)

    assert small(None).cluster.profile.jitter is None
    assert plain.prices.noise is None
    assert REPLICAS not in plain.prices.families
    assert none.timeline.end.tobytes() == plain.timeline.end.tobytes()


def test_factors_have_mean_one_and_the_stated_spread() -> None:
    factors = noise(0.1)

    assert factors.shape[1] == 8
    assert factors.mean() == pytest.approx(1.0, abs=0.005)
    assert factors.std() == pytest.approx(0.1, rel=0.03)
    assert np.abs(np.corrcoef(factors.T) - np.eye(8)).max() < 0.2


def test_the_seed_decides() -> None:
    first, again, other = noise(0.1), noise(0.1), noise(0.1, **{"routing.seed": 1})

    assert first.tobytes() == again.tobytes()
    assert not np.allclose(first, other)


def test_only_kernels_vary() -> None:
    made = step(0.1)
    assert made.prices.noise is not None
    assert (made.prices.noise[made.program.stream != COMPUTE] == 1.0).all()


def test_both_engines_see_the_same_numbers() -> None:
    """No link is shared here: all communication of a rank is on one stream."""
    alone: dict[str, Any] = {"parallelism.pipeline": 1, "parallelism.overlap": []}
    events, recursion = step(0.05, "events", **alone), step(0.05, **alone)

    assert np.allclose(events.timeline.end, recursion.timeline.end, rtol=1e-9)
    together = evaluate_batch(recursion.program, [events.prices, recursion.prices])
    assert together.tolist() == pytest.approx([events.seconds] * 2, rel=1e-9)


def test_scenarios_with_one_seed_share_the_drawn_numbers() -> None:
    """Prices do not matter to them: here a slower link. They are drawn once, and nobody can write into them."""
    slower = {"cluster.overrides": {"jitter": leaf(0.1), "tiers.nvlink.bandwidth": "10 GB/s"}}
    first, second = step(0.1), simulate_step(load_scenario(SMALL, slower), "max-plus")

    assert first.seconds < second.seconds
    assert first.prices.noise is not None
    assert first.prices.noise is second.prices.noise
    assert not first.prices.noise.flags.writeable
    reseeded: dict[str, Any] = {"routing.seed": 1}
    assert step(0.1, **reseeded).prices.noise is not first.prices.noise


def test_ranks_wait_for_each_other_the_longer_the_more_kernels_vary() -> None:
    times = [step(value).seconds for value in (None, 0.02, 0.05, 0.1)]

    assert times == sorted(times)


def test_the_wait_for_the_slowest_replica_is_its_expected_value() -> None:
    """z(4) x 10 % x sqrt(sum of squares) of the slowest lane of every pipeline rank."""
    made, plain = step(0.1), step(None)
    program, prices = plain.program, plain.prices
    kernels = np.flatnonzero([isinstance(program.classes[c], Compute | Update) for c in program.cls])
    seconds = (plain.timeline.end - plain.timeline.start)[kernels]
    squares = np.stack([(seconds[program.rank[kernels] == rank] ** 2).sum(axis=0) for rank in range(2)])
    expected = 1.0294 * 0.1 * np.sqrt(squares.max(axis=1))

    waits = np.flatnonzero(
        [
            isinstance(cls, Fixed) and cls.family == REPLICAS
            for cls in (made.program.classes[c] for c in made.program.cls)
        ]
    )
    durations = (made.timeline.end - made.timeline.start)[waits]
    assert prices.lanes == 8
    assert made.program.rank[waits].tolist() == [0, 1]
    assert durations == pytest.approx(np.repeat(expected[:, None], 8, axis=1), rel=1e-3)
    assert made.timeline.breakdown[REPLICAS] == pytest.approx(expected.mean(), rel=1e-3)
    assert made.timeline.breakdown.total == pytest.approx(made.seconds)


def test_one_replica_waits_for_nobody() -> None:
    single: dict[str, Any] = {"cluster.accelerators": 16}
    made = step(0.1, **single)

    assert REPLICAS not in made.timeline.breakdown
    assert made.prices.noise is not None


def test_the_largest_of_some_normal_numbers() -> None:
    """Against a drawing, and the known values for 1, 2 and 3: 0, 1/sqrt(pi), 3/(2 sqrt(pi))."""
    drawn = np.random.default_rng(0).standard_normal((20_000, 64)).max(axis=1).mean()

    assert expected_largest(64) == pytest.approx(drawn, rel=0.005)
    assert [expected_largest(n) for n in (1, 2, 3)] == pytest.approx([0.0, np.pi**-0.5, 1.5 * np.pi**-0.5], abs=1e-6)


def test_many_replicas_drawn_one_by_one_end_as_late_as_expected() -> None:
    """The mean over seeds of the slowest of 8 drawn groups, against one group and the expected wait.

    The formula takes the spread of a single rank, but collectives average some of it away: it is an upper bound here.
    """
    one: dict[str, Any] = {
        "cluster.accelerators": 16,
        "training.global_batch_sequences": 128,
    }  # the same work, a single replica
    ends = np.array([step(0.1, **{**one, "routing.seed": seed}).seconds for seed in range(24)])
    slowest = ends.reshape(3, 8).max(axis=1).mean() - ends.mean()
    many: dict[str, Any] = {"cluster.accelerators": 128, "training.global_batch_sequences": 1024}

    assert 0.0 < slowest < step(0.1, **many).timeline.breakdown[REPLICAS]


def test_what_was_assumed_is_said() -> None:
    text = " ".join(estimate(small(0.1), "max-plus").assumptions)

    assert "kernel times vary by 0.1 between ranks" in text
    assert "the slowest of 4 replicas is an expected value" in text
