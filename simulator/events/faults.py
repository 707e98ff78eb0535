"""Faults of the machine: what a slow rank or a slow link costs, as another Program and other prices.

A slow rank is looked up in the expert grid: pipeline rank, lane, replica. One expert group is played for each stage;
it is the group with the fault, since gradients meet at a barrier over all replicas and the slowest sets the step. If
faults hit several replicas, the worst of each lane is played.

* Kernels of a slow lane take 1 / ``compute`` times as long. Tensor- and context-parallel ranks move in lockstep: the
  dense kernels of all of them are slow; experts belong to their expert-tensor group alone.
* A slow tier of a node stretches every flow of its ranks there by 1 / ``bandwidth``. A collective waits for its slowest
  member, so an exchange is slow as a whole; messages are slow in the lanes that send or receive on that node; a
  collective over replicas is slow if any rank of the stage sits there.

Only ops on the ranks with a fault get classes of their own, so that readers see nothing but prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from simulator.layout import Grid, Layout
from simulator.program import Program
from simulator.spec.faults import node_chips
from simulator.spec.scenario import Scenario
from simulator.timing import Bulk, Compute, Exchange, OpClass, Prices, Region, Send, Update

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slowness:
    """By how much everything takes longer, at least 1, on the ranks that are played.

    ``dense`` and ``expert`` [pipeline ranks, lanes]: kernels. ``links`` [pipeline ranks, lanes, tiers]: flows of a
    lane; ``regions``, alike: those of its tensor- and context-parallel groups. ``bulk`` [pipeline ranks, tiers]:
    collectives over replicas. ``combined``: no single replica is as slow as what is played.
    """

    dense: FloatArray
    expert: FloatArray
    links: FloatArray
    regions: FloatArray
    bulk: FloatArray
    combined: bool


def slowness(scenario: Scenario, layout: Layout) -> Slowness | None:
    """Where the faults of a scenario are felt; None where nothing is slow."""
    cluster = scenario.cluster
    tiers = [tier.name for tier in cluster.profile.tiers]
    compute, links = np.ones(cluster.ranks), np.ones((cluster.ranks, len(tiers)))
    node = node_chips(cluster) * cluster.profile.accelerator.ranks_per_accelerator
    for fault in cluster.faults:
        if fault.rank is not None and fault.compute is not None:
            compute[fault.rank] = max(compute[fault.rank], 1.0 / fault.compute)
        elif fault.node is not None and fault.tier is not None and fault.bandwidth is not None:
            there = links[fault.node * node : (fault.node + 1) * node, tiers.index(fault.tier)]
            np.maximum(there, 1.0 / fault.bandwidth, out=there)
    if compute.max() == 1.0 and links.max() == 1.0:
        return None
    together, shards = ["tensor", "context"], ["expert_tensor"]
    felt = np.concatenate(
        [
            _shared(layout.dense, together, compute[:, None]),
            _shared(layout.expert, shards, compute[:, None]),
            links,
            np.maximum(_shared(layout.dense, together, links), _shared(layout.expert, shards, links)),
        ],
        axis=1,
    )
    replicas = _by_replica(layout.expert, felt)
    worst = replicas.max(axis=0)
    dense, expert, flows, regions = np.split(worst, np.cumsum([1, 1, len(tiers)]), axis=2)
    bulk = flows.max(axis=1)
    if layout.stage_replicas > 1:  # a stage lives on the mirrored pipeline rank too
        bulk = np.maximum(bulk, bulk[::-1])
    alone = (replicas == worst).all(axis=(1, 2, 3)).any()
    return Slowness(dense[:, :, 0], expert[:, :, 0], flows, regions, bulk, not bool(alone))


def _shared(grid: Grid, axes: Sequence[str], values: FloatArray) -> FloatArray:
    """Give every rank the largest value in its group along some axes [ranks, ...]."""
    ranks = np.arange(len(values))
    first = ranks - sum(grid.coordinate(axis) * grid.strides[axis] for axis in axes)
    largest = np.ones_like(values)
    np.maximum.at(largest, first, values)
    return np.asarray(largest[first])


def _by_replica(grid: Grid, values: FloatArray) -> FloatArray:
    """Values by replica, pipeline rank and lane, the largest over expert-tensor ranks [replicas, ranks, lanes, ...]."""
    axes = ("expert_data", "pipeline", "expert")
    result = np.ones((*(grid.sizes[axis] for axis in axes), values.shape[1]))
    np.maximum.at(result, tuple(grid.coordinate(axis) for axis in axes), values)
    return result


def with_faults(program: Program, prices: Prices, scenario: Scenario, layout: Layout) -> tuple[Program, Prices]:
    """The Program and prices of a step on a machine with faults; both as they were where nothing is slow."""
    slow = slowness(scenario, layout)
    if slow is None:
        return program, prices
    lanes = layout.expert.sizes["expert"]
    if prices.lanes == 1 < lanes:  # balanced so far: the lanes differ now
        prices = replace(prices, seconds=np.repeat(prices.seconds, lanes, axis=1))
    receiver = _receivers(program)
    hit = np.asarray((slow.dense > 1.0).any(axis=1) | (slow.regions > 1.0).any(axis=(1, 2)))
    hit |= (slow.bulk > 1.0).any(axis=1)
    ops = np.flatnonzero(hit[program.rank] | hit[receiver])
    keys = np.stack([program.cls[ops], program.rank[ops], receiver[ops]], axis=1)
    apart, which = np.unique(keys, axis=0, return_inverse=True)
    cls = program.cls.copy()
    cls[ops] = len(program.classes) + which.ravel()
    classes = (*program.classes, *(program.classes[number] for number in apart[:, 0].tolist()))
    parts = [_stretched(program, prices, slow, *each) for each in apart.tolist()]
    counts = prices.rows[apart[:, 0]]
    first = len(prices.seconds) + np.cumsum(counts) - counts
    copied = np.concatenate([np.arange(row, row + n) for row, n in zip(prices.row[apart[:, 0]], counts, strict=True)])
    return replace(program, classes=classes, cls=cls), replace(
        prices,
        row=np.concatenate([prices.row, first]),
        rows=np.concatenate([prices.rows, counts]),
        seconds=np.concatenate([prices.seconds, *(seconds for seconds, _ in parts)]),
        latency=np.concatenate([prices.latency, prices.latency[copied]]),
        flow_seconds=np.concatenate([prices.flow_seconds, *(flows for _, flows in parts)]),
        flow_demand=np.concatenate([prices.flow_demand, prices.flow_demand[copied]]),
        share=np.concatenate([prices.share, prices.share[apart[:, 0]]]),
    )


def _receivers(program: Program) -> IntArray:
    """Pipeline rank to which an op sends; its own for all but messages [ops]."""
    receiver = program.rank.copy()
    sends = np.asarray(np.array([isinstance(cls, Send) for cls in program.classes])[program.cls])
    owner = np.repeat(np.arange(len(program)), np.diff(program.start))
    arrives = np.asarray(sends[program.needs] & (program.rank[owner] != program.rank[program.needs]))
    receiver[program.needs[arrives]] = program.rank[owner[arrives]]
    return receiver


def _stretched(
    program: Program, prices: Prices, slow: Slowness, number: int, rank: int, receiver: int
) -> tuple[FloatArray, FloatArray]:
    """Seconds [rows, lanes] and flow seconds [rows, tiers] of one class on one pipeline rank."""
    cls = program.classes[number]
    rows = slice(prices.row[number], prices.row[number] + prices.rows[number])
    seconds, flows = prices.seconds[rows], prices.flow_seconds[rows]
    if isinstance(cls, Compute | Update):
        kernels = slow.expert if isinstance(cls, Compute) and cls.layer is not None else slow.dense
        return seconds * kernels[rank, : prices.lanes], flows
    factor = _on_links(cls, slow, rank, receiver)
    if factor is None:
        return seconds, flows
    stretched = flows[:, None, :] * factor[None, :, :]  # [rows, lanes or 1, tiers]
    longer = stretched.max(axis=2) - flows.max(axis=1, keepdims=True)
    return seconds + longer, np.asarray(stretched.max(axis=1))


def _on_links(cls: OpClass, slow: Slowness, rank: int, receiver: int) -> FloatArray | None:
    """Factor on the flows of communication, by lane or one for all lanes [lanes or 1, tiers]."""
    if isinstance(cls, Exchange):
        return np.asarray(slow.links[rank].max(axis=0, keepdims=True))
    if isinstance(cls, Region):
        return np.asarray(slow.regions[rank])
    if isinstance(cls, Send):
        return np.asarray(np.maximum(slow.links[rank], slow.links[receiver]))
    if isinstance(cls, Bulk):
        if cls.group == "embedding":  # between the first and the last stage
            return np.asarray(np.maximum(slow.bulk[:1], slow.bulk[-1:]))
        return slow.bulk[rank : rank + 1]
    return None
