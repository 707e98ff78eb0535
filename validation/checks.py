"""One row of a validation: a number that was stated somewhere, and what the simulator gives for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import quantiles
from typing import Any

Check = dict[str, Any]
"""Keys: group, name, expected, reached, unit, tolerance (in the unit), rule, ok, source."""


def near(
    group: str, name: str, expected: float, reached: float, unit: str, tolerance: float | None, source: str
) -> Check:
    """The number is within an absolute tolerance; without one it stands for the record."""
    ok = None if tolerance is None else abs(reached - expected) <= tolerance
    return _check(group, name, expected, reached, unit, tolerance, "near", ok, source)


def within(group: str, name: str, expected: float, reached: float, unit: str, share: float, source: str) -> Check:
    """The number is within a share of what is expected.

    >>> within("a", "b", 10.0, 11.0, "", 0.2, "c")["ok"]
    True
    """
    return near(group, name, expected, reached, unit, abs(expected) * share, source)


def at_most(group: str, name: str, limit: float, reached: float, unit: str, source: str) -> Check:
    """The number does not exceed a limit."""
    return _check(group, name, limit, reached, unit, 0.0, "at most", reached <= limit, source)


def at_least(group: str, name: str, limit: float, reached: float, unit: str, source: str) -> Check:
    """The number reaches a limit."""
    return _check(group, name, limit, reached, unit, 0.0, "at least", reached >= limit, source)


def inside(group: str, name: str, bounds: tuple[float, float], reached: float, unit: str, source: str) -> Check:
    """The number lies between two bounds; their middle is what is expected."""
    low, high = bounds
    return _check(
        group, name, 0.5 * (low + high), reached, unit, 0.5 * (high - low), "near", low <= reached <= high, source
    )


def covers(group: str, name: str, expected: float, runs: Sequence[float], unit: str, source: str) -> Check:
    """One run of somebody else lies between the first and last tenth of several of ours; reached is our mean."""
    tenths = quantiles(runs, n=10, method="inclusive")
    low, high = tenths[0], tenths[-1]
    reached = sum(runs) / len(runs)
    check = _check(group, name, expected, reached, unit, None, "in range", low <= expected <= high, source)
    return {**check, "range": [low, high]}


def summary(checks: Iterable[Check]) -> dict[str, Any]:
    """How many checks hold, by group, and the names of those that do not."""
    groups: dict[str, dict[str, Any]] = {}
    for check in checks:
        found = groups.setdefault(check["group"], {"checks": 0, "ok": 0, "missed": [], "for_the_record": 0})
        found["checks"] += 1
        found["ok"] += check["ok"] is True
        found["for_the_record"] += check["ok"] is None
        if check["ok"] is False:
            found["missed"].append(check["name"])
    return groups


def _check(
    group: str,
    name: str,
    expected: float,
    reached: float,
    unit: str,
    tolerance: float | None,
    rule: str,
    ok: bool | None,
    source: str,
) -> Check:
    return {
        "group": group,
        "name": name,
        "expected": float(expected),
        "reached": float(reached),
        "unit": unit,
        "tolerance": None if tolerance is None else float(tolerance),
        "rule": rule,
        "ok": None if ok is None else bool(ok),
        "source": source,
    }


__all__ = ["Check", "at_least", "at_most", "covers", "inside", "near", "summary", "within"]
