"""Tokens to the rows of their experts and back: capacity, permute, combine.

An expert accepts as many assignments of a capacity group as it has slots, in an order of service, and drops the rest:
the rule of :mod:`simulator.routing.admission`, which decides the same for the same choices. What is accepted gets a row
of the experts' input, sorted by expert. In the padded form an expert owns all rows of its slots, used or not (GShard,
arXiv 2006.16668; Switch, arXiv 2101.03961); otherwise only accepted assignments have rows (MegaBlocks, arXiv
2211.15841). Everything is a sort, a count or a copy by index: on one device this is all that dispatch is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simulator.routing.admission import group_sizes
from validation.torch_routers import counted


@dataclass(frozen=True)
class Plan:
    """Where every assignment goes.

    ``accepted`` [T, k]. Of the accepted assignments, in the order of their rows: ``places`` [A] in the flattened
    [T, k], ``tokens`` [A], ``rows`` [A] in the experts' input of ``size`` rows. ``assigned``, ``processed`` [E]: counts
    before and after capacity.
    """

    accepted: Tensor
    places: Tensor
    tokens: Tensor
    rows: Tensor
    size: int
    assigned: Tensor
    processed: Tensor


def plan(
    experts: Tensor,
    total: int,
    slots: int | None,
    *,
    groups: int = 1,
    priority: Tensor | None = None,
    padded: bool = False,
) -> Plan:
    """Serve the choices ``experts`` [T, k] of ``total`` experts; each has ``slots`` in each of ``groups`` groups.

    Tokens are served as they arrive, or by falling ``priority`` [T, k]: who finds no slot is dropped, exactly as in
    :func:`simulator.routing.admission.admit`. Rows are sorted by expert, group and order of service; ``padded``
    reserves all slots.
    """
    tokens, top_k = experts.shape
    sizes = torch.from_numpy(group_sizes(tokens, groups)).to(experts.device)
    group = torch.arange(groups, device=experts.device).repeat_interleave(sizes)
    queue = torch.where(experts < 0, groups * total, experts * groups + group[:, None]).flatten()
    served = queue.argsort(stable=True) if priority is None else _by_priority(queue, priority.flatten())
    waiting = counted(queue, groups * total + 1)  # the last queue is that of no expert
    number = queue[served]
    position = torch.arange(len(served), device=experts.device) - (waiting.cumsum(0) - waiting)[number]
    kept = number < groups * total
    if slots is not None:
        kept &= position < slots
    places, number, position = served[kept], number[kept], position[kept]
    owned = slots if padded else None
    rows = torch.arange(len(places), device=places.device) if owned is None else number * owned + position
    accepted = torch.zeros(tokens * top_k, dtype=torch.bool, device=experts.device).index_fill(0, places, True)
    return Plan(
        accepted.view(tokens, top_k),
        places,
        places // top_k,
        rows,
        size=len(places) if owned is None else groups * total * owned,
        assigned=counted(experts, total),
        processed=counted(number // groups, total),
    )


def _by_priority(queue: Tensor, priority: Tensor) -> Tensor:
    """Queue after queue, in each by falling priority, the first to arrive of equals."""
    order = priority.argsort(descending=True, stable=True)
    return order[queue[order].argsort(stable=True)]


def permute(x: Tensor, plan: Plan) -> Tensor:
    """Copy tokens [T, h] to the rows of their experts [R, h]; rows that nobody uses are 0."""
    if plan.size == len(plan.tokens):
        return x.index_select(0, plan.tokens)
    return x.new_zeros(plan.size, x.shape[1]).index_copy(0, plan.rows, x.index_select(0, plan.tokens))


def combine(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """Sum of the experts' outputs [R, h], each times its weight of [T, k], for every token [T, h].

    Sums are formed in the format of the weights and returned in that of the rows.
    """
    weighted = rows.index_select(0, plan.rows) * weights.flatten().index_select(0, plan.places)[:, None]
    return weighted.new_zeros(len(weights), rows.shape[1]).index_add(0, plan.tokens, weighted).to(rows.dtype)


__all__ = ["Plan", "combine", "permute", "plan"]
