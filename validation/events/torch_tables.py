"""Recorded action lists of PyTorch 2.13.0, and of DeepSeek's DualPipe: whole ones, and digests for 2 to 16 ranks.

``tests/differential/record_torch_schedules.py`` records them, and says what is dropped and what is repaired.
"""

from __future__ import annotations

import csv
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from simulator import schedules
from simulator.schedules import Schedule

TABLES = Path(__file__).parent / "tables"


class Table(NamedTuple):
    """One recorded schedule; ``digest`` stands for the actions of all ranks."""

    name: str
    ranks: int
    microbatches: int
    virtual_stages: int
    digest: str

    def __str__(self) -> str:
        return f"{self.name}-P{self.ranks}-M{self.microbatches}-v{self.virtual_stages}"

    def ours(self) -> Schedule:
        """Build the schedule of the same name and sizes."""
        return schedules.build(self.name, self.ranks, self.microbatches, self.virtual_stages)

    def is_ours(self) -> bool:
        """Whether our lists are the recorded ones, action for action."""
        return self.digest == digest(rows(self.ours()))


def tables() -> list[Table]:
    """Every recorded schedule, those that are kept whole and those that are kept as digests."""
    with (TABLES / "torch_digests.csv").open(encoding="utf-8", newline="") as file:
        read = [
            Table(row["name"], int(row["ranks"]), int(row["microbatches"]), int(row["virtual_stages"]), row["digest"])
            for row in csv.DictReader(file)
        ]
    kept = [
        Table(case["name"], case["ranks"], case["microbatches"], case["virtual_stages"], digest(case["steps"]))
        for case in whole()["cases"]
    ]
    return sorted({*read, *kept})


@cache
def whole() -> dict[str, Any]:
    """The lists that are kept whole: torch (release), dualpipe (commit), cases with name, sizes and steps by rank."""
    found: dict[str, Any] = json.loads((TABLES / "torch_schedules.json").read_text(encoding="utf-8"))
    return found


def rows(schedule: Schedule) -> list[str]:
    """Actions of every rank, one text per rank."""
    return [" ".join(map(str, steps)) for steps in schedule.steps]


def digest(steps: list[str]) -> str:
    """16 hexadecimal digits for the actions of all ranks.

    >>> digest(["0F0 0B0"])
    '40a7e927f2e13b02'
    """
    return hashlib.sha256("\n".join(steps).encode()).hexdigest()[:16]
