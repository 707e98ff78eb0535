"""The balancing losses of :mod:`simulator.routing.balance` in PyTorch, with gradients, and the step of the bias.

N experts, k choices of a token, T tokens; P_i is the mean over tokens of the scores, each token's divided by their sum;
f_i = N / (k T) x assignments of expert i. f is a count and has no gradient: a loss pushes down the scores P of the
experts that have too many tokens. The values are those of the simulator's functions of the same names, where the
formulas and their sources stand; :func:`losses` collects what a scenario lists as ``routing.balance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from simulator.routing.remedies import DEFAULT_WEIGHT
from simulator.spec.routing import Remedy
from validation.torch_routers import Choices, counted, top


@dataclass(frozen=True)
class Routed:
    """What the losses of one layer look at.

    ``logits`` [tokens, experts] without noise; of noisy top-k also ``noisy_logits`` and ``noise_logits``, as large.
    ``sequence_length`` tokens follow each other in a sequence; experts are divided over ``devices``, of which a token
    reaches at most ``device_limit``.
    """

    choices: Choices
    logits: Tensor
    noisy_logits: Tensor | None
    noise_logits: Tensor | None
    sequence_length: int
    devices: int
    device_limit: int


def losses(remedies: Sequence[Remedy], routed: Routed) -> dict[str, Tensor]:
    """Weighted loss of each remedy by kind; the weight is the remedy's, or its paper's. A bias is not a loss."""
    return {remedy.kind: _loss(remedy, routed) for remedy in remedies if remedy.kind != "bias"}


def _loss(remedy: Remedy, routed: Routed) -> Tensor:
    weight = DEFAULT_WEIGHT[remedy.kind] if remedy.weight is None else remedy.weight
    choices, devices = routed.choices, routed.devices
    match remedy.kind:
        case "importance":
            return importance_loss(choices, weight)
        case "load":
            if routed.noisy_logits is None or routed.noise_logits is None:
                raise ValueError("the load loss needs the noise of a noisy_top_k router (arXiv 1701.06538, appendix A)")
            top_k = choices.experts.shape[1]
            return load_loss(routed.logits, routed.noisy_logits, routed.noise_logits, top_k, weight)
        case "load_balance":
            return load_balance_loss(choices, weight)
        case "z":
            return z_loss(routed.logits, weight)
        case "device":
            return device_loss(choices, devices, weight)
        case "communication":
            return communication_loss(choices, devices, routed.device_limit, weight)
        case "sequence":
            return sequence_loss(choices, routed.sequence_length, weight)
    raise ValueError(f"{remedy.kind} is not a loss")


def importance_loss(choices: Choices, weight: float = 1.0) -> Tensor:
    """Weight x CV(sum of the combine weights of each expert)^2; its gradient goes through the weights."""
    flat = choices.experts.clamp_min(0).flatten()  # where there is no expert the weight is 0
    sums = torch.zeros_like(choices.scores[0]).index_add(0, flat, choices.weights.flatten())
    return weight * _squared_cv(sums)


def smooth_load(logits: Tensor, noisy_logits: Tensor, noise_logits: Tensor, top_k: int) -> Tensor:
    """Expected assignments of each expert if its noise were drawn again [experts]: a load with gradients."""
    if top_k >= logits.shape[1]:
        return logits.new_full(logits.shape[1:], float(len(logits)))
    ordered = noisy_logits.gather(1, top(noisy_logits.detach(), top_k + 1))
    kth, next_one = ordered[:, -2:-1], ordered[:, -1:]
    threshold = torch.where(noisy_logits >= kth, next_one, kth)  # a chosen expert competes with the first one left out
    spread = functional.softplus(noise_logits).clamp_min(1e-12)
    return torch.special.ndtr((logits - threshold) / spread).sum(0)


def load_loss(logits: Tensor, noisy_logits: Tensor, noise_logits: Tensor, top_k: int, weight: float = 1.0) -> Tensor:
    """Weight x CV(Load)^2 with the smooth load of :func:`smooth_load`."""
    return weight * _squared_cv(smooth_load(logits, noisy_logits, noise_logits, top_k))


def load_balance_loss(choices: Choices, weight: float = 1.0) -> Tensor:
    """Weight x sum_i f_i P_i; ``weight`` when all is even."""
    return weight * (_frequencies(choices.counts, choices.scores) @ _shares(choices.scores).mean(0))


def device_loss(choices: Choices, devices: int, weight: float = 1.0) -> Tensor:
    """Weight x sum_d f'_d P'_d: mean of f and sum of P over the experts of a device."""
    frequencies = _frequencies(choices.counts, choices.scores).unflatten(0, (devices, -1)).mean(1)
    return weight * (frequencies @ _shares(choices.scores).mean(0).unflatten(0, (devices, -1)).sum(1))


def communication_loss(choices: Choices, devices: int, limit: int, weight: float = 1.0) -> Tensor:
    """Weight x sum_d f''_d P''_d, f''_d = D / (M T) x tokens sent to device d, each counted once."""
    size = choices.scores.shape[1] // devices
    target = torch.where(choices.experts < 0, devices, choices.experts // size)
    sent = choices.scores.new_zeros(len(target), devices + 1).scatter(1, target, 1.0)  # the last column: no expert
    received = sent[:, :devices].mean(0) * devices / limit
    return weight * (received @ _shares(choices.scores).mean(0).unflatten(0, (devices, -1)).sum(1))


def sequence_loss(choices: Choices, sequence_length: int, weight: float = 1.0) -> Tensor:
    """Weight x sum_i f_i P_i in each run of ``sequence_length`` tokens, mean over sequences; f by the scores alone."""
    tokens, experts = choices.scores.shape
    if tokens % sequence_length:
        raise ValueError(f"{tokens} tokens are not a whole number of sequences of {sequence_length}")
    sequences, top_k = tokens // sequence_length, choices.experts.shape[1]
    number = torch.arange(tokens, device=choices.scores.device)[:, None] // sequence_length
    best = top(choices.scores.detach(), top_k) + number * experts
    counts = counted(best, sequences * experts).unflatten(0, (sequences, experts))
    shares = _shares(choices.scores).unflatten(0, (sequences, sequence_length)).mean(1)
    return weight * (_frequencies(counts, choices.scores) * shares).sum(-1).mean()


def z_loss(logits: Tensor, weight: float = 1.0) -> Tensor:
    """Weight x mean over tokens of (log sum_i exp x_i)^2."""
    return weight * logits.logsumexp(-1).square().mean()


def bias_step(bias: Tensor, counts: Tensor, gamma: float, rule: Literal["sign", "proportional"] = "sign") -> Tensor:
    """Selection bias after one step [..., experts]: up where an expert has too few tokens, down where too many."""
    mean = counts.double().mean(-1, keepdim=True)
    error = mean - counts
    step = gamma * (error.sign() if rule == "sign" else error / torch.where(mean > 0, mean, 1.0))
    return bias + step.to(bias.dtype)


def _squared_cv(values: Tensor) -> Tensor:
    """Variance of the whole population over the squared mean; 0 where nothing is counted."""
    mean = values.mean()
    return values.var(unbiased=False) / torch.where(mean > 0, mean, 1.0).square()


def _frequencies(counts: Tensor, like: Tensor) -> Tensor:
    """f_i: assignments over their mean [..., experts]."""
    counts = counts.to(like.dtype)
    mean = counts.mean(-1, keepdim=True)
    return counts / torch.where(mean > 0, mean, 1.0)


def _shares(scores: Tensor) -> Tensor:
    """Scores of each token over their sum [tokens, experts]."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


__all__ = [
    "Routed", "bias_step", "communication_loss", "device_loss", "importance_loss", "load_balance_loss", "load_loss",
    "losses", "sequence_loss", "smooth_load", "z_loss",
]  # fmt: skip
