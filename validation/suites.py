"""What is measured, and how long: ``quick``, ``full`` and ``recorded`` on a CPU, ``gpu`` on one GPU or more.

A suite is a list of groups of cases for one process (:mod:`validation.shapes`), and of exchanges between several:
all-to-alls that are equal, that send 60 % to one hot rank, or whose parts are exponentially distributed, and layers
whose experts two ranks share. Two passes of ``quick`` take about 3 minutes, of ``full`` under 10, of ``gpu`` under 8;
``recorded`` takes 20 and is that of ``validation/measured``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from validation.cases import Case, Layer, all_to_all, expert_parallel_layer
from validation.shapes import (
    MAX_FLOP,
    MODELS,
    Group,
    attentions,
    cpu_exchanged,
    gpu_exchanged,
    gpu_groups,
    layers,
    steps,
)

Name = Literal["quick", "full", "recorded", "gpu"]
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
"""glibc keeps freed memory, so that no case pays for fresh pages."""


@dataclass(frozen=True)
class Effort:
    """A case is repeated at least ``repeats`` times and ``seconds``; after ``patience_s`` 3 times are enough."""

    seconds: float
    repeats: int
    patience_s: float

    def enough(self, samples: Sequence[float]) -> bool:
        """Whether so many seconds of single repeats are enough."""
        done, spent_s = len(samples), sum(samples)
        return (done >= self.repeats and spent_s >= self.seconds) or (done >= 3 and spent_s >= self.patience_s)


@dataclass(frozen=True)
class Suite:
    """Groups that one process times, cases for each number of ranks, and how often the ones and the others repeat."""

    device: Literal["cpu", "cuda"]
    groups: list[Group]
    distributed: dict[int, list[Case]]
    effort: Effort
    effort_together: Effort

    def alone(self) -> list[Case]:
        """Every case of one process, once."""
        return list({case.key: case for group in self.groups for case in group}.values())

    def cases(self) -> list[Case]:
        """Every case."""
        return self.alone() + [case for cases in self.distributed.values() for case in cases]


def suite(name: Name, *, devices: int = 1) -> Suite:
    """A suite by name; ``devices``: GPUs at hand, for all-to-alls among them."""
    if name == "gpu":
        ranks = tuple(number for number in (2, 4, 8) if number <= devices)
        together = distributed(ranks, "nccl", 28, gpu_exchanged())
        return Suite("cuda", gpu_groups(), together, Effort(0.02, 5, 0.3), Effort(0.05, 10, 0.3))
    if name == "quick":
        groups = [*layers(9, 1, 1.5e9), *attentions(4, 2, 1024), *steps(("b", "c"), (1, 2, 4), (1.0,))]
        together = distributed((2,), "gloo", 24, cpu_exchanged(3))
        return Suite("cpu", groups, together, Effort(0.02, 5, 0.2), Effort(0.05, 10, 0.3))
    if name == "full":
        groups = [*layers(15, 1, MAX_FLOP), *attentions(8, 2, 2048), *steps(("b", "c"), (1, 2, 4), (1.0, 2.0))]
        groups += layers(1, 3, 4e9, form="bf16")
        together = distributed((2, 3, 4), "gloo", 26, cpu_exchanged(4))
        return Suite("cpu", groups, together, Effort(0.03, 5, 0.4), Effort(0.2, 20, 0.5))
    groups = [*layers(28, 1, MAX_FLOP), *attentions(16, 2, 2048), *steps(tuple(MODELS), (1, 2, 4), (1.0, 1.5, 2.0))]
    groups += layers(4, 3, 4e9, form="bf16")
    together = distributed((2, 3, 4), "gloo", 26, cpu_exchanged(8))
    return Suite("cpu", groups, together, Effort(0.03, 5, 0.4), Effort(0.4, 30, 1.0))


def launch(name: Name, out: Path, *, passes: int = 2, limit_s: float | None = None) -> int:
    """Measure in a process of its own, which PyTorch and the allocator's settings need; its exit code."""
    command = [sys.executable, "-m", "validation.measure", "--suite", name, "--out", str(out), "--passes", str(passes)]
    command += [] if limit_s is None else ["--limit-s", str(limit_s)]
    return subprocess.run(command, env=os.environ | ALLOCATOR, check=False).returncode


def distributed(
    ranks: Iterable[int], backend: str, doublings: int, exchanged: Sequence[Layer]
) -> dict[int, list[Case]]:
    """All-to-alls of 4 KB to 2^doublings bytes sent by each rank; on 2 ranks also the layers in ``exchanged``."""
    found: dict[int, list[Case]] = {}
    for number in ranks:
        sizes = [2**power for power in range(12, doublings + 1, 2)]
        found[number] = [
            all_to_all(sent, split, backend) for size in sizes for split, sent in splits(number, size).items()
        ]
        if number == 2:
            for layer in exchanged:
                found[number] += [expert_parallel_layer(layer, number, which, backend) for which in ("F", "FB")]
    return found


def splits(ranks: int, size_bytes: int) -> dict[str, list[list[int]]]:
    """Who sends how much to whom when every rank sends ``size_bytes``, its own part included, in multiples of 4."""
    hot = [0.6, *[0.4 / (ranks - 1)] * (ranks - 1)]
    random = np.random.default_rng([ranks, size_bytes]).exponential(size=(ranks, ranks))
    shares: dict[str, Any] = {"equal": [[1.0] * ranks] * ranks, "hot": [hot] * ranks, "random": random}
    return {
        split: [[4 * part for part in _divided(size_bytes // 4, row)] for row in rows] for split, rows in shares.items()
    }


def _divided(total: int, row: Any) -> list[int]:
    through = np.cumsum(np.asarray(row, dtype=np.float64))
    return [int(part) for part in np.diff(np.floor(total * through / through[-1] + 0.5), prepend=0.0)]


__all__ = ["ALLOCATOR", "Effort", "Name", "Suite", "distributed", "launch", "splits", "suite"]
