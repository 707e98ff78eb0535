"""Where tokens travel and where experts sit: distinct nodes, bytes, EPLB's example, skew over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simulator.routing.chances import chances_of
from simulator.routing.load import draw
from simulator.routing.placement import Placement, balanced, contiguous, slowest_over_mean
from simulator.routing.traffic import copies, distinct_groups, payload_bytes
from simulator.spec import load_model
from validation.checks import Check, at_most, near, within

EPLB = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
"""The example of DeepSeek's load balancer: two layers of 12 experts."""
EPLB_PLAN = np.array(
    [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
)
"""The plan printed with it: experts of 16 slots on 8 ranks."""


def checks() -> Iterator[Check]:
    """Checks of traffic and placement."""
    yield from _distinct()
    yield from _eplb()
    yield from _skew()


def _distinct() -> Iterator[Check]:
    moe = load_model("deepseek-v3").moe
    assert moe is not None
    uniform = "D (1 - C(E - E/D, k) / C(E, k))"
    limit = "DeepSeek-V3, arXiv 2412.19437, section 2.1.2: at most 4 nodes by the sum of their two best scores"
    yield near(
        "traffic", "distinct nodes, top-8 of 256 on 8 nodes", 5.2947, distinct_groups(256, 8, 8), "nodes", 5e-5, uniform
    )
    yield near(
        "traffic",
        "distinct ranks, top-8 of 256 on 64 ranks",
        7.6758,
        distinct_groups(256, 64, 8),
        "ranks",
        5e-5,
        uniform,
    )
    nodes = copies(moe, 8)
    yield near("traffic", "distinct nodes with DeepSeek-V3's limit", 3.95, nodes, "nodes", 0.02, limit)
    source = "4096 tokens x 7/8 of the nodes x 7168 x (FP8 with one FP32 scale per 128; BF16)"
    for name, form, expected in (("dispatch, FP8", "fp8", 104.9), ("combine, BF16", "bf16", 203.4)):
        sent = 4096 * nodes * 7 / 8 * payload_bytes(7168, form) / 1e6
        yield within(
            "traffic", f"DeepSeek-V3 {name}: sent between nodes per 4096 tokens", expected, sent, "MB", 0.005, source
        )


def _eplb() -> Iterator[Check]:
    source = "github.com/deepseek-ai/EPLB, README example: 16 slots on 8 ranks of 2 nodes, 4 groups"
    plan = balanced(EPLB.astype(float), 8, redundant=4, nodes=2, groups=4)
    slowest = slowest_over_mean(plan, EPLB * 12)  # a multiple of all replica counts: rows divide evenly
    printed = slowest_over_mean(Placement(EPLB_PLAN, 8, 12), EPLB * 12)
    for layer in range(2):
        name = f"EPLB example, layer {layer}: busiest rank over mean"
        yield at_most("placement", name, float(printed[layer]), float(slowest[layer]), "", source)


def _skew() -> Iterator[Check]:
    """Busiest expert and rank under Gaussian popularity; by token in our own simulation, here by counts."""
    rng = np.random.default_rng(6)
    source = "token-by-token simulation, 256 experts on 64 ranks, top-8, 32768 tokens"
    plain = contiguous(40, 256, 64)
    for sigma, expert, rank in ((0.0, 1.09, 1.04), (0.25, 1.89, 1.33), (0.5, 3.46, 1.79), (1.0, 8.7, 3.3)):
        logits = sigma * rng.standard_normal((40, 256))
        counts = draw(chances_of(logits, 8), 32768, 8, rng)
        busiest = float((counts.max(-1) / counts.mean(-1)).mean())
        yield within(
            "placement", f"popularity sigma {sigma}: busiest expert over mean", expert, busiest, "", 0.15, source
        )
        slowest = float(slowest_over_mean(plain, counts).mean())
        yield within("placement", f"popularity sigma {sigma}: busiest rank over mean", rank, slowest, "", 0.15, source)
        if sigma:
            loads = chances_of(logits, 8)
            moved = float(slowest_over_mean(balanced(loads, 64), counts).mean())
            copied = float(slowest_over_mean(balanced(loads, 64, redundant=64), counts).mean())
            yield at_most(
                "placement", f"popularity sigma {sigma}: placed by load, no worse", slowest, moved, "", "greedy packing"
            )
            yield at_most(
                "placement",
                f"popularity sigma {sigma}: with 64 copies, no worse",
                moved,
                copied,
                "",
                "greedy replication",
            )


__all__ = ["EPLB", "checks"]
