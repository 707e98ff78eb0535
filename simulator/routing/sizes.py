"""How many tokens and documents meet in one expert group."""

from __future__ import annotations

from simulator.spec.routing import LogitLoad
from simulator.spec.scenario import Scenario
from simulator.workload.slots import tokens_per_rank


def group_tokens(scenario: Scenario, stack: str = "decoder") -> int:
    """Distinct tokens of one microbatch in one expert group."""
    split = scenario.parallelism
    return max(1, round(tokens_per_rank(scenario, stack) * split.expert * split.expert_tensor))


def documents(scenario: Scenario, stack: str = "decoder") -> float:
    """Independent documents in one microbatch of one expert group."""
    load = scenario.routing.load
    if isinstance(load, LogitLoad) and load.documents != "auto":
        return float(load.documents)
    return max(1.0, group_tokens(scenario, stack) / scenario.training.length(stack))


__all__ = ["documents", "group_tokens", "tokens_per_rank"]
