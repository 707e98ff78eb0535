"""Expert load over training steps: strategies on the same tendencies, and what they leave over."""

from __future__ import annotations

from typing import Any

import pytest

from simulator import estimate, load_scenario
from simulator.errors import InvalidInput, NotSimulated
from simulator.spec import Scenario
from simulator.study import LoadRow, load_over_steps
from simulator.study.balancing import STRATEGIES, about_nine

GROWING = {"kind": "logits", "population": 1.0, "growth": {"start": 0.05, "steps": 20}}
STEPS = [0, 60, 200]


def _scenario(**routing: Any) -> Scenario:
    return load_scenario(
        {
            "name": "small",
            "model": {"preset": "olmoe-1b-7b", "set": {"layers": 4}},
            "cluster": {"profile": "h100-sxm", "accelerators": 8},
            "parallelism": {"expert": 8},
            "training": {"tokens": "1B", "sequence_length": 512, "global_batch_sequences": 64},
            "routing": {"load": GROWING, **routing},
        }
    )


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int], LoadRow]:
    return {(row.strategy, row.step): row for row in load_over_steps(_scenario(), STEPS)}


def test_every_strategy_has_a_row_at_every_step(rows: dict[tuple[str, int], LoadRow]) -> None:
    assert list(rows) == [(strategy, step) for strategy in STRATEGIES for step in STEPS]
    assert list(rows["none", 0].as_dict()) == [
        "strategy", "step", "cv", "max_violation", "batch_max_over_mean", "capacity_factor",
        "dropped_fraction_at_capacity_factor",
    ]  # fmt: skip
    assert {row.capacity_factor for row in rows.values()} == {1.25}


def test_popularity_grows_without_balancing_and_every_remedy_reins_it_in(rows: dict[tuple[str, int], LoadRow]) -> None:
    for key in ("cv", "max_violation", "batch_max_over_mean", "dropped_fraction_at_capacity_factor"):
        alone = [getattr(rows["none", step], key) for step in STEPS]
        assert alone == sorted(alone), key
        for strategy in ("importance loss", "load-balance loss", "bias"):
            assert getattr(rows[strategy, 200], key) < 0.6 * alone[-1], (strategy, key)
    # The bias starts at zero; softmax scores of tokens of different sums have not quite the threshold of logits.
    assert rows["none", 0].max_violation == pytest.approx(rows["bias", 0].max_violation, rel=0.03)


def test_a_microbatch_is_less_even_than_a_batch(rows: dict[tuple[str, int], LoadRow]) -> None:
    for row in rows.values():
        assert row.batch_max_over_mean > 1.0 + row.max_violation
        assert 0.0 < row.cv < row.max_violation


def test_the_same_scenario_gives_the_same_rows() -> None:
    assert load_over_steps(_scenario(), [0, 20]) == load_over_steps(_scenario(), [0, 20])
    assert load_over_steps(_scenario(), [20]) != load_over_steps(_scenario(seed=1), [20])


def test_the_scenarios_own_strategy_comes_first_unless_it_is_one_of_the_others() -> None:
    own = load_over_steps(_scenario(balance=[{"kind": "sequence", "weight": 0.01}]), [0])
    assert [row.strategy for row in own] == ["as stated", *STRATEGIES]
    stated = _scenario(balance=[{"kind": "bias", "gamma": 0.001}])  # the weight of the paper, written out
    assert [row.strategy for row in load_over_steps(stated, [0])] == list(STRATEGIES)


def test_given_strategies_replace_the_usual_ones() -> None:
    mixed = {"both": [{"kind": "bias"}, {"kind": "sequence"}]}
    assert [row.strategy for row in load_over_steps(_scenario(), [0, 1], mixed)] == ["both", "both"]
    with pytest.raises(InvalidInput) as caught:
        load_over_steps(_scenario(), [0], {"wrong": [{"kind": "bia"}]})
    assert "strategy 'wrong'" in str(caught.value)


