"""Balancing losses and the selection bias: against loops over tokens, and where their values are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import special, stats

from simulator.routing.balance import (
    bias_step,
    communication_loss,
    cv,
    device_loss,
    importance,
    importance_loss,
    load_balance_loss,
    load_loss,
    sequence_loss,
    smooth_load,
    violation,
    z_loss,
)
from simulator.routing.routers import Choices, choose, noisy
from simulator.spec.model import Router

Floats = npt.NDArray[np.float64]

ROUTERS: dict[str, Router] = {
    "softmax": Router(),
    "mixtral": Router(weights="after_top_k"),
    "sigmoid": Router(kind="sigmoid", weights="renormalized", scaling=2.5),
    "limited": Router(groups=4, group_limit=2, scaling=16.0),
    "gshard": Router(second_choice="random"),
}
SIZES = {"few": (6, 8), "many": (120, 16)}


def routed(router: str, size: str) -> Choices:
    """Top-2 choices of some tokens with a taste for some experts."""
    tokens, experts = SIZES[size]
    rng = np.random.default_rng(tokens)
    logits = rng.standard_normal((tokens, experts)) + rng.standard_normal(experts)
    return choose(ROUTERS[router], logits, 2, rng=rng)


def even(experts: int, top_k: int, kind: Any = "softmax") -> Choices:
    """Tokens that like all experts alike, and whose choices go round."""
    chosen = (np.arange(experts)[:, None] + np.arange(top_k) * (experts // top_k)) % experts
    scores = np.full((experts, experts), 1.0 / experts if kind == "softmax" else 0.5)
    return Choices(chosen, np.full(chosen.shape, 1.0 / top_k), scores)


def collapsed(tokens: int, experts: int) -> Choices:
    """All tokens are sure of one expert."""
    logits = np.zeros((tokens, experts))
    logits[:, 3] = 60.0
    return choose(Router(kind="switch"), logits, 1)


# References that look at one token after the other


def shares(choices: Choices) -> list[list[float]]:
    return [[value / sum(row) for value in row] for row in choices.scores.tolist()]


def chosen_by(choices: Choices) -> list[list[int]]:
    return [[expert for expert in row if expert >= 0] for row in choices.experts.tolist()]


def mean_share(choices: Choices, expert: int) -> float:
    return float(sum(row[expert] for row in shares(choices)) / len(choices.scores))


def frequency(choices: Choices, expert: int) -> float:
    """N / assignments x assignments of the expert."""
    rows = chosen_by(choices)
    return float(choices.scores.shape[1] * sum(expert in row for row in rows) / sum(len(row) for row in rows))


def squared_cv(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value / mean - 1.0) ** 2 for value in values) / len(values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("router", ROUTERS)
def test_importance_sums_the_weights_of_each_expert(router: str, size: str) -> None:
    choices = routed(router, size)
    sums = [0.0] * choices.scores.shape[1]
    for experts, weights in zip(choices.experts.tolist(), choices.weights.tolist(), strict=True):
        for expert, weight in zip(experts, weights, strict=True):
            if expert >= 0:
                sums[expert] += weight

    assert importance(choices) == pytest.approx(np.array(sums))
    assert importance_loss(choices, 0.1) == pytest.approx(0.1 * squared_cv(sums))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_load_balancing_loss_multiplies_frequencies_with_mean_scores(router: str, size: str) -> None:
    choices = routed(router, size)
    experts = range(choices.scores.shape[1])
    expected = sum(frequency(choices, expert) * mean_share(choices, expert) for expert in experts)

    assert load_balance_loss(choices, 0.01) == pytest.approx(0.01 * expected)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("router", ROUTERS)
def test_losses_of_devices_look_at_their_experts_together(router: str, devices: int) -> None:
    choices = routed(router, "many")
    size, tokens = 16 // devices, len(choices.experts)
    balance = communication = 0.0
    for device in range(devices):
        held = range(device * size, (device + 1) * size)
        share = sum(mean_share(choices, expert) for expert in held)
        balance += sum(frequency(choices, expert) for expert in held) / size * share
        sent = sum(any(expert in held for expert in row) for row in chosen_by(choices))
        communication += devices / (3 * tokens) * sent * share

    assert device_loss(choices, devices, 0.05) == pytest.approx(0.05 * balance)
    assert communication_loss(choices, devices, 3, 0.02) == pytest.approx(0.02 * communication)


@pytest.mark.parametrize("length", [1, 8, 30, 120])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_sequence_loss_is_the_mean_over_sequences(router: str, length: int) -> None:
    choices = routed(router, "many")
    losses = []
    for start in range(0, 120, length):
        scores = choices.scores[start : start + length].tolist()
        loss = 0.0
        for expert in range(16):
            chosen = sum(expert in sorted(range(16), key=lambda e: -row[e])[:2] for row in scores)
            share = sum(row[expert] / sum(row) for row in scores) / length
            loss += 16 / (2 * length) * chosen * share
        losses.append(loss)

    assert sequence_loss(choices, length, 1e-4) == pytest.approx(1e-4 * sum(losses) / len(losses))


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_the_smooth_load_counts_with_what_chance_a_new_draw_would_choose_an_expert(top_k: int) -> None:
    rng = np.random.default_rng(3)
    logits, noise_logits = rng.standard_normal((20, 8)), rng.standard_normal((20, 8))
    disturbed = noisy(logits, noise_logits, rng)
    expected = [0.0] * 8
    for token in range(20):
        for expert in range(8):
            others = sorted((disturbed[token, other] for other in range(8) if other != expert), reverse=True)
            spread = math.log1p(math.exp(noise_logits[token, expert]))
            expected[expert] += float(stats.norm.cdf((logits[token, expert] - others[top_k - 1]) / spread))

    assert smooth_load(logits, disturbed, noise_logits, top_k) == pytest.approx(np.array(expected))
    assert load_loss(logits, disturbed, noise_logits, top_k, 0.1) == pytest.approx(0.1 * squared_cv(expected))


def test_the_smooth_load_is_the_mean_of_the_counts_when_one_expert_s_noise_is_drawn_again() -> None:
    """One token, two experts: the chance that x0 + N s0 exceeds H1, by 40,000 draws of the first one's noise."""
    rng = np.random.default_rng(5)
    logits, noise_logits, disturbed = np.array([[0.3, 0.1]]), np.zeros((1, 2)), np.array([[0.2, 0.7]])
    again = logits[0, 0] + math.log(2.0) * rng.standard_normal(40_000)

    assert smooth_load(logits, disturbed, noise_logits, 1)[0] == pytest.approx((again > 0.7).mean(), abs=0.01)


