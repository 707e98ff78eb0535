"""Op classes: what an op of a Program costs depends only on its class (and, for experts, on its microbatch's load).

A Program names classes; :class:`simulator.timing.prices.Pricer` turns a list of classes into seconds. Two ops of the
same class take the same time, so DeepSeek-V3's 80 000 ops need about a hundred prices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from simulator.timing.kernels import Pass
from simulator.workload.ops import Collective, Op


@dataclass(frozen=True)
class Item:
    """One op in its place: the stack whose tokens it processes, and the family under which it is reported."""

    op: Op
    stack: str
    family: str


@dataclass(frozen=True)
class Compute:
    """Kernels that run one after another on the compute stream.

    ``which``: forward, input gradient or weight gradient of ``items``; ``repeats`` are forward ops computed again
    first. ``layer`` is the MoE layer whose load sets the rows of routed experts, None without experts.
    ``overlapped``: communication holds some multiprocessors from beginning to end; ``beside``: these exchanges hold
    them, for as long as they last. ``parts``: the op is one of so many equal pieces, each of ``rows / parts``.
    """

    which: Pass
    items: tuple[Item, ...]
    repeats: tuple[Item, ...]
    layer: int | None
    overlapped: bool
    parts: int = 1
    beside: tuple[Beside, ...] = ()

    @cached_property
    def _key(self) -> int:
        fields = (self.which, self.items, self.repeats, self.layer, self.overlapped, self.parts, self.beside)
        return hash(fields)

    def __hash__(self) -> int:
        """That of the fields, formed once: classes are looked up far more often than they are written."""
        return self._key


@dataclass(frozen=True)
class Exchange:
    """One all-to-all of an expert group: dispatch-shaped (tokens out) or combine-shaped (results back).

    ``parts``: it carries one of so many equal pieces of the rows, at the latency of a whole one.
    """

    shape: Literal["dispatch", "combine"]
    op: Collective
    stack: str
    layer: int
    overlapped: bool
    parts: int = 1


@dataclass(frozen=True)
class Beside:
    """An exchange under way while compute runs.

    ``during``: everything that the compute stream does between its issue and the first op that needs it, in shares by
    their times; empty: it runs beside one op alone.
    """

    exchange: Exchange
    during: tuple[Compute, ...] = ()


@dataclass(frozen=True)
class Region:
    """A collective inside a layer over the tensor, expert_tensor or context group.

    ``parts``: one of so many equal pieces; of a ring over as many ranks, one step to the neighbour.
    """

    op: Collective
    backward: bool
    stack: str
    layer: int | None = None  # MoE layer of a collective over received rows
    parts: int = 1


@dataclass(frozen=True)
class Send:
    """Activations or their gradients on the way to the neighbouring stage."""

    stack: str


@dataclass(frozen=True)
class Bulk:
    """A collective over a given buffer: gradient reduction, parameter gather, gradient norm."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
    group: str
    size_bytes: float


@dataclass(frozen=True)
class Update:
    """The optimizer: reads and writes its shard of the states."""

    traffic_bytes: float


@dataclass(frozen=True)
class Fixed:
    """A fixed time, reported under a family (the stack's step overhead); zero for a barrier."""

    family: str
    seconds: float


OpClass = Compute | Exchange | Region | Send | Bulk | Update | Fixed
