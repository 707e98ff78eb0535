"""Published training runs as data: one YAML per source, each row a scenario with what was measured on it.

A row is a base scenario with settings by dotted path, so that it goes through the same loader and laws as a scenario
that a user writes. What a source leaves out follows one written rule; what the rule cannot settle is swept over its
plausible values, and such a row is met when the measurement lies inside the predicted range. Contrasts hold two rows
of a source against each other: their ratio is free of what both share.

Rules and roles are fixed before the first prediction. A third of the layouts is set aside for one last prediction at
the close: those whose hash says so. Evidence is never fitted to. A prediction that misses it is shown as missing it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

from simulator import load_scenario
from simulator.spec.scenario import Scenario
from validation.quantities import UNITS, Convention

FOLDER = Path(__file__).parent / "published"

Role = Literal["fit", "test"]
Settings = Mapping[str, Any]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Citation(_Data):
    """Where numbers come from."""

    title: str
    url: str


class Quantity(_Data):
    """One published number."""

    name: str
    value: float
    unit: str
    source: str


class Row(_Data):
    """One row as written: ``measured`` maps a quantity to its value, or to {value, source} where another page has it.

    ``layout``: rows of one layout share a role; by default every row is its own. ``rank``: the pipeline rank on which
    memory is stated; null = the worst.
    """

    id: str
    family: str | None = None
    set: dict[str, Any] = {}
    sweep: dict[str, list[Any]] = {}
    measured: dict[str, Any] = {}
    complete: bool | None = None
    tolerance: float | None = None
    layout: str | None = None
    role: Role | None = None
    rank: int | None = None
    note: str | None = None


class Table(_Data):
    """Many rows of one form. Columns: ``id``, ``measured.<quantity>``, another field of a row, or a dotted path.

    An empty cell sets nothing. ``layout`` names the settings whose values make up the layout.
    """

    columns: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    family: str | None = None
    set: dict[str, Any] = {}
    sweep: dict[str, list[Any]] = {}
    complete: bool | None = None
    tolerance: float | None = None
    layout: tuple[str, ...] = ()

    def rows(self) -> Iterator[Row]:
        """Every line as a row."""
        for line in self.values:
            cells = {name: cell for name, cell in zip(self.columns, line, strict=True) if cell is not None}
            fields = {name: cells.pop(name) for name in Row.model_fields if name in cells}
            measured = {name[9:]: cells.pop(name) for name in list(cells) if name.startswith("measured.")}
            if self.layout:
                settings = {**self.set, **cells}
                fields["layout"] = ",".join(str(settings.get(name)) for name in self.layout)
            shared = self.model_dump(include={"family", "complete", "tolerance", "sweep"})
            yield Row.model_validate({**shared, **fields, "set": {**self.set, **cells}, "measured": measured})


class Contrast(_Data):
    """The second row against the first: the ratio of a quantity, or its difference in the quantity's unit.

    Without ``ratio`` and ``difference`` the ratio is that of the rows' own measurements. ``tolerance``: of a ratio as
    it stands, of a difference as a share of it.
    """

    name: str
    of: tuple[str, str]
    quantity: str
    ratio: float | None = None
    difference: float | None = None
    tolerance: float
    note: str | None = None


class Explanation(_Data):
    """Why rows are farther off than they should be: the terms that could explain it, and the evidence.

    ``of``: ids of rows, or patterns as of file names.
    """

    of: tuple[str, ...]
    why: str

    def covers(self, row: str) -> bool:
        """Whether it speaks of a row."""
        return any(fnmatchcase(row, pattern) for pattern in self.of)


class PublishedRun(_Data):
    """One published run: a scenario, what was measured, and what the source leaves open."""

    source: str
    id: str
    family: str
    complete: bool
    conventions: str
    convention: Convention
    base: str | dict[str, Any]
    settings: dict[str, Any]
    sweep: dict[str, list[Any]]
    quantities: tuple[Quantity, ...]
    tolerance: float | None
    layout: str
    role: Role
    rank: int | None
    note: str | None

    @property
    def scenario(self) -> str | None:
        """Name of the shipped scenario that describes the run as it is; None where settings change it."""
        return self.base if isinstance(self.base, str) and not (self.settings or self.sweep) else None

    def points(self) -> Iterator[dict[str, Any]]:
        """Settings of every combination of the swept values; one empty point for a complete row.

        An axis is a dotted path with its values, or a word with the settings of each case.
        """
        axes = [
            [{axis: value} if "." in axis else dict(value) for value in values] for axis, values in self.sweep.items()
        ]
        for choice in itertools.product(*axes):
            yield {path: value for part in choice for path, value in part.items()}

    def at(self, point: Settings) -> tuple[Scenario, Convention]:
        """Resolve the scenario and the FLOP convention at one point.

        Raises:
            InvalidInput: as :func:`simulator.load_scenario`.
        """
        counted = {path[11:]: value for path, value in point.items() if path.startswith("convention.")}
        overrides = {path: value for path, value in point.items() if not path.startswith("convention.")}
        label = f"{self.source}/{self.id}"
        base = self.base if isinstance(self.base, str) else {"name": label, **_NEUTRAL, **self.base}
        scenario = load_scenario(base, {**self.settings, **overrides}, label=label)
        return scenario, Convention.model_validate({**self.convention.model_dump(), **counted})


_NEUTRAL: dict[str, Any] = {"cost": {"price_per_accelerator_hour": "1 USD"}}
"""A step does not depend on the price, and not every profile has one."""


class Source(_Data):
    """One file of evidence. ``left_out``: rows of the source that are not here, ``misses``: why some are far off."""

    name: str
    source: Citation
    family: str
    conventions: str
    convention: Convention = Convention()
    rule: str
    complete: bool
    tolerance: float | None = None
    base: str | dict[str, Any]
    models: dict[str, dict[str, Any]] = {}
    sweep: dict[str, list[Any]] = {}
    rows: tuple[Row, ...] = ()
    tables: tuple[Table, ...] = ()
    memory: tuple[Row, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    left_out: tuple[str, ...] = ()
    misses: tuple[Explanation, ...] = ()

    def why(self, row: str) -> str | None:
        """The explanation of a row's miss, the first that covers it."""
        return next((each.why for each in self.misses if each.covers(row)), None)

    def runs(self) -> tuple[PublishedRun, ...]:
        """Every run whose time or speed was measured, or that takes part in a contrast."""
        return tuple(self._run(row) for row in (*self.rows, *(row for table in self.tables for row in table.rows())))

    def memory_runs(self) -> tuple[PublishedRun, ...]:
        """Every run of which the source states memory alone."""
        return tuple(self._run(row) for row in self.memory)

    def _run(self, row: Row) -> PublishedRun:
        chosen = row.set.get("model", self.base.get("model") if isinstance(self.base, dict) else None)
        named = {"model": self.models[chosen]} if isinstance(chosen, str) and chosen in self.models else {}
        layout = row.layout or row.id
        return PublishedRun(
            source=self.name,
            id=row.id,
            family=row.family or self.family,
            complete=self.complete if row.complete is None else row.complete,
            conventions=self.conventions,
            convention=self.convention,
            base=self.base if isinstance(self.base, str) else {k: v for k, v in self.base.items() if k not in named},
            settings={**named, **{path: value for path, value in row.set.items() if path not in named}},
            sweep={axis: values for axis, values in {**self.sweep, **row.sweep}.items() if values},
            quantities=tuple(self._quantity(name, value) for name, value in row.measured.items()),
            tolerance=self.tolerance if row.tolerance is None else row.tolerance,
            layout=layout,
            role=row.role or role_of(self.name, layout),
            rank=row.rank,
            note=row.note,
        )

    def _quantity(self, name: str, value: Any) -> Quantity:
        stated = value if isinstance(value, dict) else {"value": value}
        return Quantity(
            name=name, unit=UNITS[name], source=stated.get("source", self.source.title), value=stated["value"]
        )


