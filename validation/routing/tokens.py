"""How neighbouring tokens and successive checkpoints share experts: Mixtral's repetition, OLMoE's early fixing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simulator.routing.chances import chances_of
from simulator.routing.load import draw, inclusion
from simulator.routing.tendencies import Tendencies
from simulator.routing.tokens import block, map_correlation, overlap, repetition
from simulator.spec.model import Router
from validation.checks import Check, at_most, near

MIXTRAL = {0: ((0.02, 0.01), (14.1, 48.0)), 15: ((0.23, 0.08), (26.4, 63.7)), 31: ((-0.02, 0.12), (22.7, 50.9))}
"""Layer: (context correlation, sticky), published percent of tokens with the same first choice, with a common one."""


def checks() -> Iterator[Check]:
    """Checks of repetition, overlap and the ceiling of loads."""
    rng = np.random.default_rng(5)
    source = "Jiang et al. 2024, arXiv 2401.04088, table 5, mean of eight domains of The Pile"
    for layer, ((correlation, sticky), published) in MIXTRAL.items():
        even = Tendencies(np.zeros((1, 8)), 2, context_correlation=correlation, sticky=sticky)
        found = repetition(block(even, 0, 200_000, rng).picks(Router(), 2))
        for what, expected, reached in zip(
            ("same first choice", "first or second shared"), published, found, strict=True
        ):
            yield near("tokens", f"Mixtral 8x7B, layer {layer}: {what}", expected, 100 * reached, "%", 1.5, source)
    source = "Muennighoff et al. 2024, arXiv 2409.02060, figure 20: about 60 % at 1 % of training, about 80 % at 40 %"
    for progress, expected in ((0.01, 60.0), (0.4, 80.0)):
        reached = 100 * overlap(map_correlation(progress), 64, 8, rng)
        yield near(
            "tokens", f"OLMoE, choices fixed after {progress:.0%} of training", expected, reached, "%", 3.0, source
        )
    yield from _ceiling(rng)


def _ceiling(rng: np.random.Generator) -> Iterator[Check]:
    """A token uses an expert once: no load exceeds E / k of the mean, however strong the collapse."""
    for experts, top_k in ((8, 2), (64, 6), (256, 8)):
        logits = 8.0 * rng.standard_normal((50, experts))
        counts = draw(chances_of(logits, top_k), 4096, top_k, rng)
        name = f"largest load over the mean, collapsed router, top-{top_k} of {experts}"
        yield at_most(
            "tokens", name, experts / top_k, float((counts / counts.mean(-1, keepdims=True)).max()), "", "E / k"
        )
    even = draw(inclusion(np.full((50, 64), 1 / 64), 6), 4096, 6, rng)
    floor = 1.0 + 2.344 * np.sqrt((1 - 6 / 64) / (4096 * 6 / 64))
    yield near(
        "tokens",
        "largest load over the mean, even router, 4096 tokens",
        floor,
        float((even.max(-1) / even.mean(-1)).mean()),
        "",
        0.02,
        "1 + z_E sqrt((1 - k/E) / mu)",
    )


__all__ = ["MIXTRAL", "checks"]
