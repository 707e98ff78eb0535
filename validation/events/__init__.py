"""Events against what is known of them: schedules replayed, a traced pair of chunks, DeepSeek-V3's step, directions.

``moesim validate --events`` runs all of it; every number is computed anew.
"""

from __future__ import annotations

from validation.checks import Check
from validation.events import chunk_pair, directions, schedules, static, steps

ROOMS = (static, schedules, chunk_pair, steps, directions)


def judge() -> list[Check]:
    """All checks of the event room."""
    return [check for room in ROOMS for check in room.checks()]


__all__ = ["ROOMS", "judge"]
