"""How long one collective takes alone, and what it puts on each link.

A collective on a group (:class:`~simulator.layout.Span`) is a latency plus one flow per tier; it ends when its last
flow ends. With the bytes x that the busiest rank moves over its link of a tier in the busier direction,

    t_tier = x / (bandwidth x efficiency) + c sqrt(x),        t = latency + max over tiers,

(and a slower rate beyond a knee where the profile has one), since transfers inside a node and between nodes are
pipelined. Bytes of a buffer of N bytes on d = L x n ranks (L in a node, n nodes): all-gather and reduce-scatter N
(d-1)/d inside the node and N (n-1)/(n L) over each rank's own network port (one ring per rail); all-reduce twice that;
expert all-to-alls are counted in :func:`simulator.timing.prices.exchange`. On a torus, rings run in both directions of
every axis the group covers, and a uniform all-to-all of b bytes per chip takes b max(extent) / (8 W) with wrap-around
links of W bytes/s, b max(extent) / (4 W) without (jax-ml.github.io/scaling-book, chapter "Sharded matrices").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from simulator.layout import Span
from simulator.spec.curves import CollectiveCurve
from simulator.spec.hardware import HardwareProfile, Tier
from simulator.timing.kernels import Numbers

Kind = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "point_to_point"]


@dataclass(frozen=True)
class Flow:
    """What one rank sends over one tier: seconds when alone (by row), and the share of the link that this takes."""

    tier: int
    seconds: Numbers
    demand: float


@dataclass(frozen=True)
class Transfer:
    """Cost of one collective call, or of calls with as many sizes as there are rows."""

    latency: float
    flows: tuple[Flow, ...]

    @property
    def seconds(self) -> Numbers:
        """Time when no link is shared."""
        longest: Numbers = 0.0
        for flow in self.flows:
            longest = np.maximum(longest, flow.seconds)
        return self.latency + longest


FREE = Transfer(0.0, ())


def transfer(profile: HardwareProfile, span: Span, kind: Kind, size_bytes: Numbers) -> Transfer:
    """Cost of a collective over ``size_bytes``: the whole gathered or reduced buffer, or one message."""
    if kind == "point_to_point":
        return _point_to_point(profile, span, size_bytes)
    if span.size <= 1 or not np.any(np.asarray(size_bytes) > 0.0):
        return FREE
    if profile.tiers[0].kind == "torus":
        return _torus(profile, span, kind, size_bytes)
    factor = 2.0 if kind == "all_reduce" else 1.0
    moved = []
    for index, ways in enumerate(span.ways):
        if ways <= 1:
            continue
        inner = 1
        for earlier in span.ways[:index]:
            inner *= earlier
        share = (span.size - 1) / span.size if index == 0 else (ways - 1) / (ways * max(1, inner))
        moved.append((index, factor * size_bytes * share))
    return combine(profile, span, kind, moved)


def combine(
    profile: HardwareProfile, span: Span, kind: Kind, moved: Sequence[tuple[int, Numbers]], *, overlapped: bool = False
) -> Transfer:
    """Latency and flows for given bytes per tier; ``overlapped`` applies the tier's rate beside compute."""
    flows, latency = [], 0.0
    for index, size in moved:
        tier = profile.tiers[index]
        curve = tier.collectives.get(kind)
        bandwidth = rank_bandwidth(profile, tier)
        efficiency = curve.efficiency.value if curve else 1.0
        if overlapped and curve is not None and curve.overlap_efficiency is not None:
            efficiency *= curve.overlap_efficiency.value
        seconds = size / (bandwidth * efficiency)
        if curve is not None and curve.sqrt_coefficient is not None:
            seconds += curve.sqrt_coefficient.value * size**0.5
        if curve is not None and curve.knee_bytes is not None and curve.beyond_knee is not None:
            slower = 1.0 / (bandwidth * curve.beyond_knee.value) - 1.0 / (bandwidth * efficiency)
            seconds += np.maximum(size - curve.knee_bytes.value, 0.0) * max(0.0, slower)
        flows.append(Flow(index, seconds, efficiency))
        latency += _latency(tier, curve, span.ways, index, kind)
    return Transfer(latency, tuple(flows))


def one_after_another(first: Transfer, second: Transfer) -> Transfer:
    """Two calls as one: latencies and flows add."""
    by_tier = {flow.tier: flow for flow in first.flows}
    flows = [
        Flow(flow.tier, flow.seconds + (by_tier[flow.tier].seconds if flow.tier in by_tier else 0.0), flow.demand)
        for flow in second.flows
    ]
    return Transfer(first.latency + second.latency, tuple(flows) or first.flows)