def test_drops_are_those_at_the_stated_capacity_factor_and_of_an_estimate() -> None:
    scenario = _scenario(capacity_factor=1.0, at_step=200)
    (row,) = load_over_steps(scenario, [200], {"none": []})
    assert row.capacity_factor == 1.0
    values = estimate(scenario, "max-plus").as_dict()
    assert row.dropped_fraction_at_capacity_factor == pytest.approx(values["dropped_token_fraction"], rel=0.05)
    assert row.batch_max_over_mean == pytest.approx(values["expert_load_max_over_mean"], rel=0.1)
    kept = load_over_steps(_scenario(capacity_factor=1.0, overflow="none"), [200], {"none": []})
    assert kept[0].dropped_fraction_at_capacity_factor == 0.0


def test_what_does_not_change_over_steps_is_refused() -> None:
    dense = load_scenario(
        {
            "name": "dense",
            "model": "mistral-7b",
            "cluster": {"profile": "h100-sxm", "accelerators": 8},
            "training": {"tokens": "1B", "sequence_length": 512, "global_batch_sequences": 64},
        }
    )
    with pytest.raises(NotSimulated):
        load_over_steps(dense, [0])
    tree = _scenario(load={"kind": "balanced"}).as_dict()
    tree["model"]["moe"]["router"]["kind"] = "expert_choice"
    with pytest.raises(NotSimulated) as caught:
        load_over_steps(load_scenario(tree), [0])
    assert "equally loaded" in str(caught.value)
    tree["model"]["moe"]["router"]["kind"] = "hash"
    with pytest.raises(NotSimulated) as caught:
        load_over_steps(load_scenario(tree), [0])
    assert "that of its table" in str(caught.value)


@pytest.mark.parametrize("last", [1, 2, 7, 10, 11, 99, 100, 101, 1000, 12345, 10**9])
def test_shown_steps_are_few_and_round(last: int) -> None:
    steps = about_nine(last)
    assert steps[0] == 0
    assert steps[-1] == last
    assert steps == sorted(set(steps))
    assert min(last + 1, 6) <= len(steps) <= 11


# --- assumptions ------------------------------------------------------------------------------------------------------


def _assumed(**routing: Any) -> str:
    return "\n".join(estimate(_scenario(**routing), "max-plus").assumptions)


def test_an_estimate_says_which_remedies_act() -> None:
    remedies = [{"kind": kind} for kind in ("bias", "load_balance", "z", "device")]
    said = _assumed(balance=remedies, at_step=20)
    assert "remedies that act on the stated load: bias, load-balance loss; losses shrink popularity by a law" in said
    assert "remedies without an effect on the load: device loss" in said  # a router without groups has one device
    assert "the router z-loss has no effect on the load" in said
    assert "settled router" not in said
    assert "a law fitted" not in _assumed(balance=[{"kind": "bias"}])
    said = _assumed(load={"kind": "balanced"}, balance=[{"kind": "bias"}])
    assert "the stated load is balanced: it leaves bias nothing to do" in said
    assert "settled router" not in said


def test_an_estimate_says_that_the_router_has_settled() -> None:
    settled = "the load is that of the settled router; the first steps are left out"
    fixed = {"kind": "logits", "population": 1.0}
    assert settled in _assumed()
    assert settled in _assumed(load=fixed, balance=[{"kind": "bias"}])
    assert settled not in _assumed(load=fixed)


def test_an_estimate_says_what_does_not_act() -> None:
    tree = _scenario(balance=[{"kind": "bias"}]).as_dict()
    tree["model"]["moe"]["router"]["kind"] = "expert_choice"
    said = "\n".join(estimate(load_scenario(tree), "max-plus").assumptions)
    assert "equally loaded: routing.load and routing.balance do not act" in said
    tree["model"]["moe"]["router"] |= {"kind": "softmax", "second_choice": "random"}
    assert "second choices that the router makes at random are all counted" in "\n".join(
        estimate(load_scenario(tree), "max-plus").assumptions
    )
    recorded = estimate(load_scenario("recorded-load", {"routing.balance": [{"kind": "bias"}]}), "max-plus")
    assert "remedies are part of a recorded load; routing.balance does not act on it" in recorded.assumptions


def test_an_estimate_says_that_copies_of_experts_are_counted() -> None:
    said = _assumed(placement={"kind": "balanced", "redundant_experts": 8})
    assert "redundant experts: weights and gradients are counted on every rank that holds a copy" in said
