"""Predictions of published runs: every row at every swept point, in parallel, each step simulated once.

Points that differ in the FLOP convention alone share a step. MoE rows are played in SimPy; dense rows are evaluated by
the max-plus reader, which gives the same where no link is shared. A point that cannot be simulated is kept with its
reason; it is neither a hit nor a miss.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from simulator.errors import MoesimError
from simulator.events import BUBBLE
from simulator.memory import stage_parameters
from simulator.spec import EngineName, Scenario
from simulator.workload import parameters
from validation.evidence import PublishedRun
from validation.long_steps import Played, played
from validation.quantities import Convention, flop_per_token, from_memory, from_step_time, step_time_behind
from validation.stack import (
    Observation,
    Response,
    Spread,
    StackTerm,
    fitted,
    of_the_others,
    response,
    spread_of_the_others,
)

TIMES = ("step_time_", "gpu_hours", "bubble_")
SPEEDS = frozenset(
    (
        *("tokens_per_s_per_accelerator", "samples_per_s", "tflop_per_s_per_accelerator"),
        *("mfu", "mfu_percent", "mfu_noncausal"),
    )
)


@dataclass(frozen=True)
class Point:
    """One run at one combination of its swept values.

    ``values``: predicted quantities in their printed units. ``published_s``: the step behind what was measured, under
    this point's convention; None where no time was. ``ideal_s``: the step at peak rate, counting the FLOPs that
    the source counts; with it a constant MFU gives a step time. ``response``: how the step answers to the
    numbers of its software stack.
    """

    settings: Mapping[str, Any]
    values: Mapping[str, float]
    step_s: float
    published_s: float | None
    ideal_s: float
    response: Response
    terms_s: Mapping[str, float]


@dataclass(frozen=True)
class Prediction:
    """One run at all of its points; ``refused``: why points could not be simulated.

    ``stack``: profile and software stack; ``term``: the numbers of the stack under which it was predicted; ``around``:
    the same points under the lower and the upper numbers that the other layouts of the stack leave open.
    """

    run: PublishedRun
    engine: EngineName
    is_moe: bool
    accelerators: int
    hardware: str
    vendor: str
    stack: str
    term: StackTerm
    points: tuple[Point, ...]
    refused: tuple[str, ...]
    around: tuple[tuple[Point, ...], ...] = ()

    def values(self, quantity: str) -> tuple[float, ...]:
        """The quantity at every point."""
        return tuple(point.values[quantity] for point in self.points)

    @property
    def possible(self) -> tuple[Point, ...]:
        """All points, and what they would be under other numbers of the stack."""
        return tuple(point for points in (self.points, *self.around) for point in points)

    @property
    def layout(self) -> str:
        """What rows that are nearly the same have in common."""
        return f"{self.run.source}/{self.run.layout}"

    @property
    def observation(self) -> Observation | None:
        """What the run says of its stack: the middle of its predictions over what was measured; None without a time."""
        logs = [math.log(point.step_s / point.published_s) for point in self.points if point.published_s]
        if not logs:
            return None
        return Observation(self.stack, self.layout, (min(logs) + max(logs)) / 2.0, self.points[0].response)

    def under(self, term: StackTerm, spread: Spread | None = None) -> Prediction:
        """The same under other numbers of the stack; memory stays. Only for a prediction under the profile's own."""
        around = () if spread is None else tuple(self._points_under(each) for each in spread)
        return replace(self, term=term, points=self._points_under(term), around=around)

    def _points_under(self, term: StackTerm) -> tuple[Point, ...]:
        points = []
        for point in self.points:
            factor = point.response.factor(term)
            values = {
                name: value * factor if name.startswith(TIMES) else value / factor if name in SPEEDS else value
                for name, value in point.values.items()
            }
            terms = {name: value * factor for name, value in point.terms_s.items()}
            points.append(replace(point, values=values, step_s=point.step_s * factor, terms_s=terms))
        return tuple(points)


