"""Probabilities from logits: the chance that an expert is among a token's k choices, and back.

A token's noisy logit of an expert is l_e + G with unit Gumbel noise G; a selection bias is added to its score, sigmoid
or softmax. Independent Gaussian noise of single tokens on top evens the chances out: :func:`smoothed`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import logsumexp, xlogy

from simulator.routing.load import FloatArray, biased_inclusion, inclusion

LANDAU = (-1.54, -0.71, -0.01, 0.75, 1.72, 3.18, 6.03, 18.04)
"""Mean of n variables 1 / X, X exponential, less log n, for large n: quantiles 1/16, 3/16, ..., 15/16.

It is Landau's distribution, of scale pi / 2 and shifted by 1 - 2 gamma + ln(pi / 2), gamma being Euler's constant.
"""


def chances_of(logits: FloatArray, top_k: int, bias: FloatArray | None = None, *, softmax: bool = False) -> FloatArray:
    """Probability that an expert is among the k choices [..., experts], with or without a selection bias.

    The bias is added to sigmoids of the noisy logits, or to their softmax.
    """
    if bias is not None and softmax:
        return np.asarray(np.mean([biased_inclusion(logits - rest, bias, top_k) for rest in others(logits)], axis=0))
    if bias is not None:
        return biased_inclusion(logits, bias, top_k)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return inclusion((weights / weights.sum(-1, keepdims=True)).clip(1e-12), top_k)


def others(logits: FloatArray) -> Iterator[FloatArray]:
    """Logarithm of the sum of the other experts' e^(l + G) [..., experts], at evenly spaced quantiles over tokens.

    A softmax score is sigmoid(l_e + G_e - that logarithm). With Gumbel noise e^G = 1 / X, X exponential, whose tail is
    so heavy that the sum is broad however many experts there are: sum / sum(e^l) = H + Landau, with H the entropy of
    softmax(l) in nats (the generalised central limit theorem for index 1). A token with a small sum shows large scores,
    on which a bias has little effect; one with a large sum goes where the bias sends it.
    """
    total = logsumexp(logits, axis=-1, keepdims=True)
    share = np.exp(logits - total).clip(1e-300, 1.0 - 1e-12)
    each = xlogy(share, share)
    entropy = (each - each.sum(-1, keepdims=True)) / (1.0 - share) + np.log1p(-share)  # of the others alone
    for quantile in LANDAU:
        yield total + np.log1p(-share) + np.log(np.maximum(entropy + quantile, 0.25))


def logits_of(chances: FloatArray, top_k: int) -> FloatArray:
    """Logits that lead to given chances [..., experts]: the inverse of :func:`chances_of`, up to a constant.

    >>> logits = logits_of(np.array([0.9, 0.5, 0.3, 0.3]), 2)
    >>> chances_of(logits, 2).round(6).tolist()
    [0.9, 0.5, 0.3, 0.3]
    """
    chances = np.clip(chances, 1e-12, 1.0 - 1e-9)
    logits = np.log(chances) if top_k == 1 else np.log(-np.log1p(-chances))
    if top_k == 2:  # the exact chances of two choices have no closed inverse
        for _ in range(200):
            found = chances_of(logits, top_k).clip(1e-12, 1.0 - 1e-9)
            step = np.log(chances / found) - np.log((1.0 - chances) / (1.0 - found))
            logits = np.clip(logits + 0.7 * step, -60.0, 60.0)
            if np.abs(step).max() < 1e-9:
                break
    return np.asarray(logits)


def smoothed(logits: FloatArray, variance: float, top_k: int) -> FloatArray:
    """Logits with the chances that ``logits`` have when each token adds Gaussian noise of a variance to them.

    pi_e = E[1 - exp(-w_e t exp(noise))], t solved as in :mod:`simulator.routing.load`, the mean by quadrature.

    >>> smoothed(np.array([0.0, 2.0, 0.0, -2.0]), 1.0, 1).round(2).tolist()
    [0.07, 1.67, 0.07, -1.81]
    """
    experts = logits.shape[-1]
    if variance <= 0.0 or top_k >= experts:
        return logits
    nodes, parts = np.polynomial.hermite_e.hermegauss(16)
    parts /= parts.sum()
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[..., None] * np.exp(np.sqrt(variance) * nodes)
    t = np.full((*logits.shape[:-1], 1), -experts * np.log1p(-top_k / experts) * np.exp(-0.5 * variance))
    for _ in range(60):  # Newton from the left, as for the chances without noise
        survive = np.exp(-weights * t[..., None])
        gap = experts - top_k - (survive @ parts).sum(-1, keepdims=True)
        t = np.maximum(t - gap / ((weights * survive) @ parts).sum(-1, keepdims=True), 0.5 * t)
        if np.abs(gap).max() < 1e-9:
            break
    passing = 1.0 - np.exp(-weights * t[..., None]) @ parts
    result = np.log(-np.log1p(-np.clip(passing, 1e-12, 1.0 - 1e-9)))
    return np.asarray(result + (logits - result).mean(-1, keepdims=True))


__all__ = ["LANDAU", "chances_of", "logits_of", "others", "smoothed"]
