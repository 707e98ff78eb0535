"""What the verbs have in common: the scenario argument with its overrides, JSON instead of tables, and the engine."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from simulator.spec import EngineName, Scenario


class Engine(StrEnum):
    """How a step is evaluated."""

    events = "events"
    max_plus = "max-plus"

    @property
    def reader(self) -> EngineName:
        """The engine as the estimate names it."""
        return "events" if self is Engine.events else "max-plus"


ScenarioArgument = Annotated[str, typer.Argument(help="Scenario: a YAML file or a shipped name such as deepseek-v3.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override by dotted path, e.g. --set routing.capacity_factor=1.25. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
EngineOption = Annotated[
    Engine, typer.Option(help="events: SimPy with shared links; max-plus: fast, links not shared.")
]
JobsOption = Annotated[int | None, typer.Option(min=1, help="Processes.")]


def load(scenario: str, assignments: Sequence[str] | None) -> Scenario:
    """Read a scenario and lay the ``--set`` assignments over it.

    Raises:
        InvalidInput: the scenario or an assignment is wrong.
    """
    from simulator.spec import load_scenario, parse_assignment

    return load_scenario(scenario, dict(parse_assignment(text) for text in assignments or ()), label="--set")