def role_of(source: str, layout: str) -> Role:
    """``test`` for the third of the layouts whose sha256 of "source/layout" is divisible by 3.

    >>> role_of("deepspeed-moe", "moe-1.3b-128"), role_of("deepspeed-moe", "dense-6.7b")
    ('fit', 'test')
    """
    return "test" if int(hashlib.sha256(f"{source}/{layout}".encode()).hexdigest(), 16) % 3 == 0 else "fit"


@cache
def sources() -> tuple[Source, ...]:
    """All sources, by file name."""
    return tuple(_read(path) for path in sorted(FOLDER.glob("*.yaml")))


@cache
def published_runs() -> tuple[PublishedRun, ...]:
    """The published runs that a shipped scenario describes as it is; the other files are not even parsed."""
    files = [path for path in sorted(FOLDER.glob("*.yaml")) if re.search(r"^base: \w", path.read_text("utf-8"), re.M)]
    return tuple(run for path in files for run in _read(path).runs() if run.scenario is not None)


@cache
def _read(path: Path) -> Source:
    data = YAML(typ="safe", pure=True).load(path.read_text("utf-8"))
    return Source.model_validate({"name": path.stem, **data})


__all__ = [
    "Contrast",
    "Explanation",
    "PublishedRun",
    "Quantity",
    "Row",
    "Source",
    "Table",
    "published_runs",
    "role_of",
    "sources",
]
