"""Rows of a study as figures need them: which belong together, and how they and their values are called."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from simulator.study import brief

Row = Mapping[str, Any]
MODEL_AXIS = "model"


def families(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that belong into one figure: each sweep (rows that change the same paths), then variants and single rows.

    The base (a row without changes) is part of every family, but for the models of a sweep over models: each has a
    family of its own where other axes are left to draw.
    """
    base = [row for row in rows if not row["changes"]]
    sweeps: dict[frozenset[str], list[Row]] = {}
    for row in rows:
        if row["changes"] and row.get("kind") != "variant":
            sweeps.setdefault(frozenset(row["changes"]), []).append(row)
    single = [row for row in rows if row["changes"] and len(sweeps.get(frozenset(row["changes"]), [])) <= 1]
    single += [row for row in rows if row.get("kind") == "variant" and row not in single]
    found = []
    for paths, members in sweeps.items():
        if len(members) > 1:
            models = _by_model(members) if MODEL_AXIS in paths and len(paths) > 1 else {}
            found += list(models.values()) if len(models) > 1 else [base + members]
    return [*found, base + single] if single else found


def shared_axes(rows: Sequence[Row]) -> list[str] | None:
    """Paths that every row changes, in order; None when rows change different paths or none at all."""
    first = list(rows[0]["changes"]) if rows else []
    same = all(set(row["changes"]) == set(first) for row in rows)
    return first if same and first else None


def row_labels(rows: Sequence[Row]) -> list[str]:
    """Names of rows, safe to show: as given where they tell the rows apart, else written from the changes.

    >>> row_labels([{"changes": {}}, {"changes": {"routing.capacity_factor": 1.25}}])
    ['base', 'routing.capacity_factor = 1.25']
    """
    names = [str(row.get("name", "")) for row in rows]
    if "" not in names and len(set(names)) == len(names):
        return [html.escape(name) for name in names]
    written = (
        ", ".join(f"{html.escape(path)} = {shown(value, path)}" for path, value in row["changes"].items())
        for row in rows
    )
    return [text or "base" for text in written]


def shown(value: Any, path: str = "") -> str:
    """A value of an axis in a few words, safe to show.

    >>> shown(None, "routing.capacity_factor"), shown("<b>"), shown(True)
    ('dropless', '&lt;b&gt;', 'true')
    """
    return html.escape(brief(value, path))


def last_name(path: str, others: Sequence[str]) -> str:
    """The last part of a dotted path, safe to show; the whole path where another one ends alike.

    >>> last_name("routing.load.population", ["routing.pad_to_capacity", "routing.load.population"])
    'population'
    """
    last = path.rsplit(".", 1)[-1]
    alone = sum(other.rsplit(".", 1)[-1] == last for other in others) <= 1
    return html.escape(last if alone else path)


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each value of the axis ``model``."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(brief(row["changes"][MODEL_AXIS]), []).append(row)
    return found
