"""Where experts sit: contiguous blocks, or replicas placed after the load as DeepSeek's EPLB does.

The load balancer published with DeepSeek-V3 (github.com/deepseek-ai/EPLB; arXiv 2412.19437, section 3.4) places the
experts of a layer in three greedy steps:

    expert groups are packed onto nodes          a token's group limit then keeps it on few nodes
    each node replicates its busiest experts     one more replica for the highest load per replica, until slots are full
    replicas are packed onto the node's ranks    heaviest first, into the least loaded rank with a free slot

Where groups do not divide over nodes, all ranks count as one node. Added here: no expert has two replicas on one rank
(the second would take no load away), single swaps with the busiest rank go on while they lower its load, and where
contiguous blocks are even already they stay: moving experts would gain nothing and tear the router's groups apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CLOSE_ENOUGH = 1.002
"""Slowest rank over the mean below which swaps stop, and contiguous blocks stay."""

MAX_SWAPS = 100
"""Swaps per layer and node at most."""


@dataclass(frozen=True)
class Placement:
    """Experts of every layer on the ranks of one expert group.

    ``expert_of_slot`` [layers, slots]: rank-major, the ranks of a node side by side; every rank has the same number of
    slots, and every expert has at least one.
    """

    expert_of_slot: IntArray
    ranks: int
    experts: int

    def __post_init__(self) -> None:
        """Check the laws above."""
        slots = self.expert_of_slot.shape[-1]
        if slots % self.ranks:
            raise ValueError(f"{slots} slots do not divide over {self.ranks} ranks")
        if self.expert_of_slot.min() < 0 or self.expert_of_slot.max() >= self.experts:
            raise ValueError(f"expert_of_slot: experts are 0 to {self.experts - 1}")
        if not self.replicas.all():
            raise ValueError("expert_of_slot: an expert has no slot")

    @property
    def layers(self) -> int:
        """Layers that are placed."""
        return int(self.expert_of_slot.shape[0])

    @property
    def slots_per_rank(self) -> int:
        """Experts that every rank holds, replicas counted."""
        return int(self.expert_of_slot.shape[1]) // self.ranks

    @cached_property
    def replicas(self) -> IntArray:
        """Slots of each expert [layers, experts]."""
        counts = np.bincount(self._source.ravel(), minlength=self.layers * self.experts)
        return counts.reshape(self.layers, self.experts)

    @cached_property
    def _source(self) -> IntArray:
        """Position of each slot's expert in counts that are flat over layers and experts [layers, slots]."""
        return self.expert_of_slot + self.experts * np.arange(self.layers)[:, None]

    @cached_property
    def in_order(self) -> bool:
        """Slot s holds expert s in every layer: contiguous blocks."""
        slots = self.expert_of_slot.shape[1]
        return slots == self.experts and bool((self.expert_of_slot == np.arange(slots)).all())

    @cached_property
    def _shared(self) -> tuple[IntArray, IntArray, IntArray]:
        """Slots (flat over layers) of experts with several replicas, number of replicas, and which one the slot is."""
        source = self._source.ravel()
        order = np.argsort(source, kind="stable")
        first = np.concatenate([[0], np.cumsum(self.replicas.ravel())[:-1]])
        which = np.empty_like(order)
        which[order] = np.arange(len(order)) - first[source[order]]
        slots = np.flatnonzero(self.replicas.ravel()[source] > 1)
        return slots, self.replicas.ravel()[source[slots]], which[slots]

    def rows(self, counts: IntArray) -> IntArray:
        """Rows of each slot [..., layers, ranks, slots per rank] from counts [..., layers, experts].

        The tokens of an expert go round its replicas: replica j of r takes tokens j, j + r, and so on. Nothing is
        lost, and replicas differ by one row at most.

        >>> place = Placement(np.array([[0, 1, 0, 2]]), ranks=2, experts=3)
        >>> place.rows(np.array([[7, 2, 1]])).tolist()
        [[[4, 2], [3, 1]]]
        """
        lead, shape = counts.shape[:-2], (self.layers, self.ranks, self.slots_per_rank)
        if counts.shape[-2:] != (self.layers, self.experts):
            raise ValueError(f"counts {counts.shape} do not end in {self.layers} layers and {self.experts} experts")
        if self.in_order:
            return counts.reshape(*lead, *shape)
        rows = np.take(counts.reshape(-1, self.layers * self.experts), self._source.ravel(), axis=1)
        slots, replicas, which = self._shared
        if len(slots):
            rows[:, slots] = (rows[:, slots] + (replicas - 1 - which)) // replicas
        return rows.reshape(*lead, *shape)

    def rank_loads(self, counts: IntArray) -> IntArray:
        """Rows of each rank [..., layers, ranks] from counts [..., layers, experts]."""
        rows = self.rows(counts)
        starts = np.arange(0, self.expert_of_slot.shape[1], self.slots_per_rank)
        return np.add.reduceat(rows.reshape(*rows.shape[:-2], -1), starts, axis=-1)


