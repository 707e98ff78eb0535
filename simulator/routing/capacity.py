"""What overflows: capacity, dropped and rerouted assignments, padded slots.

Tokens that share one capacity form a capacity group of T tokens; an expert accepts

    C = ceil(capacity_factor x T x top_k / experts)        (Switch, arXiv 2101.03961, equation 3, times top_k)

of them. Assignments beyond C are dropped (the token passes by the residual path), moved to experts with room, or
kept. The limit may also hold for a device, that is for the sum over its experts: DeepSeek-V2 drops on each device until
its average load is met (arXiv 2405.04434, section 2.2.4). Conservation holds for every draw: assigned = processed +
dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from simulator.workload.slots import slots

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """Counts after capacity, all [..., experts]: accepted assignments, and rows computed with padding."""

    processed: IntArray
    computed: IntArray
    dropped: IntArray


def apply(
    assigned: IntArray,
    capacity: int | None,
    *,
    overflow: Literal["drop", "reroute", "none"] = "drop",
    pad: bool = False,
    exempt: float = 0.0,
    holders: int | None = None,
) -> Outcome:
    """Apply one capacity to counts [..., groups, experts].

    ``exempt`` is the share of sequences whose tokens are never dropped: their part of the overflow is kept.
    ``holders``: equal runs of experts (devices) that have the capacity in common; by default each expert has its own.
    """
    if capacity is None:
        return Outcome(assigned, assigned, np.zeros_like(assigned))
    experts = assigned.shape[-1]
    if holders is not None and holders < experts:
        devices = assigned.reshape(*assigned.shape[:-1], holders, -1).sum(-1)
        return _inside(assigned, apply(devices, capacity, overflow=overflow, pad=pad, exempt=exempt), holders)
    accepted = np.minimum(assigned, capacity)
    excess = assigned - accepted
    if overflow == "none":
        accepted, excess = assigned, np.zeros_like(assigned)
    elif overflow == "reroute":
        accepted, excess = _reroute(accepted, excess, capacity)
    if exempt:
        kept = np.floor(excess * exempt + 0.5).astype(np.int64)
        accepted, excess = accepted + kept, excess - kept
    computed = np.maximum(accepted, capacity) if pad else accepted
    return Outcome(accepted, computed, excess)


def in_part(part: IntArray, whole: IntArray, outcome: Outcome) -> Outcome:
    """What becomes of a part of the counts when the fate of the whole is known, all [..., experts].

    An expert drops and gives away the same share of the part's assignments as of the whole's; what the part's tokens
    give away goes where the whole's goes. Nothing is lost: part = processed + dropped, summed over experts.
    """
    surplus = outcome.processed + outcome.dropped - whole  # came from other experts; negative: went to them
    dropped, away = (  # rounded in sum over the experts, so that many small shares do not all round to nothing
        np.diff(
            np.floor(np.cumsum(part * (share / np.maximum(whole, 1)), -1).round(9) + 0.5), axis=-1, prepend=0.0
        ).astype(np.int64)
        for share in (outcome.dropped, np.maximum(-surplus, 0))
    )
    dropped = np.minimum(dropped, part)
    away = np.minimum(away, part - dropped)
    processed = part - dropped - away + divide(away.sum(-1), np.maximum(surplus, 0))
    padding = np.maximum(outcome.computed - outcome.processed, 0)
    if not padding.any():
        return Outcome(processed, processed, dropped)
    rows = outcome.computed * part.sum(-1, keepdims=True) // np.maximum(whole.sum(-1, keepdims=True), 1)
    return Outcome(processed, np.maximum(processed, rows), dropped)


def divide(total: IntArray, weights: IntArray) -> IntArray:
    """Whole numbers in proportion to weights [..., n] that sum to ``total`` [...] exactly; 0 where there is no weight.

    None is more than its weight as long as the total is not more than all weights.

    >>> divide(np.array(5), np.array([3, 0, 3, 4])).tolist()
    [1, 0, 2, 2]
    """
    through = np.cumsum(weights, -1)
    return np.diff(through * np.asarray(total)[..., None] // np.maximum(through[..., -1:], 1), axis=-1, prepend=0)


def _inside(assigned: IntArray, whole: Outcome, holders: int) -> Outcome:
    """From devices to their experts: they lose in proportion to their load and share evenly what comes and padding."""
    each = assigned.reshape(*assigned.shape[:-1], holders, -1)
    even = np.ones_like(each)
    stay = divide(np.minimum(whole.processed, each.sum(-1) - whole.dropped), each)
    dropped = divide(whole.dropped, each - stay)
    processed = stay + divide(whole.processed - stay.sum(-1), even)
    computed = processed + divide(whole.computed - whole.processed, even)
    return Outcome(*(array.reshape(assigned.shape) for array in (processed, computed, dropped)))


def _reroute(accepted: IntArray, excess: IntArray, capacity: int) -> tuple[IntArray, IntArray]:
    """Fill free slots in expert order; what finds no room is dropped, charged to the overfull experts in order."""
    room = capacity - accepted
    movable = np.minimum(excess.sum(-1, keepdims=True), room.sum(-1, keepdims=True))
    taken = np.diff(np.minimum(np.cumsum(room, -1), movable), axis=-1, prepend=0)
    moved = np.diff(np.minimum(np.cumsum(excess, -1), movable), axis=-1, prepend=0)
    return accepted + taken, excess - moved


__all__ = ["IntArray", "Outcome", "apply", "divide", "in_part", "slots"]
