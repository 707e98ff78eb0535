"""A Program: the ops of one training step with their order and dependencies, without prices.

Each op has a pipeline rank, an in-order stream, a class and a microbatch (which selects the class's load). It starts
when every op that it depends on has ended; the previous op of its own stream is one of them. Arrays over ops keep
DeepSeek-V3's 80 000 ops cheap to build, to sort and to play.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from simulator.timing.classes import Bulk, Exchange, Fixed, OpClass

IntArray = npt.NDArray[np.int64]

STREAMS = ("compute", "expert", "tensor", "context", "pipeline", "gradient", "parameter")
COMPUTE, EXPERT, TENSOR, CONTEXT, PIPELINE, GRADIENT, PARAMETER = range(len(STREAMS))

EXPOSED = {
    EXPERT: "exposed_expert_all_to_all",
    TENSOR: "exposed_tensor",
    CONTEXT: "exposed_context",
    PIPELINE: "exposed_pipeline",
    GRADIENT: "exposed_gradient_reduce",
    PARAMETER: "exposed_parameter_gather",
}
"""Name of the breakdown term of each communication stream."""

REPLICAS = "waiting_replicas"
"""Family of the wait for the slowest replica of a stage."""


@dataclass(frozen=True)
class Program:
    """Ops of one step. Dependencies are in compressed rows: op i waits for ``needs[start[i]:start[i+1]]``."""

    ranks: int
    classes: tuple[OpClass, ...]
    rank: IntArray
    stream: IntArray
    cls: IntArray
    microbatch: IntArray
    stage: IntArray
    label: IntArray
    labels: tuple[str, ...]
    start: IntArray
    needs: IntArray

    def __len__(self) -> int:
        """Number of ops."""
        return len(self.rank)

    @cached_property
    def barrier(self) -> npt.NDArray[np.bool_]:
        """Ops at which all lanes of a group wait for each other [ops]."""
        meets = np.array(
            [isinstance(c, Exchange | Bulk) or (isinstance(c, Fixed) and c.family == "barrier") for c in self.classes]
        )
        return np.asarray(meets[self.cls])

    @cached_property
    def waiters(self) -> tuple[IntArray, IntArray]:
        """The dependencies turned round: ops that wait for op i are ``ops[start[i]:start[i+1]]``."""
        order = np.argsort(self.needs, kind="stable")
        owners = np.repeat(np.arange(len(self)), np.diff(self.start))
        counts = np.bincount(self.needs, minlength=len(self))
        return np.concatenate([[0], np.cumsum(counts)]), owners[order]

    @cached_property
    def levels(self) -> tuple[IntArray, ...]:
        """Ops in waves: each wave depends on earlier waves only.

        Raises:
            ValueError: the dependencies have a cycle, that is, the schedule deadlocks.
        """
        begin, followers = self.waiters
        missing = np.diff(self.start)
        wave = np.flatnonzero(missing == 0)
        waves, done = [], 0
        while len(wave):
            waves.append(wave)
            done += len(wave)
            counts = begin[wave + 1] - begin[wave]
            total = int(counts.sum())
            offsets = np.repeat(begin[wave] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(total)
            reached, times = np.unique(followers[offsets], return_counts=True)
            missing[reached] -= times
            wave = reached[missing[reached] == 0]
        if done != len(self):
            stuck = int(np.flatnonzero(missing > 0)[0])
            raise ValueError(
                f"deadlock: {len(self) - done} ops never start, first on rank {self.rank[stuck]}: "
                f"{self.labels[self.label[stuck]]}"
            )
        return tuple(waves)


@dataclass
class Draft:
    """A Program under construction."""

    ranks: int

    def __post_init__(self) -> None:
        """Start empty."""
        self.count = 0
        self._class_ids: dict[OpClass, int] = {}
        self._labels: dict[str, int] = {}
        self._columns: list[tuple[IntArray, ...]] = []
        self._pairs: list[tuple[IntArray, IntArray]] = []
        self._single: list[tuple[int, ...]] = []
        self._waits: list[tuple[int, int]] = []

    def class_id(self, cls: OpClass) -> int:
        """Number of a class, new or known."""
        return self._class_ids.setdefault(cls, len(self._class_ids))

    def label_id(self, label: str) -> int:
        """Number of a label, new or known."""
        return self._labels.setdefault(label, len(self._labels))

    def op(
        self,
        *,
        rank: int,
        stream: int,
        cls: OpClass,
        label: str,
        after: Iterable[int],
        microbatch: int = 0,
        stage: int = 0,
    ) -> int:
        """Add one op and return its number."""
        number = self.count
        self._single.append((number, rank, stream, self.class_id(cls), microbatch, stage, self.label_id(label)))
        self._waits.extend((number, need) for need in after)
        self.count += 1
        return number

    def rows(
        self,
        number: IntArray,
        rank: IntArray,
        stream: IntArray,
        cls: IntArray,
        microbatch: IntArray,
        stage: IntArray,
        label: IntArray,
    ) -> None:
        """Add many ops at once; the caller has reserved their numbers."""
        self._columns.append((number, rank, stream, cls, microbatch, stage, label))

    def reserve(self, count: int) -> int:
        """Reserve consecutive numbers and return the first."""
        first = self.count
        self.count += count
        return first

    def depend(self, ops: IntArray, needs: IntArray) -> None:
        """Let each of ``ops`` wait for the matching one of ``needs``."""
        self._pairs.append((np.asarray(ops, dtype=np.int64), np.asarray(needs, dtype=np.int64)))

    def wait(self, op: int, need: int) -> None:
        """Let one op wait for another."""
        self._waits.append((op, need))

    def finish(self) -> Program:
        """Close the draft: sort by number, add the in-order rule of every stream, drop duplicates."""
        single = np.array(self._single, dtype=np.int64).reshape(-1, 7)
        number, rank, stream, cls, microbatch, stage, label = (
            np.concatenate(column) for column in zip(*self._columns, tuple(single.T), strict=True)
        )
        order = np.argsort(number)
        rank, stream, cls, microbatch, stage, label = (
            column[order] for column in (rank, stream, cls, microbatch, stage, label)
        )
        queue = np.lexsort((np.arange(self.count), stream, rank))
        same = (rank[queue][1:] == rank[queue][:-1]) & (stream[queue][1:] == stream[queue][:-1])
        waits = np.array(self._waits, dtype=np.int64).reshape(-1, 2)
        pairs = [*self._pairs, (waits[:, 0], waits[:, 1]), (queue[1:][same], queue[:-1][same])]
        ops, needs = (np.concatenate(side) for side in zip(*pairs, strict=True))
        keys = np.sort(ops * self.count + needs)  # np.unique hashes, several times as slow
        ops, needs = np.divmod(keys[np.diff(keys, prepend=-1) > 0], max(1, self.count))
        start = np.concatenate([[0], np.cumsum(np.bincount(ops, minlength=self.count))])
        return Program(
            self.ranks,
            tuple(self._class_ids),
            rank,
            stream,
            cls,
            microbatch,
            stage,
            label,
            tuple(self._labels),
            start,
            needs,
        )
