"""One simulated training step: every room in order, each result kept so that it can be opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from simulator import memory
from simulator.errors import NotSimulated
from simulator.events import MemoryCurve, Timeline, evaluate, memory_over_time, play, with_faults, with_jitter
from simulator.layout import Layout, resolve
from simulator.memory import Holding, MemoryUse
from simulator.program import Program, build, schedule_of
from simulator.routing import ExpertLoad, expert_load
from simulator.schedules import Schedule
from simulator.spec import EngineName, Scenario
from simulator.timing import Pricer, Prices


@dataclass(frozen=True)
class Step:
    """One training step and what led to it."""

    scenario: Scenario
    engine: EngineName
    layout: Layout
    schedule: Schedule
    load: ExpertLoad | None
    holdings: tuple[Holding, ...]
    program: Program
    prices: Prices
    timeline: Timeline

    @property
    def seconds(self) -> float:
        """Duration of the step."""
        return self.timeline.step_s

    @cached_property
    def memory(self) -> MemoryUse:
        """Memory of the worst rank at its worst moment."""
        return memory.worst(self.holdings)

    @cached_property
    def memory_curves(self) -> tuple[MemoryCurve, ...]:
        """Memory of every pipeline rank over the step."""
        return memory_over_time(self.timeline, self.schedule, self.holdings)


def simulate_step(scenario: Scenario, engine: EngineName = "events") -> Step:
    """Simulate one step at the steady batch size.

    Raises:
        InvalidInput: the layout cannot be formed.
        NotSimulated: the scenario asks for something that no room models yet.
    """
    _refuse_unmodelled(scenario)
    layout = resolve(scenario)
    schedule = schedule_of(scenario, layout)
    load = expert_load(scenario, layout)
    program = build(scenario, layout, schedule)
    prices = Pricer(scenario, layout, load).price(program.classes)
    program, prices = with_faults(program, prices, scenario, layout)
    program, prices = with_jitter(program, prices, scenario, layout)
    timeline = play(program, prices) if engine == "events" else evaluate(program, prices)
    holdings = memory.holding(scenario, layout, schedule, load)
    return Step(scenario, engine, layout, schedule, load, holdings, program, prices, timeline)


def _refuse_unmodelled(scenario: Scenario) -> None:
    """Refuse options that would silently have no effect."""
    if scenario.training.offload:
        raise NotSimulated("training.offload: host offload is not simulated yet; leave the list empty")