def as_the_others_say(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Every prediction under the numbers that all other layouts of its stack give; unchanged where they are too few."""
    by_stack: dict[str, list[Observation]] = defaultdict(list)
    for each in predictions:
        if each.observation is not None:
            by_stack[each.stack].append(each.observation)
    issued = {each.stack: each.term.issue_s is not None for each in predictions}
    known = {stack: of_the_others(some, issues=issued[stack]) for stack, some in by_stack.items()}
    spreads = {stack: spread_of_the_others(some, issues=issued[stack]) for stack, some in by_stack.items()}
    everything = {stack: fitted(some, issues=issued[stack]) for stack, some in by_stack.items()}
    found = []
    for each in predictions:  # a run of which memory or a contrast alone is stated has no say in its stack
        terms = known.get(each.stack, {})
        term = terms[each.layout] if each.layout in terms else everything.get(each.stack)
        spread = None if each.run.complete else spreads.get(each.stack, {}).get(each.layout)
        found.append(each if term is None else each.under(term, spread))
    return found


def stack_terms(predictions: Sequence[Prediction]) -> dict[str, StackTerm]:
    """The numbers of every stack from all of its runs: what profiles carry."""
    by_stack: dict[str, list[Prediction]] = defaultdict(list)
    for each in predictions:
        by_stack[each.stack].append(each)
    found = {}
    for stack, some in sorted(by_stack.items()):
        seen = [each.observation for each in some if each.observation is not None]
        term = fitted(seen, issues=some[0].term.issue_s is not None)
        if term is not None:
            found[stack] = term
    return found


Task = tuple[PublishedRun, tuple[str, ...]]
Change = Callable[[Scenario], Scenario]


def predict(
    runs: Sequence[tuple[PublishedRun, frozenset[str]]],
    *,
    engine: EngineName | None = None,
    jobs: int | None = None,
    change: Change | None = None,
) -> list[Prediction]:
    """Predict the named quantities of every run at every point, in the order given.

    ``engine``: None = SimPy for MoE, max-plus for dense models. Runs of one layout that were measured under several
    releases are simulated once. ``change``: what is done to every scenario first.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, (run, _) in enumerate(runs):
        groups[_simulated(run)].append(index)
    order = sorted(groups.values(), key=lambda group: -_effort(runs[group[0]][0]))  # long ones first
    tasks = [([(runs[index][0], tuple(sorted(runs[index][1]))) for index in group], engine, change) for group in order]
    workers = min(len(tasks), jobs or os.cpu_count() or 1)
    if workers <= 1 or len(tasks) < 4:
        results = [_predict_group(task) for task in tasks]
    else:
        with ProcessPoolExecutor(workers, initializer=_rarely_collected) as pool:
            results = list(pool.map(_predict_group, tasks))
    found = {
        index: prediction
        for group, some in zip(order, results, strict=True)
        for index, prediction in zip(group, some, strict=True)
    }
    return [found[index] for index in range(len(runs))]


def _rarely_collected() -> None:
    """Programs are many small objects that live to the end of their step: looking through them often finds nothing."""
    gc.set_threshold(500_000, 20, 50)


def _simulated(run: PublishedRun) -> str:
    """What decides the steps of a run: equal for runs that differ in what was measured alone."""
    axes = {axis: values for axis, values in run.sweep.items() if not axis.startswith("convention.")}
    return json.dumps([run.base, run.settings, axes], sort_keys=True, default=str)


def _effort(run: PublishedRun) -> float:
    """A guess at the time that a run takes, to keep all workers busy to the end: ops of its Programs."""
    scenario = run.at(next(run.points()))[0]
    split, training = scenario.parallelism, scenario.training
    ranks = scenario.cluster.accelerators * scenario.cluster.profile.accelerator.ranks_per_accelerator
    data = max(1, ranks // (split.pipeline * split.tensor * split.context))
    microbatches = training.steady_batch_sequences / (training.micro_batch_sequences * data)
    axes = [len(values) for axis, values in run.sweep.items() if not axis.startswith("convention.")]
    expensive = 10.0 if scenario.model.moe is not None else 1.0
    return math.prod(axes) * microbatches * scenario.model.layers * expensive


def _predict_group(task: tuple[list[Task], EngineName | None, Change | None]) -> list[Prediction]:
    tasks, engine, change = task
    steps: dict[str, Played | str] = {}
    return [_predict(run, names, engine, change, steps) for run, names in tasks]


def _predict(
    run: PublishedRun,
    names: tuple[str, ...],
    engine: EngineName | None,
    change: Change | None,
    steps: dict[str, Played | str],
) -> Prediction:
    """Predict one run; ``steps``: what was simulated already, by settings."""
    answer: Response | None = None  # that of the first point stands for all: swept values hardly change it
    points, refused = [], []
    for settings in run.points():
        # Points that differ in the FLOP convention alone are one step.
        simulated = {path: value for path, value in settings.items() if not path.startswith("convention.")}
        key = json.dumps(simulated, sort_keys=True, default=str)
        scenario, convention = run.at(settings)
        if key not in steps:
            steps[key] = _step(scenario if change is None else change(scenario), engine)
        found = steps[key]
        if isinstance(found, str):
            refused.append(found)
            continue
        answer = response(found) if answer is None else answer
        points.append(_point(run, names, settings, convention, found, answer))
    first = run.at(next(run.points()))[0]
    cluster = first.cluster
    stack = cluster.profile.stacks[cluster.stack_name]
    return Prediction(
        run,
        engine or _reader(first),
        first.model.moe is not None,
        cluster.accelerators,
        cluster.profile.name,
        cluster.profile.vendor,
        f"{cluster.profile.name}, {cluster.stack_name}",
        StackTerm(stack.gap_fraction.value, None if stack.issue is None else stack.issue.value),
        tuple(points),
        tuple(dict.fromkeys(refused)),
    )


def _step(scenario: Scenario, engine: EngineName | None) -> Played | str:
    try:
        return played(scenario, engine or _reader(scenario))
    except MoesimError as error:
        return str(error)


def _reader(scenario: Scenario) -> EngineName:
    return "events" if scenario.model.moe is not None else "max-plus"


def _point(
    run: PublishedRun,
    names: Sequence[str],
    settings: Mapping[str, Any],
    convention: Convention,
    step: Played,
    answer: Response,
) -> Point:
    training, cluster = step.scenario.training, step.scenario.cluster
    tokens = training.steady_batch_sequences * training.tokens_per_sequence
    peak = float(cluster.profile.accelerator.peak["bf16"].value) * cluster.accelerators
    return Point(
        settings=settings,
        values={name: _value(name, run.rank, convention, step) for name in names},
        step_s=step.seconds,
        published_s=_published_s(run, step.scenario, convention),
        ideal_s=tokens * flop_per_token(step.scenario, convention) / peak,
        response=answer,
        terms_s=step.breakdown,
    )


def timed(run: PublishedRun) -> str | None:
    """The quantity that counts as the row's measurement of time: speeds in several units are one measurement."""
    names = [quantity.name for quantity in run.quantities]
    return next((name for name in names if name.startswith(("step_time_", "gpu_hours")) or name in SPEEDS), None)


def _published_s(run: PublishedRun, scenario: Scenario, convention: Convention) -> float | None:
    name = timed(run)
    value = next((quantity.value for quantity in run.quantities if quantity.name == name), None)
    return None if name is None or value is None else step_time_behind(name, value, scenario, convention)


def _value(name: str, rank: int | None, convention: Convention, step: Played) -> float:
    """A quantity of evidence, formed from the step as its source forms it."""
    longest = step.longest
    if name == "parameters_total":
        return parameters.count(step.scenario.model).total.total
    if name == "bubble_s":
        return step.breakdown[BUBBLE]
    if name == "parameters_per_rank":
        held = stage_parameters(step.scenario, longest.layout, longest.layout.stages[rank or 0])
        return held.dense + held.expert
    memory = longest.memory if rank is None else longest.holdings[rank].worst
    if name.endswith(("_gib", "_gb")):
        return from_memory(name, memory.terms)
    return from_step_time(name, step.seconds, step.scenario, convention)


__all__ = ["SPEEDS", "TIMES", "Point", "Prediction", "as_the_others_say", "predict", "stack_terms", "timed"]