def test_a_load_without_noise_is_the_count_and_all_experts_are_certain_when_all_are_chosen() -> None:
    logits = np.random.default_rng(6).standard_normal((50, 8))
    silent = np.full_like(logits, -1e3)

    assert smooth_load(logits, logits, silent, 2).tolist() == choose(Router(), logits, 2).counts.tolist()
    assert smooth_load(logits, logits, silent, 8).tolist() == [50.0] * 8
    assert load_loss(logits, logits, silent, 8) == 0.0


# Values that are known


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("experts", [8, 16, 64])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_at_uniform_routing_are_their_weight_for_any_number_of_experts(
    kind: str, experts: int, top_k: int
) -> None:
    """The factor N makes sum f P = 1 / N the same for all N; of the squared spreads nothing is left."""
    choices = even(experts, top_k, kind)
    fractions = choices.counts / choices.counts.sum()

    assert fractions @ np.full(experts, 1 / experts) == pytest.approx(1 / experts)
    assert load_balance_loss(choices, 0.01) == pytest.approx(0.01)
    assert device_loss(choices, 8, 0.05) == pytest.approx(0.05)
    assert sequence_loss(choices, 4, 1e-4) == pytest.approx(1e-4)
    assert communication_loss(choices, 8, min(top_k, 8), 0.02) == pytest.approx(0.02)  # each token on top_k devices
    assert importance_loss(choices, 0.1) == pytest.approx(0.0, abs=1e-12)
    assert (float(cv(choices.counts)), float(violation(choices.counts))) == (0.0, 0.0)


def test_collapse_costs_n_times_as_much() -> None:
    """One of N experts takes all: f P is 1, times N; over D devices it is D; and CV^2 is N - 1."""
    choices = collapsed(40, 16)

    assert load_balance_loss(choices, 0.01) == pytest.approx(0.16)
    assert sequence_loss(choices, 10, 0.01) == pytest.approx(0.16)
    assert device_loss(choices, 4, 0.01) == pytest.approx(0.04)
    assert communication_loss(choices, 4, 1, 0.01) == pytest.approx(0.04)
    assert importance_loss(choices) == pytest.approx(15.0)
    assert float(cv(choices.counts)) ** 2 == pytest.approx(15.0)
    assert float(violation(choices.counts)) == 15.0


def test_equal_importance_is_not_equal_load() -> None:
    """One token with the probability 0.9 for the first expert, three with 0.3 for the second."""
    few, many = [0.9, 0.05, 0.05 / 3, 0.1 / 3], [0.2, 0.3, 0.25, 0.25]
    choices = choose(Router(kind="switch"), np.log([few, many, many, many]), 1)
    first_two = Choices(choices.experts, choices.weights, choices.scores[:, :2])

    assert choices.counts.tolist() == [1, 3, 0, 0]
    assert importance(first_two) == pytest.approx(np.array([0.9, 0.9]))
    assert importance_loss(first_two) == pytest.approx(0.0, abs=1e-12)
    assert float(cv(first_two.counts)) == 0.5


def test_unevenness_costs_more_than_uniform_routing_where_scores_and_choices_agree() -> None:
    for router in ROUTERS:
        choices = routed(router, "many")
        assert load_balance_loss(choices) > 1.05
        assert load_balance_loss(choices) > device_loss(choices, 4) * 0.999
        assert sequence_loss(choices, 12) > sequence_loss(choices, 120)  # balance in each sequence is the harder claim


