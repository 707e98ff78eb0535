"""Closed forms of overflow and load: against published tables, drawn numbers, and each other."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, stats

from simulator import load_scenario
from simulator.layout import resolve
from simulator.routing import capacity as capacities
from simulator.routing import expert_load
from simulator.routing.closed_forms import (
    balanced_drop,
    batch_cv,
    dirichlet_drop,
    drop_profile,
    largest_of_normals,
    loads_drop,
    lognormal_drop,
    max_over_mean,
    max_over_mean_of_normals,
    normal_drop,
    sampling_variance,
)

FACTORS = (1.0, 1.1, 1.25, 1.5)

# Percent dropped by balanced routing; in brackets half a unit of the last digit that the table prints.
BALANCED: dict[tuple[int, int, int], list[tuple[float, float]]] = {
    (1024, 64, 1): [(9.84, 0.005), (7.13, 0.005), (2.24, 0.005), (0.30, 0.005)],
    (4096, 128, 1): [(7.01, 0.005), (3.39, 0.005), (0.72, 0.005), (0.02, 0.005)],
    (8192, 128, 1): [(4.96, 0.005), (1.68, 0.005), (0.13, 0.005), (0.0, 0.005)],
    (4096, 64, 2): [(3.47, 0.005), (0.65, 0.005), (0.008, 0.0005), (0.0, 0.0005)],
    (4096, 256, 8): [(3.47, 0.005), (0.65, 0.005), (0.008, 0.0005), (0.0, 0.0005)],
    (4096, 64, 6): [(1.94, 0.005), (0.04, 0.005), (0.0, 0.005), (0.0, 0.005)],
    (65536, 256, 8): [(0.87, 0.005), (0.0, 0.005), (0.0, 0.005), (0.0, 0.005)],
}


# Chance


@pytest.mark.parametrize("group", BALANCED)
def test_balanced_routing_drops_what_the_binomial_law_says(group: tuple[int, int, int]) -> None:
    for factor, (percent, half_a_digit) in zip(FACTORS, BALANCED[group], strict=True):
        assert 100 * balanced_drop(*group, factor) == pytest.approx(percent, abs=half_a_digit + 1e-9)


def test_balanced_drops_to_six_digits() -> None:
    """16 tokens per expert: 2.2415 %. 128 of them: 8 in 100 000, a little less where a token has more choices."""
    assert balanced_drop(1024, 64, 1, 1.25) == pytest.approx(0.022415, abs=5e-7)
    assert balanced_drop(128 * 64, 64, 1, 1.25) == pytest.approx(8.3e-5, abs=5e-7)


def test_the_short_form_is_the_sum_over_all_counts() -> None:
    for tokens, experts, top_k, slots in ((100, 8, 2, 20), (37, 5, 5, 30), (10, 3, 1, 0), (10, 3, 1, 10)):
        counts = np.arange(tokens + 1)
        chance = stats.binom.pmf(counts, tokens, top_k / experts)
        expected = (np.maximum(counts - slots, 0) * chance).sum() / (tokens * top_k / experts)
        assert balanced_drop(tokens, experts, top_k, 1.0, slots=slots) == pytest.approx(expected, abs=1e-12)


def test_slots_may_be_rounded_up_as_the_simulator_does() -> None:
    """17.6 slots: 17 drop more than 18."""
    up = capacities.slots(1.1, 1024, 1, 64)

    assert up == 18
    assert balanced_drop(1024, 64, 1, 1.1) == balanced_drop(1024, 64, 1, 1.1, slots=17)
    assert balanced_drop(1024, 64, 1, 1.1) > balanced_drop(1024, 64, 1, 1.1, slots=up) > 0.05


@pytest.mark.parametrize("group", BALANCED)
def test_the_normal_form_is_right_at_factor_one_and_low_in_the_tail(group: tuple[int, int, int]) -> None:
    tokens, experts, top_k = group
    at_one = math.sqrt((1 - top_k / experts) / (2 * math.pi * tokens * top_k / experts))

    assert normal_drop(*group, 1.0) == pytest.approx(at_one)
    assert normal_drop(*group, 1.0) == pytest.approx(balanced_drop(*group, 1.0), rel=0.01)
    assert normal_drop(*group, 1.25) < balanced_drop(*group, 1.25)
    if tokens * top_k / experts <= 128:
        assert 0.67 < normal_drop(*group, 1.25) / balanced_drop(*group, 1.25) < 0.92


@pytest.mark.parametrize("group", [group for group in BALANCED if group[0] * group[2] // group[1] <= 128])
def test_a_lognormal_spread_of_chance_alone_is_right_at_factor_one_and_high_in_the_tail(
    group: tuple[int, int, int],
) -> None:
    chance = sampling_variance(*group)
    ratio = {f: lognormal_drop(0.0, f, sampling=chance) / balanced_drop(*group, f) for f in (1.0, 1.25)}

    assert ratio[1.0] == pytest.approx(1.0, abs=0.013)
    assert 1.15 < ratio[1.25] < 2.1


def test_without_chance_only_what_exceeds_the_capacity_is_dropped() -> None:
    """All experts for every token: 100 tokens each, and slots for three quarters of them."""
    assert sampling_variance(100, 4, 4) == 0.0
    for drop in (balanced_drop(100, 4, 4, 0.75), normal_drop(100, 4, 4, 0.75)):
        assert drop == pytest.approx(0.25)
    assert balanced_drop(100, 4, 4, 1.0) == normal_drop(100, 4, 4, 1.0) == lognormal_drop(0.0, 1.0) == 0.0


# Skew


@pytest.mark.parametrize("cv", [0.1, 0.45, 0.9, 1.7])
@pytest.mark.parametrize("factor", [0.75, 1.0, 1.25, 2.0])
def test_skewed_forms_agree_with_drawn_loads(cv: float, factor: float) -> None:
    """A million loads of mean one and the given spread, and the integral over the share of one expert."""
    rng, spread = np.random.default_rng(1), math.sqrt(math.log1p(cv**2))
    drawn = np.exp(spread * rng.standard_normal(1_000_000) - spread**2 / 2)
    a = (63 / cv**2 - 1) / 64
    shares = 64 * rng.dirichlet(np.full(64, a), 16_000)

    assert lognormal_drop(cv, factor) == pytest.approx(loads_drop(drawn, factor), rel=0.02, abs=2e-4)
    assert shares.std() == pytest.approx(cv, rel=0.02)
    assert dirichlet_drop(cv, 64, factor) == pytest.approx(loads_drop(shares, factor), rel=0.02, abs=2e-4)
    beyond = integrate.quad(lambda x: (64 * x - factor) * stats.beta.pdf(x, a, 63 * a), factor / 64, 1)
    assert dirichlet_drop(cv, 64, factor) == pytest.approx(beyond[0], abs=1e-6)


def test_weak_skew_adds_to_chance_as_variances_add() -> None:
    """Popularity of CV 0.15 and 256 tokens per expert against drawn counts; at factor 1.1, to 4 %."""
    rng, experts, tokens = np.random.default_rng(2), 64, 16_384
    weights = np.exp(math.sqrt(math.log1p(0.15**2)) * rng.standard_normal((4000, experts)))
    counts = rng.multinomial(tokens, weights / weights.sum(-1, keepdims=True))
    drop = lognormal_drop(0.15, 1.1, sampling=sampling_variance(tokens, experts, 1))

    assert drop == pytest.approx(loads_drop(counts / 256, 1.1), rel=0.04)
    assert drop > lognormal_drop(0.15, 1.1) > balanced_drop(tokens, experts, 1, 1.1)


# Expert loads of a 16B model on Wikipedia, GitHub and DM Mathematics, with an auxiliary loss and without (arXiv
# 2412.19437, appendix C): CV, and drop at a capacity factor of 1.25.
AUXILIARY = {0.450: 0.093, 0.375: 0.068, 0.382: 0.053}
LOSS_FREE = {0.924: 0.271, 1.546: 0.461, 1.719: 0.521}


def test_dirichlet_and_lognormal_forms_of_measured_loads() -> None:
    """Strong skew: Dirichlet within 6 %. Weak skew: either, but not maths with its few hot experts."""
    dirichlet = [dirichlet_drop(cv, 64, 1.25) for cv in (*AUXILIARY, *LOSS_FREE)]
    lognormal = [lognormal_drop(cv, 1.25) for cv in (*AUXILIARY, *LOSS_FREE)]

    assert dirichlet == pytest.approx([0.091, 0.065, 0.067, 0.263, 0.452, 0.496], abs=0.0015)
    assert lognormal == pytest.approx([0.090, 0.065, 0.067, 0.228, 0.347, 0.370], rel=0.03)
    assert dirichlet[3:] == pytest.approx(list(LOSS_FREE.values()), rel=0.06)
    assert lognormal[:2] == pytest.approx(list(AUXILIARY.values())[:2], rel=0.06)
    assert all(0.7 < low / measured < 0.86 for low, measured in zip(lognormal[3:], LOSS_FREE.values(), strict=True))


def test_limits_of_the_dirichlet_form() -> None:
    """Even loads, a capacity that holds everything, and one expert that has it all."""
    assert dirichlet_drop(0.0, 8, 0.75) == 0.25
    assert dirichlet_drop(1.0, 8, 8.0) == 0.0
    assert dirichlet_drop(math.sqrt(7), 8, 1.0) == pytest.approx(1 - 1 / 8)
    assert dirichlet_drop(1e-4, 8, 1.0) == pytest.approx(1e-4 / math.sqrt(2 * math.pi), rel=1e-3)


# The busiest expert


def test_the_largest_of_normals() -> None:
    values = {1: 0.0, 2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi), 8: 1.4236, 64: 2.3437, 128: 2.5946}
    drawn = np.random.default_rng(3).standard_normal((20_000, 256)).max(-1).mean()

    assert [largest_of_normals(experts) for experts in values] == pytest.approx(list(values.values()), abs=5e-5)
    assert largest_of_normals(256) == pytest.approx(drawn, abs=0.015)


# Busiest expert over the mean by CV of the loads; 256 experts (arXiv 1701.06538, table 6).
BUSIEST = {0.02: 1.07, 0.04: 1.15, 0.05: 1.14, 0.11: 1.37, 0.17: 1.47}


def test_the_busiest_expert_under_balancing_losses() -> None:
    """Within 0.08: normal loads everywhere, lognormal ones for the four smaller spreads; CV 0.17 has no such tail."""
    normal = [max_over_mean_of_normals(cv, 256) for cv in BUSIEST]
    lognormal = [max_over_mean(cv, 256) for cv in BUSIEST]

    assert normal == pytest.approx([1.06, 1.11, 1.14, 1.31, 1.48], abs=0.006)
    assert normal == pytest.approx(list(BUSIEST.values()), abs=0.08)
    assert lognormal[:4] == pytest.approx(list(BUSIEST.values())[:4], abs=0.04)
    assert lognormal[4] == pytest.approx(1.59, abs=0.005)
    assert 17.80 < max_over_mean(3.01, 256) < 256  # without a loss: collapse, where the form is too high


@pytest.mark.parametrize("cv", [0.05, 0.2, 0.5])
def test_the_busiest_of_drawn_loads(cv: float) -> None:
    """The lognormal form lies between the median of drawn maxima and their mean."""
    spread = math.sqrt(math.log1p(cv**2))
    drawn = np.exp(spread * np.random.default_rng(4).standard_normal((20_000, 64)) - spread**2 / 2).max(-1)

    assert 0.999 * np.median(drawn) < max_over_mean(cv, 64) < drawn.mean()
    assert max_over_mean(cv, 64) == pytest.approx(drawn.mean(), rel=0.05)


def test_chance_alone_sets_a_floor() -> None:
    """8192 tokens, 6 of 64 experts: the busiest expert is 8 % above the mean, drawn or in closed form."""
    counts = np.random.default_rng(5).multinomial(8192 * 6, np.full(64, 1 / 64), 2000)
    chance = sampling_variance(8192, 64, 6)

    assert max_over_mean_of_normals(0.0, 64, chance) - 1 == pytest.approx(0.08, abs=0.002)
    assert max_over_mean(0.0, 64, chance) == pytest.approx((counts.max(-1) / 768).mean(), abs=0.006)
    assert max_over_mean(100.0, 8) <= 8.0


def test_preferences_of_documents_average_out_and_popularity_stays() -> None:
    """Without popularity a batch keeps improving down to chance; with it the busiest expert levels off."""
    free = [max_over_mean(batch_cv(0.0, 0.9, n), 64) - 1 for n in (1, 16, 256, 4096)]
    held = [max_over_mean(batch_cv(0.2, 0.4, n), 64) - 1 for n in (1, 16, 256, 4096)]

    assert all(later < 0.4 * earlier for earlier, later in pairwise(free))
    assert held[2] / held[3] < 1.05
    assert batch_cv(0.0, 0.9, 10**12, 0.01) == pytest.approx(0.1)
    assert batch_cv(0.2, 0.0, 1) == pytest.approx(0.2)


def test_documents_with_their_own_preferences() -> None:
    """25 documents of CV 0.9 each in one batch: its loads have a CV of 0.18."""
    spread = math.sqrt(math.log1p(0.9**2))
    loads = np.exp(spread * np.random.default_rng(6).standard_normal((25, 20_000)) - spread**2 / 2).mean(0)

    assert batch_cv(0.0, 0.9, 25) == pytest.approx(0.18)
    assert loads.std() == pytest.approx(0.18, rel=0.03)


# Where the drops are


def test_drops_by_position() -> None:
    """Loads 2.5, 1 and 0.5 at factor 1.25: the first expert is full half way, the others never."""
    profile = drop_profile([2.5, 1.0, 0.5, 0.0], 1.25, bins=4)

    assert profile.tolist() == pytest.approx([0.0, 0.0, 0.625, 0.625])
    assert profile.mean() == pytest.approx(loads_drop([2.5, 1.0, 0.5, 0.0], 1.25))


def test_a_bin_in_which_an_expert_fills_up_counts_in_part() -> None:
    """Full at 0.8 of the group: in the bin from 0.75 to 1 four fifths come too late."""
    assert drop_profile([1.25, 0.75], 1.0, bins=4).tolist() == pytest.approx([0.0, 0.0, 0.0, 1.25 / 2 * 0.8])
    assert drop_profile([1.25, 0.75], 1.0, bins=1).tolist() == pytest.approx([0.125])


def test_layers_are_averaged_in_a_profile() -> None:
    layers = [[2.5, 1.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]]

    assert drop_profile(layers, 1.25, 2).tolist() == pytest.approx([0.0, 0.3125])
    assert drop_profile(layers[1], 0.5, 4).tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("cv", "last_tenth", "last_half", "drop"),
    [(0.1, 0.92, 1.00, 0.002), (0.25, 0.59, 1.00, 0.028), (0.45, 0.38, 0.99, 0.088), (0.9, 0.24, 0.88, 0.21)],
)
def test_the_end_of_the_group_bears_the_drops(cv: float, last_tenth: float, last_half: float, drop: float) -> None:
    """32 experts, 2048 tokens, two choices, factor 1.25; drawn popularity with the given spread, and chance."""
    rng = np.random.default_rng(7)
    weights = np.exp(math.sqrt(math.log1p(cv**2)) * rng.standard_normal((3000, 32)))
    keys = weights / weights.sum(-1, keepdims=True)
    pairs = keys / (1 - keys)  # two choices without repetition: first, or second after another first one
    chance = keys * (1 + pairs.sum(-1, keepdims=True) - pairs)
    loads = rng.binomial(2048, np.minimum(chance, 1.0)) / 128
    profile = drop_profile(loads, 1.25)

    assert profile[0] == 0.0
    assert profile[-1] / profile.sum() == pytest.approx(last_tenth, abs=0.04)
    assert profile[5:].sum() / profile.sum() == pytest.approx(last_half, abs=0.015)
    assert profile.mean() == pytest.approx(drop, rel=0.06, abs=5e-4)


def test_the_profile_of_a_scenario_is_that_of_its_counts() -> None:
    """One expert group of 4096 tokens, one capacity: from its counts and slots, position by position."""
    scenario = load_scenario(
        {
            "name": "profile",
            "model": {"preset": "olmoe-1b-7b", "set": {"layers": 4}},
            "cluster": {"profile": "h100-sxm", "accelerators": 8},
            "parallelism": {"expert": 8},
            "training": {"tokens": "1B", "sequence_length": 512, "global_batch_sequences": 8},
            "routing": {"load": {"kind": "logits", "population": 0.7}, "capacity_factor": 1.25},
        }
    )
    load = expert_load(scenario, resolve(scenario))
    assert load is not None
    mean = 4096 * 8 / 64
    slots = capacities.slots(1.25, 4096, 8, 64)
    expected = drop_profile(load.assigned / mean, slots / mean, len(load.drop_profile))

    assert load.drop_profile == pytest.approx(expected, abs=1e-9)
    assert 0.0 == load.drop_profile[0] < load.drop_profile[-4] < load.drop_profile[-1]
