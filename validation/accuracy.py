"""Predictions against evidence, signed: published runs, contrasts between them, and what a constant MFU says.

error = predicted / published - 1, of the quantity as its source prints it. Errors of time are of the step behind it
(positive: predicted slower), so that they can be compared and averaged over sources that print speeds and sources that
print times. Layouts weigh equally: the mean over the rows of a layout counts once.

A complete row is met when its error is within its tolerance. An incomplete row sweeps what its source leaves out; it is
met when the measurement lies inside the range of its predictions, and is shown by the middle of that range. The
baseline of a row takes the MFU of all other layouts of its family; it has never seen the row either.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from simulator import TrainingEstimate, load_scenario
from simulator.spec import EngineName
from validation.evidence import Contrast, PublishedRun, Source, published_runs, sources
from validation.families import GROUP
from validation.predictions import TIMES, Prediction, as_the_others_say, predict, timed

TERMS = 5
"""Terms of a step that are shown with its error."""


def judge(names: Sequence[str] = (), engine: EngineName | None = None, *, test: bool = False) -> list[dict[str, Any]]:
    """Predict published runs and compare: a check per quantity, per memory row, and per contrast.

    ``names``: sources, or rows as ``source/row``; none = all. ``test``: also the layouts set aside for the close.
    """
    found = [(source, _wanted(source, names, test=test)) for source in sources()]
    tasks = [task for source, wanted in found for task in wanted]
    predictions = iter(as_the_others_say(predict(tasks, engine=engine)))
    by_source = [(source, [next(predictions) for _ in wanted]) for source, wanted in found]
    baselines = baseline([prediction for _, some in by_source for prediction in some])
    return [check for source, some in by_source for check in _checks(source, some, baselines)]


def _wanted(source: Source, names: Sequence[str], *, test: bool) -> list[tuple[PublishedRun, frozenset[str]]]:
    """The runs of a source that are asked for, each with the quantities that it or a contrast needs."""
    runs = [*source.runs(), *source.memory_runs()]
    by_id = {run.id: run for run in runs}
    needed: dict[str, set[str]] = {run.id: {quantity.name for quantity in run.quantities} for run in runs}
    for contrast in source.contrasts:
        for each in contrast.of:
            needed[each].add(contrast.quantity)
    chosen = [
        run
        for run in by_id.values()
        if (not names or source.name in names or f"{source.name}/{run.id}" in names or run.scenario in names)
        and (test or run.role == "fit")
        and needed[run.id]
    ]
    return [(run, frozenset(needed[run.id])) for run in chosen]


def _checks(source: Source, some: Sequence[Prediction], baselines: Mapping[int, float]) -> Iterator[dict[str, Any]]:
    by_id = {prediction.run.id: prediction for prediction in some}
    for prediction in some:
        yield from _of_run(source, prediction, baselines.get(id(prediction)))
    for contrast in source.contrasts:
        if all(each in by_id for each in contrast.of):
            yield from _of_contrast(source, contrast, by_id[contrast.of[0]], by_id[contrast.of[1]])


def _of_run(source: Source, prediction: Prediction, baseline_s: float | None) -> Iterator[dict[str, Any]]:
    run = prediction.run
    main = timed(run)
    for quantity in run.quantities:
        name = f"{source.name}/{run.id}: {quantity.name}"
        if not prediction.points:
            yield _check(name, quantity.value, None, quantity.unit, None, None, quantity.source, prediction) | {
                "note": prediction.refused[0]
            }
            continue
        values = prediction.values(quantity.name)
        possible = [point.values[quantity.name] for point in prediction.possible]
        low, high = min(possible), max(possible)
        reached = values[0] if run.complete else math.sqrt(min(values) * max(values))
        error = reached / quantity.value - 1.0
        ok = None
        if run.complete and run.tolerance is not None:
            ok = abs(error) <= run.tolerance
        elif not run.complete:
            ok = low <= quantity.value <= high
        is_main = quantity.name == main
        yield _check(
            name,
            quantity.value,
            reached,
            quantity.unit,
            run.tolerance if run.complete else None,
            ok,
            quantity.source,
            prediction,
        ) | {
            "range": None if run.complete else [low, high],
            "range_width_percent": None if run.complete else 100.0 * (high / low - 1.0),
            "log_range": _log_range(prediction) if is_main and not run.complete else None,
            "time_error_percent": 100.0 * _time_error(quantity.name, error) if is_main else None,
            "terms_percent": _terms(prediction) if is_main else None,
            "reason": source.why(run.id) if is_main else None,
            "baseline_error_percent": (
                100.0 * (baseline_s / published_s - 1.0)
                if is_main and baseline_s and (published_s := prediction.points[0].published_s)
                else None
            ),
        }


def _check(
    name: str,
    expected: float,
    reached: float | None,
    unit: str,
    tolerance: float | None,
    ok: bool | None,
    source: str,
    prediction: Prediction,
) -> dict[str, Any]:
    run = prediction.run
    return {
        "group": GROUP,
        "name": name,
        "expected": expected,
        "reached": reached,
        "unit": unit,
        "tolerance": None if tolerance is None else tolerance * abs(expected),
        "ok": ok,
        "source": source,
        "family": run.family,
        "layout": prediction.layout,
        "hardware": prediction.hardware,
        "vendor": prediction.vendor,
        "stack": prediction.stack,
        "gap_fraction": prediction.term.gap,
        "issue_s": prediction.term.issue_s,
        "role": run.role,
        "complete": run.complete,
        "engine": prediction.engine,
        "accelerators": prediction.accelerators,
        "moe": prediction.is_moe,
        "error_percent": None if reached is None else 100.0 * (reached / expected - 1.0),
        "baseline_error_percent": None,
        "time_error_percent": None,
        "rule": "near",
        "range": None,
        "range_width_percent": None,
        "log_range": None,
        "terms_percent": None,
        "reason": None,
        "note": run.note,
    }


def _log_range(prediction: Prediction) -> list[float]:
    """Least and largest log error of the step time over the swept points and what the stack leaves open."""
    logs = [math.log(point.step_s / point.published_s) for point in prediction.possible if point.published_s]
    return [min(logs), max(logs)]


def _terms(prediction: Prediction) -> dict[str, float]:
    """The largest terms of the first point's step, in percent of it."""
    point = prediction.points[0]
    largest = sorted(point.terms_s.items(), key=lambda term: -term[1])[:TERMS]
    return {name: round(100.0 * seconds / point.step_s, 1) for name, seconds in largest}


