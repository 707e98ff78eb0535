"""Intervals from signed errors: their laws, their coverage, and what is shipped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.campaign.uncertainty import LEAST_LAYOUTS, SignedError, coverage, factors, signed_errors

ASKED = SignedError("asked", "H100", "NVIDIA", moe=True, accelerators=256, log_error=0.0)


def evidence(errors: list[float], **changes: object) -> tuple[SignedError, ...]:
    """One layout for each error, like the one that is asked for."""
    fields = {"hardware": "H100", "vendor": "NVIDIA", "moe": True, "accelerators": 256, **changes}
    return tuple(SignedError(str(n), log_error=each, **fields) for n, each in enumerate(errors))  # type: ignore[arg-type]


def test_too_little_evidence_gives_no_interval() -> None:
    assert factors(ASKED, evidence([0.1] * (LEAST_LAYOUTS - 1))) is None


def test_predictions_that_were_too_fast_push_the_interval_up() -> None:
    """All were 20 % short: what is asked for takes longer too."""
    found = factors(ASKED, evidence([np.log(0.8)] * 12))

    assert found == pytest.approx((1.25, 1.25))


@given(st.lists(st.floats(-0.5, 0.5), min_size=LEAST_LAYOUTS, max_size=40))
def test_distance_widens_and_never_moves_the_middle(errors: list[float]) -> None:
    near, far = factors(ASKED, evidence(errors)), factors(ASKED, evidence(errors, hardware="A100", accelerators=8))

    assert near is not None
    assert far is not None
    assert np.log(far[0] * far[1]) == pytest.approx(np.log(near[0] * near[1]), abs=1e-9)
    assert far[1] / far[0] >= near[1] / near[0] * (1.0 - 1e-12)


def test_eighty_of_a_hundred_lie_inside() -> None:
    rng = np.random.default_rng(0)
    inside, asked = coverage(evidence(list(0.1 * rng.standard_normal(400))))

    assert asked == 400
    assert inside / asked == pytest.approx(0.8, abs=0.03)


def test_evidence_near_in_kind_counts_more() -> None:
    """Dense layouts on another chip were far off, MoE layouts on this one were right."""
    right = evidence([0.0] * 10)
    wrong = evidence([1.0] * 10, hardware="A100", moe=False, accelerators=8)
    only, both = factors(ASKED, right), factors(ASKED, (*right, *wrong))

    assert only == (1.0, 1.0)
    assert both is not None
    assert both[1] == pytest.approx(1.0, abs=0.02)


def test_the_shipped_evidence_covers_what_it_claims() -> None:
    """Between 75 and 95 % of the layouts, each left out in its turn."""
    inside, asked = coverage(signed_errors())

    assert asked >= LEAST_LAYOUTS
    assert 0.75 <= inside / asked <= 0.95