def test_an_expert_level_loss_on_devices_of_one_expert_is_the_load_balancing_loss() -> None:
    choices = routed("softmax", "many")

    assert device_loss(choices, 16) == pytest.approx(load_balance_loss(choices))
    assert device_loss(choices, 1) == pytest.approx(1.0)


def test_the_communication_loss_counts_a_token_once_for_each_device() -> None:
    """Two experts on one device are one message: half of the loss of experts on two devices."""
    scores = np.full((4, 8), 0.125)
    near = Choices(np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), np.full((4, 2), 0.5), scores)
    far = Choices(np.array([[0, 2], [1, 4], [3, 6], [5, 7]]), np.full((4, 2), 0.5), scores)

    assert [communication_loss(near, 4, 2), communication_loss(far, 4, 2)] == pytest.approx([0.5, 1.0])


def test_the_sequence_loss_counts_the_best_scores_whatever_the_bias_chose() -> None:
    logits = np.random.default_rng(4).standard_normal((24, 8))
    router = Router(kind="sigmoid", weights="renormalized", selection_bias=True)
    plain = choose(router, logits, 2)
    biased = choose(router, logits, 2, bias=np.linspace(-1.0, 1.0, 8))

    assert biased.counts.tolist() != plain.counts.tolist()
    assert sequence_loss(biased, 8) == sequence_loss(plain, 8)


@pytest.mark.parametrize("experts", [2, 8, 256])
def test_the_z_loss_of_zero_logits_is_the_squared_logarithm_of_their_number(experts: int) -> None:
    assert z_loss(np.zeros((5, experts)), 1e-3) == pytest.approx(1e-3 * math.log(experts) ** 2)


def test_the_z_loss_is_the_mean_square_of_the_logarithm_of_the_sum() -> None:
    logits = 3.0 * np.random.default_rng(1).standard_normal((30, 8))
    expected = sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits.tolist()) / 30

    assert z_loss(logits) == pytest.approx(expected)
    assert z_loss(special.log_softmax(logits, axis=1)) == pytest.approx(0.0, abs=1e-20)
    assert z_loss(np.array([[1000.0, 1000.0]])) == pytest.approx((1000.0 + math.log(2.0)) ** 2)


# The selection bias


def test_a_bias_step_lifts_experts_with_too_few_tokens() -> None:
    """Layers keep to themselves; an expert at the mean stays; nothing counted, nothing changed."""
    bias = np.array([[0.0, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0]])
    counts = np.array([[12, 4, 8, 8], [0, 0, 0, 0]])

    assert bias_step(bias, counts, 0.001) == pytest.approx(np.array([[-0.001, 0.101, 0.2, 0.3], [0.0] * 4]))
    assert bias_step(bias, counts, 0.01, "proportional") == pytest.approx(
        np.array([[-0.005, 0.105, 0.2, 0.3], [0.0] * 4])
    )
    assert bias.sum() == pytest.approx(0.6)  # the caller's own


@pytest.mark.parametrize(("rule", "gamma"), [("sign", 0.005), ("proportional", 0.05)])
def test_bias_steps_balance_a_router_that_prefers_some_experts(rule: Any, gamma: float) -> None:
    """4096 tokens a step over 32 experts of unequal popularity: MaxVio falls from above 2 to near its luck."""
    rng = np.random.default_rng(2)
    router = Router(kind="sigmoid", weights="renormalized", selection_bias=True)
    taste, bias, course = rng.standard_normal(32), np.zeros(32), []
    for _ in range(300):
        choices = choose(router, rng.standard_normal((4096, 32)) + taste, 4, bias=bias)
        bias = bias_step(bias, choices.counts, gamma, rule)
        course.append(float(violation(choices.counts)))

    luck = 2.1 * math.sqrt((1 - 4 / 32) / 512)  # the largest of 32 normal numbers
    assert course[0] > 2.0
    assert np.mean(course[-20:]) < 2.0 * luck


# Measures, refusals


def test_measures_of_imbalance_look_along_the_last_axis() -> None:
    counts = np.array([[[4, 4, 4, 4], [8, 4, 4, 0]], [[16, 0, 0, 0], [0, 0, 0, 0]]])

    assert violation(counts).tolist() == [[0.0, 1.0], [3.0, 0.0]]
    assert cv(counts) == pytest.approx(np.array([[0.0, math.sqrt(0.5)], [math.sqrt(3.0), 0.0]]))


def test_experts_divide_over_devices_and_tokens_into_sequences() -> None:
    choices = routed("softmax", "many")

    with pytest.raises(ValueError, match="16 experts do not divide over 3 devices"):
        device_loss(choices, 3)
    with pytest.raises(ValueError, match="16 experts do not divide over 5 devices"):
        communication_loss(choices, 5, 2)
    with pytest.raises(ValueError, match="120 tokens are not a whole number of sequences of 7"):
        sequence_loss(choices, 7)
