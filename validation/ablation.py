"""What each part of the physics is worth: published runs predicted again without it.

    curves    every kernel runs at one efficiency: no launch, no ramps, no tiles, no throttling
    overlap   all communication is exposed
    skew      every expert is as likely as any other
    stack     no stack term

Only complete rows are judged. As everywhere, the stack term of a run comes from the other layouts, fitted again without
the part that is missing: it takes over what a constant factor can.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel

from simulator.spec import Scenario
from simulator.spec.curves import Kernels
from simulator.spec.routing import BalancedLoad
from validation.evidence import sources
from validation.families import AT_SCALE
from validation.predictions import Prediction, as_the_others_say, predict, timed
from validation.stack import StackTerm

Part = Literal["curves", "overlap", "skew", "stack"]
PARTS: tuple[Part, ...] = get_args(Part)
FULL = "full"
_NONE = {
    "launch": 0.0,
    "per_expert": 0.0,
    "k_half": 0.0,
    "throttle_per_decade": 0.0,
    "wave_weight": 0.0,
    "tile_rows": 1,
    "tile": 1,
    "wgrad_rows_half": 0.0,
    "rows_half": 0.0,
    "columns_half": 0.0,
    "s_half": 0.0,
    "dgrad_scale": 1.0,
    "wgrad_scale": 1.0,
}
"""Values of a curve's parameters at which the rate does not depend on the shape."""


def without(part: Part, scenario: Scenario) -> Scenario:
    """The scenario without a part of the physics (the stack term is left to :func:`ablations`)."""
    if part == "curves":
        profile = scenario.cluster.profile
        stacks = {
            name: stack.model_copy(
                update={
                    "attention": {kind: _flat(curve) for kind, curve in stack.attention.items()},
                    "grouped_gemm": {form: _flat(curve) for form, curve in stack.grouped_gemm.items()},
                }
            )
            for name, stack in profile.stacks.items()
        }
        flat = profile.model_copy(update={"kernels": flattened(profile.kernels), "stacks": stacks})
        return scenario.model_copy(update={"cluster": scenario.cluster.model_copy(update={"profile": flat})})
    if part == "overlap":
        # Nothing is paired any more, so there is nothing to delay.
        split = scenario.parallelism.model_copy(update={"overlap": (), "delay_weight_gradients": True})
        return scenario.model_copy(update={"parallelism": split})
    if part == "skew" and scenario.routing.load.kind != "balanced":
        routing = scenario.routing.model_copy(update={"load": BalancedLoad(), "balance": ()})
        return scenario.model_copy(update={"routing": routing})
    return scenario


def flattened(kernels: Kernels) -> Kernels:
    """The same efficiencies at every shape."""
    curves = {
        name: {form: _flat(curve) for form, curve in getattr(kernels, name).items()}
        for name in ("gemm", "grouped_gemm", "attention")
    }
    return kernels.model_copy(update={**curves, "memory": _flat(kernels.memory)})


def _flat(curve: BaseModel) -> BaseModel:
    changed = {
        name: number.model_copy(update={"value": value})
        for name, value in _NONE.items()
        if (number := getattr(curve, name, None)) is not None
    }
    return curve.model_copy(update=changed)


def ablations(parts: Sequence[Part] = PARTS) -> dict[str, dict[str, Any]]:
    """MAPE of the step time by family, in percent, of the whole simulator and without each part."""
    runs = [
        (run, frozenset({name}))
        for source in sources()
        for run in source.runs()
        if run.complete and run.role == "fit" and (name := timed(run)) is not None
    ]
    base = predict(runs)
    found = {FULL: _errors(as_the_others_say(base))}
    for part in parts:
        if part == "stack":
            found[part] = _errors([each.under(StackTerm(0.0, 0.0)) for each in base])
            continue
        changed = [
            index
            for index, (run, _) in enumerate(runs)
            if without(part, scenario := run.at(next(run.points()))[0]) != scenario
        ]
        again = dict(
            zip(changed, predict([runs[index] for index in changed], change=partial(without, part)), strict=True)
        )
        found[part] = _errors(as_the_others_say([again.get(index, each) for index, each in enumerate(base)]))
    return {
        family: {part: errors[family] for part, errors in found.items() if family in errors} for family in found[FULL]
    }


def _errors(predictions: Sequence[Prediction]) -> Mapping[str, float]:
    """Mean absolute error of the step time by family, layouts weighing equally."""
    by_family: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in predictions:
        point = each.points[0] if each.points else None
        if point is None or point.published_s is None:
            continue
        families = [each.run.family]
        if each.is_moe and each.accelerators >= 64:
            families.append(AT_SCALE)
        for family in families:
            by_family[family][each.layout].append(abs(point.step_s / point.published_s - 1.0))
    return {
        family: 100.0 * float(np.mean([np.mean(errors) for errors in layouts.values()]))
        for family, layouts in sorted(by_family.items())
    }


__all__ = ["FULL", "PARTS", "Part", "ablations", "flattened", "without"]
