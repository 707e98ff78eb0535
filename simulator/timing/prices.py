"""From op classes to prices: seconds alone on the profile, by lane; and what communication puts on each link.

Lanes are the ranks of one expert group, side by side. A compute class of a MoE layer has one row per microbatch and a
time per lane, since every rank receives its own load; everything else has one row and one lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, singledispatchmethod

import numpy as np

from simulator.layout import Layout
from simulator.routing import ExpertLoad, tokens_per_rank
from simulator.spec.fields import ELEMENT_BYTES
from simulator.spec.scenario import Scenario
from simulator.timing import collectives
from simulator.timing.classes import Bulk, Compute, Exchange, Fixed, OpClass, Region, Send, Update
from simulator.timing.collectives import Transfer, transfer
from simulator.timing.kernels import (
    Device,
    FloatArray,
    Numbers,
    update_seconds,
)
from simulator.timing.op_times import OpTimes
from simulator.timing.table import Prices
from simulator.workload.ops import Gemm, GroupedGemm

RECOMPUTE, CAST, STACK = "recompute", "cast", "stack"
Priced = tuple[FloatArray, float, dict[str, float]]
"""Seconds [rows, lanes] of a compute class, their mean, and the shares of families."""


@dataclass
class Pricer:
    """Prices classes of one scenario."""

    scenario: Scenario
    layout: Layout
    load: ExpertLoad | None

    def __post_init__(self) -> None:
        """Resolve what every price needs."""
        cluster, span = self.scenario.cluster, self.layout.spans["expert"]
        profile = cluster.profile.under(cluster.stack_name)
        self.profile = profile
        self.precision = self.scenario.training.precision
        self.whole = Device.of(profile)
        self.comm_sms = collectives.comm_sms(profile, span)
        self._kernels: dict[tuple[Compute, float], dict[str, FloatArray]] = {}
        self._priced: dict[tuple[Compute, float, float, float], Priced] = {}
        self._lasts: dict[Exchange, float] = {}
        self.ops = OpTimes(self.scenario, self.load)
        self.tensor, self.sequence = self.ops.tensor, self.ops.sequence
        stack = profile.stacks[self.scenario.cluster.stack_name]
        self.issue = 0.0 if stack.issue is None else stack.issue.value
        self.composition = profile.kernels.composition
        self.gap = stack.gap_fraction.value
        self.by_rank = self.ops.by_rank

    def price(self, classes: Sequence[OpClass]) -> Prices:
        """Price every class."""
        results = [self._seconds(each) for each in classes]
        transfers = [self._transfers(each) for each in classes]
        counts = [
            len(seconds) if moved is None else np.size(moved.seconds)
            for (seconds, _), moved in zip(results, transfers, strict=True)
        ]
        lanes = max((seconds.shape[1] for seconds, _ in results), default=1)
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        total, tiers = int(first[-1]), len(self.profile.tiers)
        seconds, latency = np.zeros((total, lanes)), np.zeros(total)
        flow_seconds, flow_demand = np.zeros((total, tiers)), np.ones((total, tiers))
        families = tuple(sorted({name for _, shares in results for name in shares}))
        share = np.zeros((len(classes), len(families)))
        for index, ((alone, shares), moved) in enumerate(zip(results, transfers, strict=True)):
            rows = slice(first[index], first[index + 1])
            if moved is not None:
                seconds[rows] = np.reshape(moved.seconds, (-1, 1))
                latency[rows] = moved.latency
                for flow in moved.flows:
                    flow_seconds[rows, flow.tier] = flow.seconds
                    flow_demand[rows, flow.tier] = flow.demand
            else:
                seconds[rows] = alone
            for name, part in shares.items():
                share[index, families.index(name)] = part
        return Prices(
            first[:-1], np.array(counts, dtype=np.int64), seconds, latency, flow_seconds, flow_demand, share, families
        )

    # --- compute ------------------------------------------------------------------------------------------------------

    def _seconds(self, each: OpClass) -> tuple[FloatArray, dict[str, float]]:
        """Seconds [rows, lanes] and the shares of families; communication has neither."""
        if isinstance(each, Compute):
            return self._compute(each)
        if isinstance(each, Update):
            return np.array([[float(update_seconds(self.whole, each.traffic_bytes))]]), {"optimizer": 1.0}
        if isinstance(each, Fixed):
            return np.array([[each.seconds]]), {each.family: 1.0}
        return np.zeros((1, 1)), {}

    def _compute(self, each: Compute) -> tuple[FloatArray, dict[str, float]]:
        if each.beside:
            return self._beside(each)
        total, _, shares = self._on(each, self.comm_sms if each.overlapped else 0.0)
        return total, shares

    def _on(self, each: Compute, held: float) -> Priced:
        """Kernels on what communication that holds so many multiprocessors leaves free."""
        key = each, held, self.gap, self.issue
        if key not in self._priced:
            self._priced[key] = self._with_stack(each, held)
        return self._priced[key]

    def _with_stack(self, each: Compute, held: float) -> Priced:
        if (each, held) not in self._kernels:
            self._kernels[each, held] = self._by_family(each, Device.of(self.profile, held))
        parts = dict(self._kernels[each, held])
        total = sum(parts.values(), np.zeros((1, 1)))
        parts[STACK] = total * self.gap
        total = total * (1.0 + self.gap)
        waiting = np.maximum(self.issue * _issued(each) / each.parts - total, 0.0)
        parts[STACK] = parts[STACK] + waiting  # the host has not issued the next kernel yet
        total = total + waiting
        mean = float(total.mean())
        return total, mean, {name: float(value.mean()) / mean for name, value in parts.items() if mean and value.any()}

    def _by_family(self, each: Compute, device: Device) -> dict[str, FloatArray]:
        parts: dict[str, FloatArray] = {}
        for item in each.repeats:
            for work in (self.ops.item, self.ops.casts):
                self._add(parts, RECOMPUTE, work(item, "F", device, each.layer, each.parts))
        for item in each.items:
            self._add(parts, item.family, self.ops.item(item, each.which, device, each.layer, each.parts))
            self._add(parts, CAST, self.ops.casts(item, each.which, device, each.layer, each.parts))
        if self.composition is not None:
            factor = (self.composition.forward if each.which == "F" else self.composition.backward).value
            parts = {name: seconds * factor for name, seconds in parts.items()}
        return parts

    def _beside(self, each: Compute) -> tuple[FloatArray, dict[str, float]]:
        """Kernels that are slower for as long as the exchanges beside them last.

        An exchange of c seconds meets each op of its time in proportion, c x free / sum of free; meanwhile the op
        advances at the rate free / held.
        """
        plain = replace(each, beside=())
        (free, mean, shares), (held, _, _) = self._on(plain, 0.0), self._on(plain, self.comm_sms)
        lasts = 0.0
        for other in each.beside:
            if other.exchange not in self._lasts:
                self._lasts[other.exchange] = float(np.mean(exchange(self, other.exchange).seconds))
            around = sum(self._on(compute, 0.0)[1] for compute in other.during)
            lasts += self._lasts[other.exchange] * (mean / max(around, 1e-30) if other.during else 1.0)
        return np.minimum(held, free + lasts * (1.0 - free / np.maximum(held, 1e-30))), shares

    @staticmethod
    def _add(parts: dict[str, FloatArray], family: str, seconds: FloatArray) -> None:
        parts[family] = parts[family] + seconds if family in parts else seconds

    @cached_property
    def copies(self) -> tuple[tuple[int, float], ...]:
        """Copies of one token over each tier, the same in every layer."""
        moe = self.scenario.model.moe
        assert moe is not None  # only MoE layers exchange tokens
        assert self.load is not None
        return self.load.copies_by_tier(moe, self.layout.spans["expert"].ways, merged=self.scenario.routing.merges)

    # --- communication ------------------------------------------------------------------------------------------------

    @singledispatchmethod
    def _transfers(self, each: OpClass) -> Transfer | None:
        """The transfer by row; none for compute."""
        return None

    @_transfers.register
    def _(self, each: Exchange) -> Transfer:
        return exchange(self, each)

    @_transfers.register
    def _(self, each: Region) -> Transfer:
        span = self.layout.spans[each.op.group]
        if span.size <= 1:
            return collectives.FREE
        role = "residual" if each.backward else each.op.role  # gradients travel in the residual's format
        size = each.op.elements * ELEMENT_BYTES[str(getattr(self.precision, role))] * self._region_tokens(each)
        size /= 1 if each.op.kind == "ring" else each.parts
        if each.op.kind == "ring":  # keys and values of the other ranks' tokens; their gradients on the way back
            moved = size * span.size * (2.0 if each.backward else 1.0) / self.tensor
            if each.parts > 1:
                return transfer(self.profile, span, "point_to_point", moved / each.parts)
            return transfer(self.profile, span, "all_gather", moved)
        entering = (each.op.kind == "enter") != each.backward
        if self.sequence > 1 or each.op.group == "expert_tensor":
            moving = transfer(self.profile, span, "all_gather" if entering else "reduce_scatter", size)
            if each.op.kind == "enter" and each.backward and each.op.group == "tensor":
                # The input was kept in shards: the weight gradient gathers it again (arXiv 2205.05198, section 4.2.2).
                moving = collectives.one_after_another(moving, transfer(self.profile, span, "all_gather", size))
            return moving
        return collectives.FREE if entering else transfer(self.profile, span, "all_reduce", size)

    def _region_tokens(self, each: Region) -> float:
        """Tokens of a microbatch that a collective inside a layer carries."""
        if each.op.group == "expert_tensor":
            assert self.load is not None
            return float(self.load.computed[:, each.layer].sum(-1).mean()) / self.load.ranks
        return self.ops.tokens(each.stack)

    @_transfers.register
    def _(self, each: Send) -> Transfer:
        tokens = self.ops.tokens(each.stack)
        if each.stack == "decoder" and self.scenario.model.encoder is not None:
            tokens += self.ops.tokens("encoder")  # every decoder stage needs the encoder's output
        whole = ELEMENT_BYTES[self.precision.residual] * self.scenario.model.hidden_size * tokens
        moved = transfer(self.profile, self.layout.spans["pipeline"], "point_to_point", whole / self.tensor)
        if self.sequence == self.tensor:
            return moved
        # Every tensor-parallel rank holds the same: each sends its share and the receivers gather (arXiv 2104.04473,
        # section 4.1).
        gathered = transfer(self.profile, self.layout.spans["tensor"], "all_gather", whole)
        return replace(moved, latency=moved.latency + float(np.max(gathered.seconds)))

    @_transfers.register
    def _(self, each: Bulk) -> Transfer:
        return transfer(self.profile, self.layout.spans[each.group], each.kind, each.size_bytes)


def _issued(each: Compute) -> int:
    """Ops that the host has to issue: of a weight gradient the products alone."""
    linear = sum(isinstance(item.op, Gemm | GroupedGemm) for item in each.items)
    return len(each.repeats) + (linear if each.which == "W" else len(each.items))


def exchange(pricer: Pricer, each: Exchange) -> Transfer:
    """One expert all-to-all per microbatch.

    Each rank sends, for each of its tokens, one copy to every other node that holds one of the token's experts, and
    one copy per rank inside the node; the busiest rank or node sets the time where the tier's ``load_measure`` is max.
    Padded slots are sent as they are, without merging copies.
    """
    scenario, load, span = pricer.scenario, pricer.load, pricer.layout.spans["expert"]
    assert load is not None  # only MoE layers exchange tokens
    if span.size <= 1:
        return collectives.FREE
    size = each.op.elements * ELEMENT_BYTES[str(getattr(pricer.precision, each.shape))] / each.parts
    tokens = tokens_per_rank(scenario, each.stack)
    rows = load.rank_rows[:, each.layer].astype(np.float64)  # [microbatches, ranks]
    volume = rows.sum(-1) / (float(load.tokens[each.layer]) * load.top_k)
    nodes = int(np.prod(span.ways[1:])) if len(span.ways) > 1 else 1
    rank_factor = rows.max(-1) / np.maximum(rows.mean(-1), 1e-12)
    by_node = rows.reshape(len(rows), nodes, -1).sum(-1) if span.size % nodes == 0 else rows
    node_factor = by_node.max(-1) / np.maximum(by_node.mean(-1), 1e-12)
    parts = []
    for index, number in pricer.copies:
        curve = pricer.profile.tiers[index].collectives.get("all_to_all")
        if curve is not None and curve.load_measure == "total":
            busiest: Numbers = float(np.prod(span.ways[: index + 1]))
        else:
            busiest = rank_factor if index == 0 else node_factor
        parts.append((index, tokens * size * number * volume * busiest))
    if pricer.profile.tiers[0].kind == "torus":
        return transfer(pricer.profile, span, "all_to_all", sum(moved for _, moved in parts))
    return collectives.combine(pricer.profile, span, "all_to_all", parts, overlapped=each.overlapped)
