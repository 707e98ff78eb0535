"""Predictions against evidence, signed.

error = predicted / published - 1. Quantities that are a ratio of others (GPU-hours per trillion tokens) are formed
from the estimate here, so that evidence can be written as its source prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simulator import TrainingEstimate, estimate, load_scenario
from simulator.spec import EngineName
from validation.evidence import PublishedRun, published_runs


def against_published(scenario: str, result: TrainingEstimate) -> list[dict[str, Any]]:
    """Rows of prediction and publication; empty unless the estimate is of the shipped scenario as it is.

    A changed scenario, or another one of the same name, is not what was published.
    """
    return [
        row
        for run in published_runs()
        if run.scenario == scenario and result.scenario == load_scenario(scenario)
        for row in _rows(run, result)
    ]


def judge(names: Sequence[str] = (), engine: EngineName = "events") -> list[dict[str, Any]]:
    """Estimate every published run and compare; one check per quantity."""
    checks = []
    for run in published_runs():
        if run.scenario is None or (names and run.scenario not in names):
            continue
        result = estimate(load_scenario(run.scenario), engine)
        for row in _rows(run, result):
            checks.append(
                {
                    "group": "runs",
                    "name": f"{run.scenario}: {row['quantity']}",
                    "expected": row["published"],
                    "reached": row["predicted"],
                    "unit": row["unit"],
                    "tolerance": None,
                    "ok": None,
                    "source": row["source"],
                    "family": run.family,
                    "complete": run.complete,
                    "engine": engine,
                    "error_percent": row["error_percent"],
                    "baseline_error_percent": None,
                }
            )
    return checks


def summary(checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Errors by family: mean absolute, median, 90th percentile and bias, in percent."""
    families: dict[str, list[float]] = {}
    for check in checks:
        families.setdefault(check["family"], []).append(float(check["error_percent"]))
    result = {}
    for family, errors in families.items():
        size = sorted(abs(error) for error in errors)
        result[family] = {
            "checks": len(errors),
            "mape": sum(size) / len(size),
            "median": size[len(size) // 2] if len(size) % 2 else (size[len(size) // 2 - 1] + size[len(size) // 2]) / 2,
            "p90": size[min(len(size) - 1, int(0.9 * len(size)))],
            "bias": sum(errors) / len(errors),
            "interval_coverage": None,
        }
    return result


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
