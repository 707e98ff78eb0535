"""Balancing remedies as numbers: auxiliary losses, the selection bias of loss-free balancing, measures of imbalance.

Losses are values, without gradients. N experts, k choices of a token, T tokens; P_i is the mean over tokens of the
scores, each token's divided by their sum (softmax scores have the sum 1 already); f_i = N / (k T) x assignments of
expert i, so that f_i = 1 and P_i = 1 / N when all is even.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import special

from simulator.routing.load import FloatArray, IntArray
from simulator.routing.routers import Choices, top

Counts = IntArray | FloatArray


def cv(counts: Counts) -> FloatArray:
    """Coefficient of variation along the last axis: standard deviation / mean, [..., experts] -> [...].

    The standard deviation is that of the whole population; 0 where nothing is counted.

    >>> float(cv(np.array([1, 3])))
    0.5
    """
    mean = np.asarray(counts).mean(-1)
    return np.asarray(np.std(counts, axis=-1) / np.where(mean > 0, mean, 1.0), dtype=np.float64)


def violation(counts: Counts) -> FloatArray:
    """MaxVio along the last axis: largest / mean - 1, [..., experts] -> [...] (arXiv 2408.15664, section 4.1).

    0 where nothing is counted.

    >>> violation(np.array([[5, 5, 5, 5], [10, 0, 5, 5]])).tolist()
    [0.0, 1.0]
    """
    mean = np.asarray(counts).mean(-1)
    return np.asarray(np.where(mean > 0, np.max(counts, axis=-1) / np.where(mean > 0, mean, 1.0) - 1.0, 0.0))


def importance(choices: Choices) -> FloatArray:
    """Sum of the combine weights of each expert [experts]: Importance(X) = sum_x G(x) (arXiv 1701.06538, section 4)."""
    chosen = choices.experts >= 0
    sums = np.bincount(choices.experts[chosen], choices.weights[chosen], minlength=choices.scores.shape[1])
    return sums.astype(np.float64)


def importance_loss(choices: Choices, weight: float = 1.0) -> float:
    """Importance loss: weight x CV(Importance)^2; 0 when all are equal (arXiv 1701.06538, section 4)."""
    return weight * float(cv(importance(choices))) ** 2


def smooth_load(logits: FloatArray, noisy_logits: FloatArray, noise_logits: FloatArray, top_k: int) -> FloatArray:
    """Expected assignments of each expert if its noise were drawn again [experts] (arXiv 1701.06538, appendix A).

    Load_i = sum_x Phi((x_i - kth_excluding(H, k, i)) / softplus(n_i)), where kth_excluding is the k-th largest of the
    other experts' noisy logits H. ``logits`` x, ``noisy_logits`` H and ``noise_logits`` n are [tokens, experts]; H
    comes from :func:`simulator.routing.routers.noisy`.

    >>> even = np.zeros((6, 2))
    >>> smooth_load(even, even, even, 1).tolist()
    [3.0, 3.0]
    """
    if top_k >= logits.shape[1]:
        return np.full(logits.shape[1], float(len(logits)))
    ordered = np.take_along_axis(noisy_logits, top(noisy_logits, top_k + 1), axis=1)
    kth, next_one = ordered[:, -2:-1], ordered[:, -1:]
    threshold = np.where(noisy_logits >= kth, next_one, kth)  # a chosen expert competes with the first one left out
    spread = np.maximum(np.logaddexp(0.0, noise_logits), 1e-12)
    return np.asarray(special.ndtr((logits - threshold) / spread).sum(0), dtype=np.float64)


def load_loss(
    logits: FloatArray, noisy_logits: FloatArray, noise_logits: FloatArray, top_k: int, weight: float = 1.0
) -> float:
    """Load loss: weight x CV(Load)^2 with the smooth load of :func:`smooth_load` (arXiv 1701.06538, appendix A)."""
    return weight * float(cv(smooth_load(logits, noisy_logits, noise_logits, top_k))) ** 2


def load_balance_loss(choices: Choices, weight: float = 1.0) -> float:
    """Load-balancing loss: weight x sum_i f_i P_i; ``weight`` when all is even, its N-fold in collapse.

    Switch (arXiv 2101.03961, equations 4 to 6), where f sums to 1 and N stands in front, and the expert-level loss of
    DeepSeek-V2 (arXiv 2405.04434, equations 23 to 25) are this one value; f counts all k choices, before capacity.

    >>> from simulator.routing.routers import choose
    >>> from simulator.spec.model import Router
    >>> logits = np.eye(4) * 5.0  # four tokens, each with an expert of its own
    >>> round(load_balance_loss(choose(Router(kind="switch"), logits, 1), 0.01), 6)
    0.01
    """
    return weight * float(_frequencies(choices.counts) @ _shares(choices.scores).mean(0))


def device_loss(choices: Choices, devices: int, weight: float = 1.0) -> float:
    """Device-level loss: weight x sum_d f'_d P'_d; ``weight`` when devices are even.

    f'_d is the mean of f_i over the experts of device d and P'_d the sum of P_i; devices hold equal runs of experts
    (DeepSeek-V2, arXiv 2405.04434, equations 26 to 28).
    """
    size = _per_device(choices, devices)
    frequencies = _frequencies(choices.counts).reshape(devices, size).mean(1)
    return weight * float(frequencies @ _shares(choices.scores).mean(0).reshape(devices, size).sum(1))


def communication_loss(choices: Choices, devices: int, limit: int, weight: float = 1.0) -> float:
    """Communication loss: weight x sum_d f''_d P''_d; ``weight`` when each device receives its share of M T tokens.

    f''_d = D / (M T) x tokens that are sent to device d, each counted once however many experts it has there; D
    devices, of which a token reaches at most M = ``limit`` (DeepSeek-V2, arXiv 2405.04434, equations 29 to 31).
    """
    size = _per_device(choices, devices)
    tokens = len(choices.experts)
    sent = np.zeros((tokens, devices + 1), dtype=bool)  # the last column is for no expert
    np.put_along_axis(sent, np.where(choices.experts >= 0, choices.experts // size, devices), True, axis=1)
    received = sent[:, :devices].mean(0) * devices / limit
    return weight * float(received @ _shares(choices.scores).mean(0).reshape(devices, size).sum(1))


def sequence_loss(choices: Choices, sequence_length: int, weight: float = 1.0) -> float:
    """Sequence-wise loss: weight x sum_i f_i P_i in each run of ``sequence_length`` tokens, mean over sequences.

    f counts the k best of the scores themselves, which are not the token's choices where a bias or a group limit has
    a say (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    Raises:
        ValueError: the tokens are not a whole number of sequences.
    """
    tokens, experts = choices.scores.shape
    if tokens % sequence_length:
        raise ValueError(f"{tokens} tokens are not a whole number of sequences of {sequence_length}")
    sequences, top_k = tokens // sequence_length, choices.experts.shape[1]
    best = top(choices.scores, top_k) + np.arange(tokens)[:, None] // sequence_length * experts
    counts = np.bincount(best.ravel(), minlength=sequences * experts).reshape(sequences, experts)
    shares = _shares(choices.scores).reshape(sequences, sequence_length, experts).mean(1)
    return weight * float((_frequencies(counts) * shares).sum(-1).mean())


def z_loss(logits: FloatArray, weight: float = 1.0) -> float:
    """Router z-loss: weight x mean over tokens of (log sum_i exp x_i)^2, logits [tokens, experts].

    ST-MoE, arXiv 2202.08906, equation 5.

    >>> z_loss(np.log(np.full((3, 4), 0.25)))
    0.0
    """
    return weight * float(np.square(special.logsumexp(logits, axis=-1)).mean())


def bias_step(
    bias: FloatArray, counts: Counts, gamma: float, rule: Literal["sign", "proportional"] = "sign"
) -> FloatArray:
    """Selection bias after one step [..., experts]: up where an expert has too few tokens, down where too many.

    sign: b + gamma sign(mean - counts) (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    proportional: b + gamma (mean - counts) / mean, the variant without the sign that 2408.15664 compares in section
    4.3, here relative to the mean so that gamma does not depend on the batch.

    >>> bias_step(np.zeros(3), np.array([8, 4, 0]), 0.5).tolist()
    [-0.5, 0.0, 0.5]
    >>> bias_step(np.zeros(3), np.array([7, 4, 1]), 0.5, "proportional").tolist()
    [-0.375, 0.0, 0.375]
    """
    mean = np.asarray(counts).mean(-1, keepdims=True)
    error = mean - counts
    return np.asarray(bias + gamma * (np.sign(error) if rule == "sign" else error / np.where(mean > 0, mean, 1.0)))


def _frequencies(counts: IntArray) -> FloatArray:
    """f_i: assignments over their mean [..., experts]."""
    mean = counts.mean(-1, keepdims=True)
    return np.asarray(counts / np.where(mean > 0, mean, 1.0))


def _shares(scores: FloatArray) -> FloatArray:
    """Scores of each token over their sum [tokens, experts]."""
    return np.asarray(scores / np.maximum(scores.sum(-1, keepdims=True), 1e-300))


def _per_device(choices: Choices, devices: int) -> int:
    size, rest = divmod(len(choices.counts), devices)
    if rest:
        raise ValueError(f"{len(choices.counts)} experts do not divide over {devices} devices")
    return size


__all__ = [
    "bias_step", "communication_loss", "cv", "device_loss", "importance", "importance_loss", "load_balance_loss",
    "load_loss", "sequence_loss", "smooth_load", "violation", "z_loss",
]  # fmt: skip