def rank_bandwidth(profile: HardwareProfile, tier: Tier) -> float:
    """Bandwidth of one rank's link of a tier and direction, after oversubscription."""
    thin = tier.oversubscription.value if tier.oversubscription else 1.0
    return tier.bandwidth.value / profile.accelerator.ranks_per_accelerator / thin


def comm_sms(profile: HardwareProfile, span: Span) -> float:
    """Multiprocessors that an expert all-to-all takes from compute while it runs beside it."""
    curves = [profile.tiers[i].collectives.get("all_to_all") for i, ways in enumerate(span.ways) if ways > 1]
    return max((curve.comm_sms.value for curve in curves if curve and curve.comm_sms), default=0.0)


def _latency(tier: Tier, curve: CollectiveCurve | None, ways: Sequence[int], index: int, kind: Kind) -> float:
    """Latency of a tier's part: that of its smallest group, and a hop for each further step of the ring.

    A ring of n nodes also passes the L ranks of every node: L - 1 hops inside for each of the n - 1 further nodes.
    """
    if curve is None:
        return tier.alpha.value * (1 if kind == "all_to_all" else ways[index] - 1)
    latency = curve.latency.value
    if curve.hop is not None:
        latency += curve.hop.value * max(0, ways[index] - 2)
    if curve.inner_hop is not None:
        latency += curve.inner_hop.value * (math.prod(ways[:index]) - 1) * (ways[index] - 1)
    return latency


def _point_to_point(profile: HardwareProfile, span: Span, size_bytes: Numbers) -> Transfer:
    if span.size <= 1:
        return FREE
    index = span.outermost
    tier = profile.tiers[index]
    rate = (tier.p2p_bandwidth or tier.bandwidth).value / profile.accelerator.ranks_per_accelerator
    curve = tier.collectives.get("point_to_point")
    efficiency = curve.efficiency.value if curve else 1.0
    latency = curve.latency.value if curve else tier.alpha.value
    demand = min(1.0, rate * efficiency / rank_bandwidth(profile, tier))
    return Transfer(latency, (Flow(index, size_bytes / (rate * efficiency), demand),))


def _torus(profile: HardwareProfile, span: Span, kind: Kind, size_bytes: Numbers) -> Transfer:
    """Collectives over bidirectional rings on every axis; groups beyond the slice also cross the next tier."""
    tier = profile.tiers[0]
    curve = tier.collectives.get(kind)
    efficiency = curve.efficiency.value if curve else 1.0
    extents = [extent for extent in span.extents if extent > 1] or [1]
    chips = 1
    for extent in extents:
        chips *= extent
    open_factor = [1.0 if _wraps(tier, extent) or extent <= 2 else 2.0 for extent in extents]
    link = tier.bandwidth.value * efficiency
    per_chip = size_bytes * (profile.accelerator.ranks_per_accelerator if kind == "all_to_all" else 1)
    if kind == "all_to_all":
        seconds = (
            per_chip * max(extent * factor for extent, factor in zip(extents, open_factor, strict=True)) / (8.0 * link)
        )
    else:
        share = (chips - 1) / chips if chips > 1 else 0.5
        rings = sum(1.0 / factor for factor in open_factor)
        # Where a chip's cores belong to different groups, these share its links.
        sharing = max(1.0, profile.accelerator.ranks_per_accelerator * chips / span.size)
        seconds = (2.0 if kind == "all_reduce" else 1.0) * size_bytes * share * sharing / (2.0 * link * rings)
    hop = (curve.hop or tier.alpha).value if curve else tier.alpha.value
    hops = sum(extent / 2.0 * factor for extent, factor in zip(extents, open_factor, strict=True))
    latency = (curve.latency.value if curve else tier.alpha.value) + hop * hops
    flows = [Flow(0, seconds, efficiency)]
    for index in range(1, len(span.ways)):
        if span.ways[index] > 1:
            outer = profile.tiers[index]
            # Rings end inside the slice first: each chip carries its own shard to the other slices.
            inner = 1 if kind == "all_to_all" else math.prod(span.ways[:index])
            share = (span.ways[index] - 1) / (span.ways[index] * inner)
            moved = (2.0 if kind == "all_reduce" else 1.0) * size_bytes * share
            flows.append(Flow(index, moved / rank_bandwidth(profile, outer), 1.0))
            latency += outer.alpha.value * (span.ways[index] - 1)
    return Transfer(latency, tuple(flows))


def _wraps(tier: Tier, extent: int) -> bool:
    """Whether an axis of a group is a ring: a full axis, or on a 3-D torus of switched 4 x 4 x 4 cubes a multiple of 4.

    Source: jax-ml.github.io/scaling-book, chapter "TPUs".
    """
    dims = tier.dims or ()
    return tier.wrap and (extent in dims or (len(dims) == 3 and extent % 4 == 0))
