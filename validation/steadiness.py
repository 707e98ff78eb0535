"""What a measurement is worth on a processor that is not equally fast all the time.

Three numbers deal with that: the minimum over repeats and over separated passes, which disturbances can only miss
(:func:`best`); the difference between the passes, below which no prediction can be judged (:func:`noise`); and the
seconds of a fixed product timed right before and after each case, by which the current speed can be divided out where
that helps (:func:`corrected`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from validation.records import Record

MOST_DRIFT = 2.0
"""A core of a shared machine changes its speed by up to 1.7."""


@dataclass(frozen=True)
class Noise:
    """How far the second pass is from the first, over all cases of a kind: absolute and signed relative differences."""

    cases: int
    mape: float
    median: float
    maximum: float
    bias: float


def best(records: Iterable[Record]) -> dict[str, Record]:
    """The fastest pass of every case, by key, in the order of their first record."""
    found: dict[str, Record] = {}
    for record in records:
        held = found.get(record.key)
        found[record.key] = record if held is None or record.seconds < held.seconds else held
    return found


def noise(records: Iterable[Record]) -> dict[str, Noise]:
    """Difference of pass 2 from pass 1 by kind, and of all under ``all``; only cases that have both."""
    passes: dict[tuple[str, int], Record] = {(record.key, record.number): record for record in records}
    changes: dict[str, list[float]] = {}
    for (key, number), second in passes.items():
        first = passes.get((key, 1))
        if number == 2 and first is not None:
            change = second.seconds / first.seconds - 1.0
            for kind in (second.kind, "all"):
                changes.setdefault(kind, []).append(change)
    return {kind: _noise(values) for kind, values in sorted(changes.items())}


def corrected(records: Sequence[Record]) -> tuple[Record, ...]:
    """Times as they would be at the median speed of the reference kernel: x median(reference_s) / reference_s.

    A reference that is off by more than ``MOST_DRIFT`` was interrupted itself and says nothing about the case.
    """
    if not records:
        return ()
    usual = median(record.reference_s for record in records)
    return tuple(
        replace(record, seconds=record.seconds * factor, median_s=record.median_s * factor, reference_s=usual)
        for record in records
        for factor in (_speed(usual, record.reference_s),)
    )


def _speed(usual_s: float, reference_s: float) -> float:
    drift = usual_s / reference_s
    return drift if 1.0 / MOST_DRIFT <= drift <= MOST_DRIFT else 1.0


def steadier(records: Sequence[Record]) -> tuple[Record, ...]:
    """The records, corrected for drift if that brings the passes closer to each other."""
    plain, divided = noise(records), noise(corrected(records))
    if "all" in plain and divided["all"].mape < plain["all"].mape:
        return corrected(records)
    return tuple(records)


def _noise(changes: Sequence[float]) -> Noise:
    sizes = [abs(change) for change in changes]
    return Noise(len(sizes), fmean(sizes), median(sizes), max(sizes), fmean(changes))


__all__ = ["Noise", "best", "corrected", "noise", "steadier"]
