"""moesim: what training a Mixture-of-Experts language model costs, and why.

The public API::

    from simulator import load_scenario, estimate, simulate_step, sweep

    result = estimate(load_scenario("deepseek-v3", overrides={"routing.capacity_factor": 1.25}))
    result.gpu_hours, result.as_dict()

Rooms, in the order in which data flows: spec, workload, schedules, layout, routing, memory, timing, program, events,
campaign, study, report, cli. Each imports only those before it. Names are loaded on first use, so that the command
line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulator.campaign import Step, TrainingEstimate, estimate, simulate_step
    from simulator.errors import InvalidInput, MoesimError, NotSimulated
    from simulator.spec import Scenario, load_model, load_profile, load_scenario
    from simulator.study import Row, compare, sweep

_HOMES = {
    "InvalidInput": "simulator.errors",
    "MoesimError": "simulator.errors",
    "NotSimulated": "simulator.errors",
    "Row": "simulator.study",
    "Scenario": "simulator.spec",
    "Step": "simulator.campaign",
    "TrainingEstimate": "simulator.campaign",
    "compare": "simulator.study",
    "estimate": "simulator.campaign",
    "load_model": "simulator.spec",
    "load_profile": "simulator.spec",
    "load_scenario": "simulator.spec",
    "simulate_step": "simulator.campaign",
    "sweep": "simulator.study",
}

__all__ = [
    "InvalidInput",
    "MoesimError",
    "NotSimulated",
    "Row",
    "Scenario",
    "Step",
    "TrainingEstimate",
    "compare",
    "estimate",
    "load_model",
    "load_profile",
    "load_scenario",
    "simulate_step",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its room."""
    if name not in _HOMES:
        raise AttributeError(f"module 'simulator' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Public names."""
    return __all__
