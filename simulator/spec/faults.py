"""Faults of the machine: ranks that compute slowly and nodes with a slow link."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from simulator import errors
from simulator.errors import Problem
from simulator.spec.fields import Contract, PositiveFraction, WholeOrZero, described

if TYPE_CHECKING:
    from simulator.spec.scenario import Cluster


class Fault(Contract):
    """A rank that computes slowly (`rank`, `compute`), or a node with a slow tier (`node`, `tier`, `bandwidth`)."""

    rank: WholeOrZero | None = described("Rank with the fault, counted as the grid does.", example=17, default=None)
    node: WholeOrZero | None = described(
        "Node with the fault: one instance of the innermost tier.", example=3, default=None
    )
    compute: PositiveFraction | None = described("Remaining share of the compute rate.", example=0.8, default=None)
    tier: str | None = described("Tier with the fault.", example="infiniband", default=None)
    bandwidth: PositiveFraction | None = described("Remaining share of its bandwidth.", example=0.5, default=None)


def node_chips(cluster: Cluster) -> int:
    """Chips of one node: those that one instance of the innermost tier joins."""
    tier = cluster.profile.tiers[0]
    return tier.size or (math.prod(tier.dims) if tier.dims else cluster.accelerators)


def broken(cluster: Cluster) -> Iterator[Problem]:
    """Laws of the faults: each names one place that exists, and what is slow there."""
    nodes = -(-cluster.accelerators // node_chips(cluster))
    for index, fault in enumerate(cluster.faults):
        path = f"cluster.faults.{index}"
        if (fault.rank is None) == (fault.node is None):
            both = "both rank and node" if fault.rank is not None else "neither rank nor node"
            yield Problem(path, f"names {both}; write rank with compute, or node with tier and bandwidth")
        elif fault.rank is not None:
            yield from _needs(fault, path, ("compute",), ("tier", "bandwidth"), "rank")
            if fault.rank >= cluster.ranks:
                yield Problem(f"{path}.rank", f"no rank {fault.rank}; allowed: 0 to {cluster.ranks - 1}")
        elif fault.node is not None:
            yield from _needs(fault, path, ("tier", "bandwidth"), ("compute",), "node")
            if fault.node >= nodes:
                yield Problem(f"{path}.node", f"no node {fault.node}; allowed: 0 to {nodes - 1}")
        tiers = [tier.name for tier in cluster.profile.tiers]
        if fault.tier is not None and fault.tier not in tiers:
            yield Problem(f"{path}.tier", errors.one_of(fault.tier, tiers, "tier"))


def _needs(fault: Fault, path: str, wanted: Sequence[str], unwanted: Sequence[str], place: str) -> Iterator[Problem]:
    """What a slow rank or a slow node states, and what belongs to the other."""
    missing = [name for name in wanted if getattr(fault, name) is None]
    if missing:
        yield Problem(path, f"a slow {place} needs {' and '.join(missing)}")
    for name in unwanted:
        if getattr(fault, name) is not None:
            yield Problem(f"{path}.{name}", f"a slow {place} has {' and '.join(wanted)}, not {name}")
