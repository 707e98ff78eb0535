"""Routing against what is known of it: papers, exact sums, token-by-token simulation, and decoded real loads.

``moesim validate --routing`` runs all of it; every number is computed anew.
"""

from __future__ import annotations

from validation.checks import Check
from validation.routing import balancing, bias, capacity, real_loads, tokens, traffic


def judge() -> list[Check]:
    """All checks of the routing room."""
    rooms = (capacity, balancing, bias, tokens, real_loads, traffic)
    return [check for room in rooms for check in room.checks()]


__all__ = ["judge"]
