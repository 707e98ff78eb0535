"""The load of one expert group: what the router assigned, what capacity left, and where it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from simulator.routing import traffic
from simulator.routing.load import FloatArray, IntArray
from simulator.routing.placement import Placement
from simulator.spec.model import MixtureOfExperts

POSITIONS = 10
"""Parts of a capacity group, in order of arrival, for which drops are told apart."""


@dataclass(frozen=True)
class ExpertLoad:
    """Load of one expert group.

    ``assigned``, ``processed`` and ``computed`` [microbatches, MoE layers, experts]: assignments that the router
    made, those that capacity left, and rows computed with padding. The first axis may be shorter than the number of
    microbatches: it is then repeated. ``tokens`` [MoE layers]: tokens of the group in one microbatch. ``placement``:
    experts on expert ranks.

    ``drop_profile`` [10]: dropped share of the assignments by position in the capacity group. ``lost_fraction``: tokens
    that lose all their experts. ``dropped_fraction_evaluation``: dropped at the evaluation's capacity factor. ``picks``
    [tokens, top_k]: slots that some tokens choose together, -1 for none; None where all experts are alike and, under a
    limit on groups, in contiguous order.
    """

    assigned: IntArray
    processed: IntArray
    computed: IntArray
    tokens: IntArray
    top_k: int
    placement: Placement
    drop_profile: FloatArray = field(default_factory=lambda: np.zeros(POSITIONS))
    lost_fraction: float = 0.0
    dropped_fraction_evaluation: float = 0.0
    picks: IntArray | None = None

    @property
    def ranks(self) -> int:
        """Expert ranks over which the experts are placed."""
        return self.placement.ranks

    @cached_property
    def by_rank(self) -> IntArray:
        """Computed rows by expert rank and its slots [microbatches, layers, ranks, slots per rank]."""
        return self.placement.rows(self.computed)

    @cached_property
    def rank_rows(self) -> IntArray:
        """Computed rows by expert rank [microbatches, layers, ranks]."""
        return np.asarray(self.by_rank.sum(-1))

    @property
    def dropped_fraction(self) -> float:
        """Dropped assignments over all assignments."""
        total = int(self.assigned.sum())
        return 1.0 - int(self.processed.sum()) / total if total else 0.0

    @property
    def padding_fraction(self) -> float:
        """Computed rows that hold no token."""
        total = int(self.computed.sum())
        return 1.0 - int(self.processed.sum()) / total if total else 0.0

    @property
    def max_over_mean(self) -> float:
        """Most loaded expert over the mean, averaged over layers and microbatches."""
        mean = self.assigned.mean(-1)
        return float((self.assigned.max(-1) / np.maximum(mean, 1e-12)).mean()) if self.assigned.size else 1.0

    @property
    def rank_max_over_mean(self) -> float:
        """Rows that the busiest rank computes over the mean of the assigned ones; averaged over all layers."""
        mean = self.assigned.sum(-1) / self.ranks
        return float((self.rank_rows.max(-1) / np.maximum(mean, 1e-12)).mean()) if self.assigned.size else 1.0

    def copies_by_tier(
        self, moe: MixtureOfExperts, ways: tuple[int, ...], *, merged: bool = True
    ) -> tuple[tuple[int, float], ...]:
        """Copies of one token over each tier (:func:`simulator.routing.traffic.copies_by_tier`) under this load."""
        slots = self.placement.expert_of_slot.shape[1]
        return traffic.copies_by_tier(moe, ways, merged=merged, picks=self.picks, slots=slots)


__all__ = ["POSITIONS", "ExpertLoad"]