def _time_error(quantity: str, error: float) -> float:
    """Relative error of the step time behind a relative error of the quantity."""
    return error if quantity.startswith(TIMES) else 1.0 / (1.0 + error) - 1.0


def _of_contrast(source: Source, contrast: Contrast, first: Prediction, second: Prediction) -> Iterator[dict[str, Any]]:
    """The second row over the first at equal points, or their difference."""
    if not first.points or not second.points:
        return
    others = {str(dict(point.settings)): point.values[contrast.quantity] for point in second.points}
    pairs = [
        (point.values[contrast.quantity], others[str(dict(point.settings))])
        for point in first.points
        if str(dict(point.settings)) in others
    ] or [(a, b) for a in first.values(contrast.quantity) for b in second.values(contrast.quantity)]
    if contrast.difference is not None:
        expected, unit, values = contrast.difference, "", [b - a for a, b in pairs]
        slack = contrast.tolerance * abs(expected)
    else:
        expected = contrast.ratio if contrast.ratio is not None else _measured_ratio(contrast, first, second)
        unit, values, slack = "x", [b / a for a, b in pairs], contrast.tolerance
    low, high = min(values), max(values)
    swept = len(set(values)) > 1
    reached = (low + high) / 2.0 if swept else values[0]
    ok = low - slack <= expected <= high + slack
    name = f"{source.name}: {contrast.name}"
    yield _check(name, expected, reached, unit, None, ok, source.source.title, second) | {
        "group": "contrasts",
        "tolerance": slack,
        "role": "test" if "test" in (first.run.role, second.run.role) else "fit",
        "range": [low, high] if swept else None,
        "range_width_percent": 100.0 * (high - low) / abs(expected) if swept else None,
        "note": contrast.note,
    }


def _measured_ratio(contrast: Contrast, first: Prediction, second: Prediction) -> float:
    before, after = (
        next(quantity.value for quantity in each.run.quantities if quantity.name == contrast.quantity)
        for each in (first, second)
    )
    return after / before


def baseline(predictions: Iterable[Prediction]) -> dict[int, float]:
    """Step time of each run at the mean MFU of the other layouts of its family, by id of the prediction.

    A run without another layout in its family has none.
    """
    families: dict[str, list[tuple[Prediction, float]]] = defaultdict(list)
    for each in predictions:
        if each.points and each.points[0].published_s:
            families[each.run.family].append((each, each.points[0].ideal_s / each.points[0].published_s))
    found = {}
    for some in families.values():
        by_layout: dict[str, list[float]] = defaultdict(list)
        for each, mfu in some:
            by_layout[each.layout].append(mfu)
        means = {layout: float(np.mean(values)) for layout, values in by_layout.items()}
        for each, _ in some:
            others = [mean for layout, mean in means.items() if layout != each.layout]
            if others:
                found[id(each)] = each.points[0].ideal_s / float(np.mean(others))
    return found


def against_published(scenario: str, result: TrainingEstimate) -> list[dict[str, Any]]:
    """Rows of prediction and publication for one estimate; empty unless it is of the shipped scenario as it is.

    A changed scenario, or another one of the same name, is not what was published.
    """
    return [
        row
        for run in published_runs()
        if run.scenario == scenario and result.scenario == load_scenario(run.scenario)
        for row in _rows(run, result)
    ]


def _rows(run: PublishedRun, result: TrainingEstimate) -> list[dict[str, Any]]:
    rows = []
    for quantity in run.quantities:
        value = predicted(result, quantity.name)
        rows.append(
            {
                "quantity": quantity.name,
                "predicted": value,
                "published": quantity.value,
                "unit": quantity.unit,
                "error_percent": 100.0 * (value / quantity.value - 1.0),
                "source": quantity.source,
            }
        )
    return rows


def predicted(result: TrainingEstimate, name: str) -> float:
    """One quantity of an estimate under the name that evidence uses.

    Raises:
        KeyError: the estimate has no such number.
    """
    if name == "gpu_hours_per_trillion_tokens":
        return result.gpu_hours / result.scenario.training.tokens * 1e12
    value = result.as_dict()[name]
    if not isinstance(value, int | float):
        raise KeyError(name)
    return float(value)


__all__ = ["against_published", "baseline", "judge", "predicted"]
