"""Kernel jitter: the same kernels take a little longer on one rank than on another, and everybody waits for the last.

With a relative standard deviation s of the profile (``jitter``), every op on the compute stream takes in every lane

    t x exp(g z - g^2 / 2),   g^2 = ln(1 + s^2),   z standard normal, one per op and lane

that is, t on average. The numbers are drawn once, from the scenario's seed, so that both engines see the same ones.
What this costs inside an expert group comes out at its collectives.

One group is played for all R replicas of a stage. At the end of the step gradients meet, and the slowest of them
counts. The kernels of a rank in one step are many and taken as independent, so their sum is nearly normal with
standard deviation s sqrt(sum t^2), and the largest of R of them is expected z(R) s sqrt(sum t^2) above the mean. This
is charged at the end of every pipeline rank, for its slowest lane, as a term of its own. It leaves out that collectives
inside a group average some of the jitter away, and that a rank which is slow once tends to be slow again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from simulator.events.timeline import rows_of
from simulator.layout import Layout
from simulator.program import REPLICAS, Program
from simulator.spec.scenario import Scenario
from simulator.timing import Compute, Fixed, Prices, Update

FloatArray = npt.NDArray[np.float64]
STREAM = 0x6A69
"""Second word of the generator's seed, so that jitter and loads are independent."""


def expected_largest(count: int) -> float:
    """Expected largest of some independent standard normal numbers, by quadrature.

    >>> round(expected_largest(2), 4), round(expected_largest(100), 4)
    (0.5642, 2.5076)
    """
    x = np.linspace(-12.0, 12.0, 24_000)
    return float(np.trapezoid((x > 0.0) - ndtr(x) ** count, x))


def with_jitter(program: Program, prices: Prices, scenario: Scenario, layout: Layout) -> tuple[Program, Prices]:
    """The Program and prices of a step whose kernel times vary between ranks; both as they were without jitter."""
    spread = scenario.cluster.profile.jitter
    if spread is None or spread.value == 0.0:
        return program, prices
    kernels = np.array([isinstance(cls, Compute | Update) for cls in program.classes])[program.cls]
    excess = _excess(program, prices, kernels, spread.value) * expected_largest(layout.expert_data)
    noise = _drawn(kernels.tobytes(), prices.lanes, spread.value, scenario.routing.seed)
    return _charged(program, replace(prices, noise=noise), excess)


@lru_cache(maxsize=2)
def _drawn(kernels: bytes, lanes: int, spread: float, seed: int) -> FloatArray:
    """Factor on every op in every lane [ops, lanes], 1 where ``kernels`` is false; kept, as prices do not matter."""
    varies = np.frombuffer(kernels, dtype=bool)
    factors = np.ones((len(varies), lanes))
    width = np.log1p(spread**2)
    draws = np.random.default_rng([seed, STREAM]).standard_normal((int(varies.sum()), lanes))
    factors[varies] = np.exp(width**0.5 * draws - width / 2.0)
    factors.flags.writeable = False
    return factors


def _excess(program: Program, prices: Prices, kernels: npt.NDArray[np.bool_], spread: float) -> FloatArray:
    """Standard deviation of the compute time of a step, of the slowest lane of each pipeline rank [ranks]."""
    squares = np.zeros((program.ranks, prices.lanes))
    np.add.at(squares, program.rank[kernels], prices.seconds[rows_of(program, prices)[kernels]] ** 2)
    return np.asarray(spread * np.sqrt(squares.max(axis=1)))


def _charged(program: Program, prices: Prices, excess: FloatArray) -> tuple[Program, Prices]:
    """Let the wait for the slowest replica take its time on every rank: a class of its own for each."""
    waits = np.array([isinstance(cls, Fixed) and cls.family == REPLICAS for cls in program.classes])[program.cls]
    ops = np.flatnonzero(waits)
    count = len(ops)
    cls = program.cls.copy()
    cls[ops] = len(program.classes) + np.arange(count)
    seconds = excess[program.rank[ops]]
    classes = (*program.classes, *(Fixed(REPLICAS, value) for value in seconds.tolist()))
    share = np.zeros((count, len(prices.families)))
    share[:, [name == REPLICAS for name in prices.families]] = 1.0
    tiers = prices.flow_seconds.shape[1]
    return replace(program, classes=classes, cls=cls), replace(
        prices,
        row=np.concatenate([prices.row, len(prices.seconds) + np.arange(count)]),
        rows=np.concatenate([prices.rows, np.ones(count, dtype=np.int64)]),
        seconds=np.concatenate([prices.seconds, np.repeat(seconds[:, None], prices.lanes, axis=1)]),
        latency=np.concatenate([prices.latency, np.zeros(count)]),
        flow_seconds=np.concatenate([prices.flow_seconds, np.zeros((count, tiers))]),
        flow_demand=np.concatenate([prices.flow_demand, np.ones((count, tiers))]),
        share=np.concatenate([prices.share, share]),
    )
