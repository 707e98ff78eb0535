"""One played step in numbers: terms, critical path, kinds of action, both bubbles and memory, rank by rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from simulator.campaign import Step
from simulator.events import ACTIONS, action_ledger, bubbles, by_action, critical_path
from simulator.report.tables import GIB, number, pairs_table, stacked


def step_values(step: Step) -> dict[str, Any]:
    """Plain data of ``moesim step --json``."""
    timeline = step.timeline
    path = critical_path(timeline)
    makespan, span = bubbles(timeline)
    return {
        "name": step.scenario.name,
        "engine": step.engine,
        "step_time_s": step.seconds,
        "step_breakdown_s": dict(timeline.breakdown),
        "step_by_action_s": dict(action_ledger(timeline, step.schedule)),
        "bubble_makespan_s": makespan.tolist(),
        "bubble_span_s": span.tolist(),
        "critical_path": {
            "terms": dict(path.terms),
            "seconds_by_rank": path.by_rank.tolist(),
            "ranks": np.unique(timeline.program.rank[path.ops]).tolist(),
            "ops": len(path.ops),
        },
        "memory_peak_bytes": step.memory.peak_bytes,
        "memory_peak_bytes_by_rank": [curve.peak_bytes for curve in step.memory_curves],
        "ops": len(step.program),
        "classes": len(step.program.classes),
        "lanes": step.prices.lanes,
        "schedule": step.schedule.name,
        "microbatches": step.layout.microbatches,
    }


def step_view(step: Step) -> RenderableType:
    """What ``moesim step`` prints."""
    return stacked((_terms(step), _ranks(step), _notes(step)))


def _terms(step: Step) -> RenderableType:
    """Terms of the mean rank beside those of the critical path."""
    timeline, total = step.timeline, step.seconds
    breakdown, path = timeline.breakdown, critical_path(timeline)
    names = sorted({*breakdown, *path.terms}, key=lambda name: (-breakdown.get(name, 0.0), -path.terms.get(name, 0.0)))
    rows = [
        (name, *(text for ledger in (breakdown, path.terms) for text in _shared(ledger.get(name, 0.0), total)))
        for name in names
    ]
    title = (
        f"{step.scenario.name}: one step of {number(total, 's')}, {len(step.program):,} ops, {step.engine} engine; "
        f"{len(path.ops):,} of the ops form the critical path"
    )
    return pairs_table(title, rows, "term", "mean rank", "share", "critical path", "share")


def _ranks(step: Step) -> RenderableType:
    """Every rank: the step by kind of action, the bubble in its own span, its part of the critical path, its memory."""
    timeline = step.timeline
    actions = {name: values.mean(axis=1) for name, values in by_action(timeline, step.schedule).items()}
    _, span = bubbles(timeline)
    path = critical_path(timeline).by_rank
    peaks = np.array([curve.peak_bytes for curve in step.memory_curves])
    columns = [*actions.values(), span, path]
    rows = [
        (str(rank), *(f"{column[rank]:.4g}" for column in columns), f"{peaks[rank] / GIB:.1f} GiB")
        for rank in range(step.program.ranks)
    ]
    means = [*(f"{values.mean():.4g}" for values in actions.values()), f"{span.mean():.4g}", ""]
    rows.append(("mean", *means, f"max {peaks.max() / GIB:.1f} GiB"))
    heads = [*actions, "bubble in own span", "on critical path", "peak memory"]
    return pairs_table("Pipeline ranks: seconds by kind of action (they sum to the step)", rows, "rank", *heads)


def _notes(step: Step) -> RenderableType:
    words = {
        "1F": "forward alone",
        "1B": "backward for the input alone",
        "1W": "for the weight alone",
        "1F1B": "overlapped pairs",
        "bubble": "until the next step of the schedule can start",
        "optimizer": "update, and gathers and reductions that nothing hides",
        "other": "overhead of the stack, slower replicas",
    }
    present = by_action(step.timeline, step.schedule)
    return Text("; ".join(f"{name}: {words[name]}" for name in ACTIONS if name in present), style="dim")


def _shared(value: float, total: float) -> tuple[str, str]:
    return (number(value, "s"), f"{value / total:.1%}") if value else ("", "")
