"""Many scenarios from one: named variants, the grid of a sweep, and the difference of each from the base.

A point is a set of overrides by dotted path; every point goes through the same loader and the same laws as a scenario
that a user writes. All points share the base's seed, so that capacities are compared on the same draw of loads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from simulator.errors import InvalidInput, Problem
from simulator.spec import Scenario, vary

BASE = "base"


@dataclass(frozen=True)
class Point:
    """One scenario of a study: its name and what it changes."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    kind: Literal["base", "variant", "sweep", "scenario"] = "scenario"


@dataclass(frozen=True)
class Row:
    """One line of a study's table: a point and its estimate as plain data, or the reason why there is none."""

    name: str
    changes: Mapping[str, Any]
    values: Mapping[str, Any]
    error: str | None = None
    kind: Literal["base", "variant", "sweep", "scenario"] = "scenario"

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data: its changes (also one by one) and every key of the estimate."""
        result: dict[str, Any] = {
            **self.values,
            **self.changes,
            "name": self.name,
            "kind": self.kind,
            "changes": dict(self.changes),
        }
        if self.error is not None:
            result["error"] = self.error
        return result


def points(scenario: Scenario) -> list[Point]:
    """The base, its variants, and the grid of its sweep."""
    found = [Point(BASE, kind="base")]
    found += [Point(name, dict(changes), "variant") for name, changes in scenario.variants.items()]
    if scenario.sweep:
        for values in itertools.product(*scenario.sweep.values()):
            changes = dict(zip(scenario.sweep, values, strict=True))
            name = ", ".join(f"{path.rsplit('.', 1)[-1]} {brief(value, path)}" for path, value in changes.items())
            found.append(Point(name, changes, "sweep"))
    return found


def resolved(scenario: Scenario, chosen: Sequence[Point]) -> list[tuple[Point, Scenario | str]]:
    """Each point with its scenario, or the law that it breaks.

    A variant must be valid. A point of a sweep may break a law (not every combination is a layout) and is then
    reported as such, unless all of them do.

    Raises:
        InvalidInput: a variant is wrong, or no point of the sweep is valid.
    """
    result: list[tuple[Point, Scenario | str]] = []
    failures: list[InvalidInput] = []
    for point in chosen:
        try:
            label = f"{point.kind} {point.name!r},"
            result.append((point, vary(scenario, point.changes, label) if point.changes else scenario))
        except InvalidInput as error:
            if point.kind == "variant":
                raise InvalidInput([_named(each, point) for each in error.problems]) from None
            failures.append(error)
            result.append((point, "; ".join(problem.message for problem in error.problems)))
    if failures and len(failures) == sum(point.kind == "sweep" for point in chosen):
        raise failures[0]
    return result


def _named(problem: Problem, point: Point) -> Problem:
    """Say which variant a problem is about, where its origin does not."""
    if str(problem.origin or "").startswith(point.kind):
        return problem
    return replace(problem, path=f"in {point.kind} {point.name!r}: {problem.path}")


def difference(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Step time of another row minus the base's, term by term; sums to the difference of the steps."""
    before, after = base["step_breakdown_s"], other["step_breakdown_s"]
    return {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**before, **after}}


NULLS = {"capacity_factor": "dropless", "at_step": "settled", "window": "full attention", "group_limit": "all groups"}
"""What null stands for in fields where it is a choice of its own, by the last part of the path."""


def brief(value: Any, path: str = "") -> str:
    """A value of a sweep in a few words; ``path`` says what null stands for.

    >>> brief(None, "routing.capacity_factor"), brief({"kind": "logits", "population": 0.5}), brief(True)
    ('dropless', 'logits population 0.5', 'true')
    >>> brief([{"kind": "bias"}, {"kind": "sequence", "weight": 0.001}]), brief([]), brief([4, 4, 1])
    ('bias + sequence weight 0.001', 'none', '4 4 1')
    """
    if value is None:
        return NULLS.get(path.rsplit(".", 1)[-1], "null")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        parts = [f"{key} {brief(each, str(key))}" for key, each in value.items() if key not in _NAMING]
        return " ".join([*(str(value[key]) for key in _NAMING if key in value), *parts]) or "defaults"
    if isinstance(value, list | tuple):
        nested = any(isinstance(each, Mapping) for each in value)
        return (" + " if nested else " ").join(brief(each) for each in value) or "none"
    return str(value)


_NAMING = ("kind", "preset", "name")
"""Keys whose value says what a mapping is."""
