"""Expert load over training steps under each balancing strategy: what balances, how soon, and what it leaves over.

Every strategy starts from the same tendencies of the router (``routing.load``) and is looked at on the same draw of
documents and tokens, so that rows differ by strategy and step alone. No training step is simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from simulator.errors import NotSimulated
from simulator.layout import resolve
from simulator.routing import capacity, documents, group_tokens, over_steps
from simulator.routing.balance import cv, violation
from simulator.routing.load import MAX_COUNTS, draw
from simulator.routing.overflow import holders, slots
from simulator.routing.remedies import DEFAULT_GAMMA, DEFAULT_WEIGHT, Treated
from simulator.routing.tokens import dispersion
from simulator.spec import Scenario, vary
from simulator.spec.routing import Remedy

AS_STATED = "as stated"
STRATEGIES: Mapping[str, Sequence[dict[str, Any]]] = {
    "none": (),
    "importance loss": ({"kind": "importance"},),
    "load-balance loss": ({"kind": "load_balance"},),
    "bias": ({"kind": "bias"},),
}
"""Strategies that are compared with the scenario's own: the value of ``routing.balance`` by name."""
USUAL_CAPACITY_FACTOR = 1.25
"""Where a scenario has no capacity factor, its drops are shown at this one (Switch, arXiv 2101.03961)."""
MICROBATCHES = 8
"""Microbatches that are drawn for each row."""


@dataclass(frozen=True)
class LoadRow:
    """Load at one training step under one strategy; every number is a mean over the decoder's MoE layers.

    ``cv``, ``max_violation``: coefficient of variation and MaxVio of the expected load of a global batch, in which
    documents average out. ``batch_max_over_mean``: busiest expert over the mean in a microbatch of one expert group.
    ``dropped_fraction_at_capacity_factor``: share of that microbatch's assignments that ``capacity_factor`` drops, with
    one capacity for the whole expert group.
    """

    strategy: str
    step: int
    cv: float
    max_violation: float
    batch_max_over_mean: float
    capacity_factor: float
    dropped_fraction_at_capacity_factor: float

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


def load_over_steps(
    scenario: Scenario, steps: Sequence[int], strategies: Mapping[str, Sequence[dict[str, Any]]] | None = None
) -> list[LoadRow]:
    """Load at each of the training steps under each strategy (name to ``routing.balance``), strategy by strategy.

    Without ``strategies``: the scenario's own, unless it is one of :data:`STRATEGIES`, and those.

    Raises:
        InvalidInput: a strategy breaks a law.
        NotSimulated: a dense model, a recorded load, experts that choose their tokens, or a hash router.
    """
    moe = scenario.model.moe
    if moe is not None and moe.router.kind == "expert_choice":
        raise NotSimulated("model.moe.router.kind: experts that choose their tokens are equally loaded at every step")
    if moe is not None and moe.router.kind == "hash":
        raise NotSimulated("model.moe.router.kind: the load of a hash router is that of its table at every step")
    varied = {
        name: vary(scenario, {"routing.balance": list(remedies)}, f"strategy {name!r},")
        for name, remedies in (STRATEGIES if strategies is None else strategies).items()
    }
    if strategies is None and not any(_same(scenario, each) for each in varied.values()):
        varied = {AS_STATED: scenario, **varied}
    layout = resolve(scenario)
    return [
        _row(name, step, each, treated)
        for name, each in varied.items()
        for step, (treated, _) in zip(steps, over_steps(each, layout, steps), strict=True)
    ]


def about_nine(last: int) -> list[int]:
    """Round training steps from 0 to ``last``: five to ten equal strides, and what is left.

    >>> about_nine(1000)[:3], about_nine(150), about_nine(3)
    ([0, 100, 200], [0, 20, 40, 60, 80, 100, 120, 140, 150], [0, 1, 2, 3])
    """
    ones = 10 ** max(0, len(str(last)) - 2)
    strides = [factor * ones for factor in (1, 2, 5, 10)] if last >= 10 else [1]
    stride = next(stride for stride in strides if last <= 10 * stride)
    return sorted({*range(0, last, stride), last})


def _same(scenario: Scenario, other: Scenario) -> bool:
    """Whether two scenarios are balanced alike, with the weights of the papers filled in."""
    return _filled(scenario.routing.balance) == _filled(other.routing.balance)


def _filled(remedies: Sequence[Remedy]) -> list[tuple[str, float]]:
    strengths = [
        (each.gamma, DEFAULT_GAMMA) if each.kind == "bias" else (each.weight, DEFAULT_WEIGHT[each.kind])
        for each in remedies
    ]
    known = (usual if stated is None else stated for stated, usual in strengths)
    return sorted(zip((each.kind for each in remedies), known, strict=True))


def _row(name: str, step: int, scenario: Scenario, treated: Treated) -> LoadRow:
    """Measure the load at one step: expected over a global batch, and drawn for some microbatches."""
    moe, routing = scenario.model.moe, scenario.routing
    assert moe is not None  # over_steps refuses dense models
    of_documents, of_tokens = np.random.default_rng([routing.seed, 2]).spawn(2)  # the same at every step
    expected = treated.chances(1, 1e9, of_documents)[0]
    draws = max(1, min(MICROBATCHES, MAX_COUNTS // expected.size))
    chances = treated.chances(draws, documents(scenario), of_documents)
    chances = np.broadcast_to(chances, (draws, *expected.shape))
    tokens = group_tokens(scenario)
    spread = dispersion(treated.tendencies, of_documents)
    assigned = draw(chances, tokens, moe.top_k, of_tokens, dispersion=spread)  # [microbatches, layers, experts]
    factor = _capacity_factor(scenario)
    outcome = capacity.apply(
        assigned,
        slots(scenario, factor, tokens),
        overflow=routing.overflow,
        exempt=routing.exempt_sequence_fraction,
        holders=holders(scenario),
    )
    return LoadRow(
        strategy=name,
        step=step,
        cv=float(cv(expected).mean()),
        max_violation=float(violation(expected).mean()),
        batch_max_over_mean=float(violation(assigned).mean()) + 1.0,
        capacity_factor=factor,
        dropped_fraction_at_capacity_factor=float(outcome.dropped.sum() / assigned.sum()),
    )


def _capacity_factor(scenario: Scenario) -> float:
    moe, stated = scenario.model.moe, scenario.routing.capacity_factor
    if stated == "model":
        stated = moe.capacity_factor if moe is not None else None
    return USUAL_CAPACITY_FACTOR if stated is None else stated


__all__ = ["AS_STATED", "STRATEGIES", "LoadRow", "about_nine", "load_over_steps"]
