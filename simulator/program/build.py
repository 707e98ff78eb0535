"""Composition only: chunks in schedule order, then the end of the step."""

from __future__ import annotations

from simulator import schedules
from simulator.layout import Layout
from simulator.program.gradients import finish_step
from simulator.program.pipeline import place
from simulator.program.structure import Draft, Program
from simulator.schedules import Schedule
from simulator.schedules.pairing import pair_neighbours
from simulator.spec.scenario import Scenario


def schedule_of(scenario: Scenario, layout: Layout) -> Schedule:
    """The action lists of the scenario's schedule, by name or by file, with its pairs of forward and backward.

    Raises:
        InvalidInput: a schedule file that cannot be used; the text names file, line, cell or rank and action.
    """
    schedule = schedules.of(scenario.parallelism, layout.microbatches)
    if "expert_all_to_all" in layout.overlap and scenario.parallelism.expert > 1 and not schedule.pairs:
        return pair_neighbours(schedule)
    return schedule


def build(scenario: Scenario, layout: Layout, schedule: Schedule) -> Program:
    """Write the Program of one training step."""
    draft = Draft(schedule.ranks)
    placed = place(scenario, layout, schedule, draft)
    finish_step(scenario, layout, schedule, draft, placed)
    return draft.finish()
