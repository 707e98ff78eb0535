"""Overflow and load in closed form: what chance and skew cost, without drawing a single token.

Symbols: T tokens share one capacity, each chooses k of E experts; an expert gets mu = T k / E assignments on average
and has slots for c mu of them, c the capacity factor. The relative load x of an expert is its load over the mean, CV
the standard deviation of x over the experts. A drop is a fraction of all assignments; every number here is
dimensionless. Two sources of overflow are told apart:

- chance: tokens are a sample. It adds (1 - k/E) / mu to CV^2 (:func:`sampling_variance`) and is gone in large groups;
- skew: some experts are more popular, with a CV of their own that no group size removes.

:func:`balanced_drop` is exact where there is no skew. With skew take :func:`lognormal_drop` for a weak one (CV up to
about 0.5) and :func:`dirichlet_drop` for a strong one; :mod:`simulator.routing.load` draws what these cannot say.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special

FloatArray = npt.NDArray[np.float64]


def sampling_variance(tokens: int, experts: int, top_k: int) -> float:
    """What chance adds to CV^2: (1 - k/E) / mu, the variance of Bin(T, k/E) over its squared mean.

    Exact for tokens that choose independently and evenly; near it under weak skew.

    >>> sampling_variance(1000, 10, 1)
    0.009
    """
    return (1.0 - top_k / experts) * experts / (tokens * top_k)


def batch_cv(cv_population: float, cv_domain: float, documents: float, sampling: float = 0.0) -> float:
    """CV of the loads of a batch that mixes documents: sqrt(CV_pop^2 + CV_dom^2 / n + sampling).

    ``cv_population`` is the skew that all documents share, ``cv_domain`` what one document prefers for itself, and
    ``documents`` n the effective number of independent ones, at least 1. Preferences average out, popularity stays:
    this is why loads balanced over the training mixture keep improving with the batch while those held by an
    auxiliary loss level off (arXiv 2408.15664, section 5.1). Variances of independent parts add; meant for CV < 1.

    >>> batch_cv(0.3, 1.6, 16)
    0.5
    """
    return math.sqrt(cv_population**2 + cv_domain**2 / documents + sampling)


def balanced_drop(tokens: int, experts: int, top_k: int, factor: float, *, slots: int | None = None) -> float:
    """Drop of experts that are all equally popular: E[max(0, N - C)] / mu, N ~ Bin(T, k/E).

    Exact whatever the order in which a token draws its k experts, since each is among them with probability k/E. The
    capacity C is c mu rounded down; ``slots`` overrides it, for frameworks that round up as Switch does (arXiv
    2101.03961, equation 3; :func:`simulator.routing.capacity.slots`). Groups of a few thousand tokens lose several
    percent at c = 1 and almost nothing at c = 1.25.

    >>> round(balanced_drop(1024, 64, 1, 1.25), 6)
    0.022415
    >>> balanced_drop(4, 2, 1, 1.0)  # heads of four coins beyond two: one too many 4 times of 16, two once
    0.1875
    """
    mean, chance = tokens * top_k / experts, top_k / experts
    limit = math.floor(round(factor * mean, 9)) if slots is None else slots
    overflowing = special.bdtrc(np.arange(limit, tokens, dtype=np.float64), tokens, chance)  # P(N > n) for n >= C
    return float(overflowing.sum() / mean)


def normal_drop(tokens: int, experts: int, top_k: int, factor: float) -> float:
    """The same for N normal: CV (phi(z) - z (1 - Phi(z))), z = (c - 1) / CV, CV^2 the sampling variance.

    At c = 1 it reads sqrt((1 - k/E) / (2 pi mu)), right to 1 % from mu = 16 on. In the tail it is too low: by 9 to 32 %
    at c = 1.25 and mu = 16 to 128, and by more the fewer are dropped.

    >>> round(normal_drop(1000, 10, 1, 1.0) / 0.009**0.5, 4)  # 1 / sqrt(2 pi)
    0.3989
    """
    cv = math.sqrt(sampling_variance(tokens, experts, top_k))
    if cv == 0.0:
        return max(0.0, 1.0 - factor)
    z = (factor - 1.0) / cv
    return float(cv * (math.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi) - z * special.ndtr(-z)))


def lognormal_drop(cv: float, factor: float, *, sampling: float = 0.0) -> float:
    """Drop of loads with a lognormal spread: E[max(0, x - c)] for x of mean 1 and ln x of variance s^2.

    s^2 = ln(1 + CV^2 + sampling); Phi(d) - c Phi(d - s), d = (s^2/2 - ln c) / s: the price of a call option. ``cv``
    is the popularity's, chance goes to ``sampling``. With CV = 0 it is within 1.3 % of the exact drop at c = 1 and mu
    from 16 on, but two times too high at c = 1.25 and mu = 128: use :func:`balanced_drop` there. Against the expert
    loads of a 16B model (arXiv 2412.19437, appendix C; c = 1.25) it is 3 % low for CV 0.4, unless a few hot experts
    make the spread (30 % high), and 15 to 30 % low for CV 0.9 to 1.7.

    >>> lognormal_drop(0.0, 0.75)
    0.25
    >>> round(lognormal_drop(0.45, 1.25), 3)
    0.091
    """
    spread = math.sqrt(math.log1p(cv**2 + sampling))
    if spread == 0.0:
        return max(0.0, 1.0 - factor)
    d = (spread**2 / 2.0 - math.log(factor)) / spread
    return max(0.0, float(special.ndtr(d) - factor * special.ndtr(d - spread)))


def dirichlet_drop(cv: float, experts: int, factor: float) -> float:
    """Drop of loads with a Dirichlet spread: E[max(0, x - c)] for x = E times a share ~ Beta(a, (E - 1) a).

    a = ((E - 1) / CV^2 - 1) / E, and with I the upper incomplete beta function at c/E the drop is
    I(a + 1, (E - 1) a) - c I(a, (E - 1) a). Shares sum to one, so it also holds for strong skew (CV 0.9 to 1.7 within
    5 % of the loads above); CV cannot exceed sqrt(E - 1), where one expert has it all.

    >>> round(dirichlet_drop(3**-0.5, 2, 1.0), 12)  # a = 1: x is uniform between 0 and 2
    0.25
    >>> dirichlet_drop(7.0, 50, 5.0)  # one expert of 50 has all tokens, and slots for a tenth of them
    0.9
    """
    if cv == 0.0 or factor >= experts:
        return max(0.0, 1.0 - factor)
    a = ((experts - 1.0) / cv**2 - 1.0) / experts
    if a <= 0.0:
        return 1.0 - factor / experts
    b, share = (experts - 1.0) * a, factor / experts
    return max(0.0, float(special.betaincc(a + 1.0, b, share) - factor * special.betaincc(a, b, share)))


def loads_drop(relative_loads: npt.ArrayLike, factor: float) -> float:
    """Drop of given loads [..., experts] when the capacity is enforced: mean of max(0, x - c) over the mean of x.

    >>> loads_drop([2.0, 1.0, 0.5, 0.5], 1.2)  # 0.8 of 4
    0.2
    """
    loads = np.asarray(relative_loads, dtype=np.float64)
    return float(np.maximum(loads - factor, 0.0).sum() / loads.sum())


def drop_profile(relative_loads: npt.ArrayLike, factor: float, bins: int = 10) -> FloatArray:
    """Where in its capacity group a token is dropped in arrival order: drop by position [bins], group cut evenly.

    An expert of relative load x has filled its slots at the fraction c / x of the group and drops all that comes
    after: at position u a fraction mean(x [x u > c]) is dropped, here integrated over each bin without error. This
    alone drops the end of a sequence more often, as OpenMoE observes (arXiv 2402.01739). Chance is left out: it
    matters where CV^2 is near the sampling variance. ``relative_loads`` [..., experts], mean 1. The mean of the
    profile is :func:`loads_drop`; tokens served by score (arXiv 2106.05974, 2405.04434) would have it flat.

    >>> drop_profile([2.0, 0.0], 1.0, bins=4).tolist()  # the one expert in use is full half way
    [0.0, 0.0, 1.0, 1.0]
    """
    loads = np.asarray(relative_loads, dtype=np.float64).reshape(-1, 1)
    edges = np.linspace(0.0, 1.0, bins + 1)
    arrived = np.maximum(loads * edges[1:] - np.maximum(loads * edges[:-1], factor), 0.0)  # in the bin, too late
    return np.asarray(arrived.sum(0) * bins / loads.sum())


@lru_cache(maxsize=64)
def largest_of_normals(experts: int) -> float:
    """z_E, the mean of the largest of E standard normals: the integral of x E phi(x) Phi(x)^(E-1).

    By the trapezoid rule, to ten digits up to a million experts.

    >>> [round(largest_of_normals(experts), 2) for experts in (8, 64, 128, 256)]
    [1.42, 2.34, 2.59, 2.83]
    """
    x = np.linspace(-9.0, 14.0, 4601)
    density = experts * np.exp((experts - 1) * special.log_ndtr(x) - x * x / 2.0) / math.sqrt(2.0 * math.pi)
    return float(np.trapezoid(x * density, x))


def max_over_mean(cv: float, experts: int, sampling: float = 0.0) -> float:
    """Load of the busiest expert over the mean, for a lognormal spread: exp(z_E s - s^2/2), at most E.

    s^2 = ln(1 + CV^2 + sampling). MaxVio (arXiv 2408.15664) is this less one. For CV below 0.1 it is near 1 + z_E CV,
    :func:`max_over_mean_of_normals`. Too high in collapse, where a token can choose a strong expert only once, so that
    loads saturate below the ceiling of E/k: 23 instead of 17.8 for 256 experts, top-4 and CV 3.01 (arXiv 1701.06538,
    table 6).

    >>> max_over_mean(0.0, 256)
    1.0
    >>> round(max_over_mean(0.11, 256), 2)  # measured: 1.37 (same table)
    1.36
    """
    spread = math.sqrt(math.log1p(cv**2 + sampling))
    return min(math.exp(largest_of_normals(experts) * spread - spread**2 / 2.0), float(experts))


def max_over_mean_of_normals(cv: float, experts: int, sampling: float = 0.0) -> float:
    """The same for normal loads: 1 + z_E sqrt(CV^2 + sampling), at most E.

    Fits loads that a balancing loss holds near even. Of experts without any skew it is the floor that chance sets:

    >>> round(max_over_mean_of_normals(0.0, 64, sampling_variance(8192, 64, 6)), 2)
    1.08
    >>> round(max_over_mean_of_normals(0.17, 256), 2)  # measured: 1.47 (arXiv 1701.06538, table 6)
    1.48
    """
    return min(1.0 + largest_of_normals(experts) * math.sqrt(cv**2 + sampling), float(experts))