def contiguous(layers: int, experts: int, ranks: int) -> Placement:
    """Expert e sits on rank e // (experts / ranks), in every layer."""
    return Placement(np.tile(np.arange(experts, dtype=np.int64), (layers, 1)), ranks, experts)


def slowest_over_mean(placement: Placement, counts: IntArray) -> FloatArray:
    """Rows of the busiest rank over the mean rank [..., layers]; 1 where there are none."""
    loads = placement.rank_loads(counts)
    total = loads.sum(-1)
    return np.where(total > 0, loads.max(-1) * placement.ranks / np.maximum(total, 1), 1.0)


def balanced(loads: npt.ArrayLike, ranks: int, *, redundant: int = 0, nodes: int = 1, groups: int = 1) -> Placement:
    """Place the experts of every layer after ``loads`` [layers, experts], with ``redundant`` replicas per layer.

    Without redundant experts this is a re-placement. ``groups``: expert groups of the router; where they divide over
    the ``nodes``, a group stays on one node and so do the replicas of its experts.

    Raises:
        ValueError: experts and redundant ones do not divide over the ranks, or a rank would hold an expert twice.
    """
    loads = np.asarray(loads, dtype=np.float64)
    layers, experts = loads.shape
    if redundant < 0 or (experts + redundant) % ranks:
        raise ValueError(f"{experts} experts and {redundant} redundant ones do not divide over {ranks} ranks")
    if experts % groups or ranks % nodes:
        raise ValueError(f"{experts} experts in {groups} groups on {ranks} ranks of {nodes} nodes: not divisible")
    if groups % nodes:
        nodes, groups = 1, 1
    local, here, slots = experts // nodes, ranks // nodes, (experts + redundant) // nodes
    if slots > local * here:
        raise ValueError(f"{slots // here} slots per rank for {local} experts: a rank would hold an expert twice")
    size = experts // groups
    of_node = _pack(np.tile(np.arange(groups), (layers, 1)), loads.reshape(layers, groups, size).sum(-1), nodes)
    names = (of_node[..., None] * size + np.arange(size)).reshape(layers, nodes, local)
    weight = np.take_along_axis(loads[:, None], names, axis=-1).reshape(layers * nodes, local)
    replicas = _replicate(weight, slots, here)
    weight = weight / replicas
    items = np.repeat(np.tile(np.arange(local), layers * nodes), replicas.ravel()).reshape(layers * nodes, slots)
    plan = _swap(_pack(items, np.take_along_axis(weight, items, axis=-1), here), weight, here)
    plan = np.take_along_axis(names, plan.reshape(layers, nodes, slots), axis=-1).reshape(layers, -1)
    if not redundant:
        blocks = loads.reshape(layers, ranks, -1).sum(-1)
        plan[blocks.max(-1) <= CLOSE_ENOUGH * blocks.mean(-1)] = np.arange(experts)
    return Placement(plan, ranks, experts)


