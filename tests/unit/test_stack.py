"""The stack term: found again where it is known, from the others alone, and worthless on shuffled measurements."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.campaign import simulate_step
from simulator.spec import load_scenario
from validation.long_steps import Played
from validation.stack import (
    GAPS,
    ISSUES_S,
    LEAST_LAYOUTS,
    Observation,
    Response,
    StackTerm,
    fitted,
    of_the_others,
    own_gap,
    response,
    spread_of_the_others,
)


def linear(issue_bound: float = 0.0) -> Response:
    """T = 1 + 0.9 g, never under ``issue_bound`` x issue / 100 us."""
    return Response(
        np.array([[max(1.0 + 0.9 * gap, issue_bound * issue / 100e-6) for issue in ISSUES_S] for gap in GAPS])
    )


def runs(truth: StackTerm, rng: np.random.Generator, noise: float) -> list[Observation]:
    """Forty runs of twenty layouts that took what the truth says, give or take noise."""
    found = []
    for number in range(40):
        answer = linear(issue_bound=2.0 * (number % 3))
        measured = answer.factor(truth) * np.exp(noise * rng.standard_normal())
        found.append(Observation("stack", f"layout {number // 2}", -float(np.log(measured)), answer))
    return found


def test_a_known_stack_is_found_again() -> None:
    truth = StackTerm(0.2, 80e-6)
    term = fitted(runs(truth, np.random.default_rng(0), 0.01), issues=True)

    assert term is not None
    assert term.gap == pytest.approx(0.2, abs=0.02)
    assert term.issue_s == pytest.approx(80e-6, abs=5e-6)


def test_a_layout_has_no_say_in_its_own_numbers() -> None:
    """One layout that took ten times as long moves the numbers of the others, and not its own."""
    rng = np.random.default_rng(1)
    some = runs(StackTerm(0.1, None), rng, 0.0)
    odd = [Observation("stack", "odd", -np.log(10.0), linear())]

    before = of_the_others(some, issues=False)
    after = of_the_others([*some, *odd], issues=False)

    assert after["odd"] == fitted(some, issues=False)
    assert set(before) | {"odd"} == set(after)


def test_too_few_layouts_give_no_numbers() -> None:
    some = [Observation("stack", f"layout {number}", 0.0, linear()) for number in range(LEAST_LAYOUTS)]

    assert fitted(some[1:], issues=False) is None
    assert of_the_others(some, issues=False) == {each.layout: None for each in some}
    assert spread_of_the_others(some, issues=False) == {each.layout: None for each in some}


def test_the_spread_of_a_stack_is_that_of_the_other_layouts() -> None:
    """Layouts that took gaps of 0.00 to 0.50: those left over, their middle half."""
    answer = linear()
    some = [
        Observation("stack", f"layout {number:02}", -float(np.log(answer.factor(StackTerm(gap, None)))), answer)
        for number, gap in enumerate(np.linspace(0.0, 0.5, 51))
    ]

    found = spread_of_the_others(some, issues=False)
    spread, of_first = found["layout 25"], found["layout 00"]

    assert [own_gap([each], None) for each in some[:3]] == pytest.approx([0.0, 0.01, 0.02], abs=0.006)
    assert spread is not None
    assert (spread[0].gap, spread[1].gap) == pytest.approx((0.125, 0.375), abs=0.015)
    assert of_first is not None
    assert of_first[0].gap > spread[0].gap  # it has no say in its own


def test_shuffled_measurements_destroy_the_fit() -> None:
    """With runs of very different response, the errors left after the fit grow when measurements change places."""
    rng = np.random.default_rng(2)
    some = runs(StackTerm(0.3, 120e-6), rng, 0.02)
    shuffled = [
        Observation(each.stack, each.layout, some[other].log_error, each.response)
        for each, other in zip(some, rng.permutation(len(some)), strict=True)
    ]

    def left(observations: list[Observation]) -> float:
        term = fitted(observations, issues=True)
        assert term is not None
        return float(np.mean([abs(each.log_error + np.log(each.response.factor(term))) for each in observations]))

    assert left(shuffled) > 4.0 * left(some)


def test_the_response_is_what_a_new_estimate_says() -> None:
    """Other numbers in the profile, and the whole step simulated again; both at once are told roughly."""
    step = simulate_step(load_scenario("quickstart"), "max-plus")
    answer = response(Played(step.scenario, ((1.0, step),)))
    for gap, issue, within in ((0.0, 0.0, 0.01), (0.2, 0.0, 0.01), (0.0, 100e-6, 0.01), (0.4, 100e-6, 0.05)):
        stack = step.scenario.cluster.stack_name
        changes = {
            f"cluster.overrides.stacks.{stack}.gap_fraction": gap,
            f"cluster.overrides.stacks.{stack}.issue": f"{issue * 1e6} us",
        }
        again = simulate_step(load_scenario("quickstart", {"cluster.overrides": overrides(changes)}), "max-plus")
        assert answer.factor(StackTerm(gap, issue)) == pytest.approx(again.seconds / step.seconds, rel=within)


def overrides(changes: dict[str, object]) -> dict[str, object]:
    """Paths into the profile alone."""
    return {path.removeprefix("cluster.overrides."): value for path, value in changes.items()}
