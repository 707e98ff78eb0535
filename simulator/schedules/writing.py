"""What the generators share: lists rank by rank, lanes that hand out actions in order, the refusal of other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from simulator import errors
from simulator.schedules.actions import Action, Kind, Schedule, Step


class Lane:
    """One stage on one rank, and the microbatches that pass through it: hands out its actions in their order.

    A full backward counts as a backward for the input: the next I or B takes the microbatch after it.

    >>> lane = Lane(stage=2, microbatches=range(4, 8))
    >>> " ".join(str(lane.take(kind)) for kind in "FFBFI")
    '2F4 2F5 2B4 2F6 2I5'
    """

    def __init__(self, stage: int, microbatches: range) -> None:
        self.stage = stage
        self._waiting = {kind: iter(microbatches) for kind in ("F", "I", "W")}

    def take(self, kind: Kind) -> Action:
        """Return the action of this kind for the next microbatch in line."""
        return Action(self.stage, kind, next(self._waiting["I" if kind == "B" else kind]))


def rank_by_rank(
    name: str, microbatches: int, placement: Sequence[tuple[int, ...]], steps: Callable[[int], Iterable[Step]]
) -> Schedule:
    """Return the schedule in which rank r holds the stages ``placement[r]`` and runs ``steps(r)``."""
    return Schedule(
        name=name,
        ranks=len(placement),
        stages=1 + max(stage for stages in placement for stage in stages),
        microbatches=microbatches,
        steps=tuple(tuple(steps(rank)) for rank in range(len(placement))),
        placement=tuple(placement),
    )


def alternating(forward: Sequence[Action], backward: Sequence[Action], lead: int) -> list[Action]:
    """Warm up with ``lead`` forwards, alternate forward and backward, cool down with the backwards that are left."""
    pairs = zip(forward[lead:], backward, strict=False)
    return [*forward[:lead], *(action for pair in pairs for action in pair), *backward[len(forward) - lead :]]


def require(holds: bool, message: str) -> None:
    """Refuse a pipeline that lies outside a schedule's domain.

    Raises:
        InvalidInput: ``holds`` is false.
    """
    if not holds:
        raise errors.invalid(message, path="parallelism.schedule")


def require_sizes(name: str, ranks: int, microbatches: int) -> None:
    """Refuse a pipeline without ranks or without microbatches: P >= 1 and M >= 1.

    Raises:
        InvalidInput: one of the two is smaller than 1.
    """
    require(
        ranks >= 1 and microbatches >= 1,
        f"{name} needs at least 1 pipeline rank and 1 microbatch; got {ranks} ranks and {microbatches} microbatches",
    )