def _replicate(weight: FloatArray, slots: int, limit: int) -> IntArray:
    """Replicas of each item [rows, items], ``slots`` in all: the highest load per replica gets the next one."""
    replicas = np.ones(weight.shape, dtype=np.int64)
    row, share = np.arange(len(weight)), weight.copy()
    for _ in range(slots - weight.shape[1]):
        busiest = share.argmax(-1)
        replicas[row, busiest] += 1
        count = replicas[row, busiest]
        share[row, busiest] = np.where(count < limit, weight[row, busiest] / count, -1.0)
    return replicas


def _pack(items: IntArray, weight: FloatArray, packs: int) -> IntArray:
    """Items [rows, items] in slots [rows, packs x size]: heaviest first, each into the least loaded pack with room.

    A pack that holds the item already is taken only where no other has room.
    """
    rows, count = items.shape
    size, row = count // packs, np.arange(rows)
    load, used = np.zeros((rows, packs)), np.zeros((rows, packs), dtype=np.int64)
    held = np.zeros((rows, int(items.max()) + 1, packs), dtype=bool)
    far = weight.sum(-1, keepdims=True) + 1.0
    slots = np.empty_like(items)
    for column in np.argsort(-weight, axis=-1, kind="stable").T:
        item = items[row, column]
        pack = (load + far * held[row, item]).argmin(-1)
        slots[row, pack * size + used[row, pack]] = item
        used[row, pack] += 1
        held[row, item, pack] = True
        load[row, pack] = np.where(used[row, pack] < size, load[row, pack] + weight[row, column], np.inf)
    return slots


def _swap(slots: IntArray, weight: FloatArray, packs: int) -> IntArray:
    """Swap a slot of the busiest pack with one of another pack while that lowers the higher of the two.

    ``slots`` [rows, packs x size] names items, ``weight`` [rows, items] is the load of one replica. A second replica
    in one pack counts as a load beyond all others, so that it is swapped away first.
    """
    rows, count = slots.shape
    plan = slots.reshape(rows, packs, count // packs).copy()
    active = np.arange(rows)
    for _ in range(MAX_SWAPS):
        here = plan[active]
        load = weight[active[:, None, None], here]  # [rows, packs, size]
        far = 2.0 * load.sum((1, 2))[:, None, None] + 1.0
        times = (here[..., None] == here[..., None, :]).sum(-1)
        total = (load + far * (1.0 - 1.0 / times)).sum(-1)  # m replicas in one pack are m - 1 too many
        uneven = total.max(-1) > CLOSE_ENOUGH * load.sum((1, 2)) / packs
        active, here, load, far, times, total = (each[uneven] for each in (active, here, load, far, times, total))
        if not len(active):
            break
        row, busiest, twice = np.arange(len(active)), total.argmax(-1), far * (times > 1)
        top = total[row, busiest][:, None, None, None]
        gain = load[row, busiest][:, :, None, None] - load[:, None]  # [rows, slot of the busiest, packs, size]
        same = here[row, busiest][:, :, None, None] == here[:, None]
        one = top - gain + (far * same.any(1))[:, None] - twice[row, busiest][..., None, None]
        other = (total[:, None] + far * same.any(-1))[..., None] + gain - twice[:, None]
        worst = np.maximum(one, other)
        worst[row, :, busiest] = np.inf
        best = worst.reshape(len(active), -1).argmin(-1)
        mine, pack, slot = np.unravel_index(best, gain.shape[1:])
        better = worst[row, mine, pack, slot] < top[:, 0, 0, 0] * (1.0 - 1e-9)
        active, busiest, mine, pack, slot = (each[better] for each in (active, busiest, mine, pack, slot))
        out, back = plan[active, busiest, mine], plan[active, pack, slot]
        plan[active, busiest, mine], plan[active, pack, slot] = back, out
    return plan.reshape(rows, count)
