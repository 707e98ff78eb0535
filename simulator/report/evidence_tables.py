"""Predictions beside evidence in a terminal: one published run, and all checks of ``moesim validate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from simulator.report.tables import new_table, number, pairs_table, titled


def published_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Prediction against publication."""
    table = new_table("", "predicted", "published", "error", "source")
    for row in rows:
        predicted, published = (number(row[key], row["unit"]) for key in ("predicted", "published"))
        table.add_row(
            escape(str(row["quantity"])),
            predicted,
            published,
            f"{row['error_percent']:+.1f} %",
            Text(str(row["source"]), overflow="fold"),
        )
    return titled("Against the published run", table)


def checks_view(checks: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What was stated against what is reached, group by group."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for check in checks:
        groups.setdefault(check["group"], []).append(check)
    parts: list[RenderableType] = []
    for group, members in groups.items():
        if group == "runs":
            parts.append(_runs_table(members))
            continue
        rows = [
            (
                check["name"],
                number(check["expected"], check["unit"]),
                number(check["reached"], check["unit"]),
                _tolerance(check),
                {True: "ok", False: "MISSED", None: ""}[check["ok"]],
                check["source"],
            )
            for check in members
        ]
        held = sum(check["ok"] is True for check in members)
        judged = sum(check["ok"] is not None for check in members)
        parts.append(
            pairs_table(
                f"{group}: {held} of {judged} hold", rows, "name", "expected", "reached", "within", "", "source"
            )
        )
    missed = [check["name"] for check in checks if check["ok"] is False]
    held = sum(check["ok"] is True for check in checks)
    parts.append(Text(f"{held} checks hold" + (f"; missed: {'; '.join(missed)}" if missed else "")))
    return Group(*parts)


def _tolerance(check: Mapping[str, Any]) -> str:
    """How far the reached number may be from the expected one."""
    if check["rule"] == "in range":
        low, high = check["range"]
        return f"{low:.3g} to {high:.3g}"
    if check["rule"] != "near":
        return str(check["rule"])
    return "" if check["tolerance"] is None else f"± {number(check['tolerance'], check['unit'])}"


def _runs_table(checks: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Predictions against published runs."""
    rows = [
        (
            check["name"],
            number(check["reached"], check["unit"]),
            number(check["expected"], check["unit"]),
            f"{check['error_percent']:+.1f} %",
            check["source"],
        )
        for check in checks
    ]
    return pairs_table("Predictions against published runs", rows, "name", "predicted", "published", "error", "source")
