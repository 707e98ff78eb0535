"""Laws of routing: what router, capacity, load, placement of experts and the list of remedies ask of each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simulator.errors import Problem
from simulator.spec.model import MixtureOfExperts
from simulator.spec.routing import Remedy
from simulator.spec.scenario import Scenario


def broken(scenario: Scenario) -> Iterator[Problem]:
    """Every law of routing that the scenario breaks."""
    if scenario.model.moe is not None:
        yield from _router(scenario.model.moe)
    yield from _capacity(scenario)
    yield from _hot_experts(scenario)
    yield from _placement(scenario)
    yield from _remedies(scenario.routing.balance)
    yield from _hash_router(scenario)


def _router(moe: MixtureOfExperts) -> Iterator[Problem]:
    router = moe.router
    if moe.experts % router.groups:
        yield Problem("model.moe.router.groups", f"{moe.experts} experts do not divide into {router.groups} groups")
    if router.group_limit and router.group_limit > router.groups:
        yield Problem(
            "model.moe.router.group_limit", f"{router.group_limit} groups, but there are only {router.groups}"
        )
    if router.group_limit and router.group_limit * (moe.experts // router.groups) < moe.top_k:
        reach = router.group_limit * (moe.experts // router.groups)
        yield Problem(
            "model.moe.router.group_limit",
            f"{router.group_limit} groups hold {reach} experts, fewer than top_k {moe.top_k}",
        )
    if router.branching is not None:
        root = round(moe.top_k**0.5)
        if moe.experts % router.branching:
            yield Problem(
                "model.moe.router.branching", f"{moe.experts} experts do not divide into {router.branching} groups"
            )
        if root * root != moe.top_k:
            yield Problem(
                "model.moe.router.branching", f"two levels choose a square number of experts, not top_k {moe.top_k}"
            )


def _capacity(scenario: Scenario) -> Iterator[Problem]:
    routing, moe = scenario.routing, scenario.model.moe
    if routing.pad_to_capacity and routing.capacity_factor is None:
        yield Problem("routing.pad_to_capacity", "padding needs routing.capacity_factor")
    if routing.dispatch == "one_hot":
        yield from _one_hot(scenario)
    if routing.capacity_factor == "model" and (moe is None or moe.capacity_factor is None):
        yield Problem("routing.capacity_factor", "the model preset states no capacity factor; give a number or null")
    if routing.capacity_factor_evaluation == "model" and (moe is None or moe.capacity_factor_evaluation is None):
        yield Problem(
            "routing.capacity_factor_evaluation", "the model preset states no evaluation factor; give a number or null"
        )
    if routing.capacity_group_tokens == "model" and (moe is None or moe.capacity_group_tokens is None):
        yield Problem("routing.capacity_group_tokens", "the model preset states no group size; give a number or auto")


def _one_hot(scenario: Scenario) -> Iterator[Problem]:
    """A mask has a fixed shape [tokens, experts, slots] and tokens of one rank: all slots are computed, no more."""
    routing, moe = scenario.routing, scenario.model.moe
    over = moe.capacity_over if moe is not None and routing.capacity_over == "model" else routing.capacity_over
    if routing.capacity_factor is None:
        yield Problem("routing.dispatch", "one_hot needs routing.capacity_factor; dropless routing has dispatch gather")
        return
    if not routing.pad_to_capacity:
        yield Problem("routing.dispatch", "one_hot computes every slot; set routing.pad_to_capacity: true")
    if routing.capacity_group_tokens == "auto" and routing.capacity_scope != "rank":
        yield Problem(
            "routing.dispatch",
            "a one_hot mask spans tokens of one rank; set routing.capacity_scope: rank or capacity_group_tokens",
        )
    if over == "device":
        yield Problem("routing.dispatch", "one_hot has slots of experts, not of devices; set capacity_over: expert")
    if routing.overflow == "none" or routing.exempt_sequence_fraction > 0:
        yield Problem(
            "routing.dispatch",
            "one_hot has no slot for what is over capacity; set overflow to drop or reroute and "
            "exempt_sequence_fraction to 0",
        )


def _hot_experts(scenario: Scenario) -> Iterator[Problem]:
    load, moe = scenario.routing.load, scenario.model.moe
    hot = load.hot_experts if load.kind == "logits" else None
    if hot is None or moe is None:
        return
    most = moe.experts / max(moe.top_k, hot.count)  # a token chooses an expert once, and there are so many tokens
    if hot.count >= moe.experts:
        yield Problem("routing.load.hot_experts.count", f"{hot.count} hot experts, but there are {moe.experts}")
    elif hot.load > most:
        yield Problem(
            "routing.load.hot_experts.load", f"{hot.load:g} times the mean; {hot.count} experts can have {most:.4g}"
        )


def _placement(scenario: Scenario) -> Iterator[Problem]:
    placement, ranks, moe = scenario.routing.placement, scenario.parallelism.expert, scenario.model.moe
    if placement.redundant_experts and placement.kind != "balanced":
        yield Problem("routing.placement.redundant_experts", "copies of experts need placement kind balanced")
    if moe is not None and placement.redundant_experts and (moe.experts + placement.redundant_experts) % ranks:
        slots = moe.experts + placement.redundant_experts
        yield Problem(
            "routing.placement.redundant_experts",
            f"{moe.experts} experts and {placement.redundant_experts} copies make {slots} slots, which do not divide "
            f"over {ranks} expert ranks; nearest: {-(-slots // ranks) * ranks - moe.experts}",
        )


def _remedies(remedies: Sequence[Remedy]) -> Iterator[Problem]:
    kinds = [remedy.kind for remedy in remedies]
    for kind in dict.fromkeys(kind for kind in kinds if kinds.count(kind) > 1):
        yield Problem("routing.balance", f"{kind} is there {kinds.count(kind)} times; a mechanism acts once")
    for index, remedy in enumerate(remedies):
        if remedy.kind == "bias" and remedy.weight is not None:
            yield Problem(f"routing.balance.{index}.weight", "the bias has no weight; its step is gamma")
        if remedy.kind != "bias" and remedy.gamma is not None:
            yield Problem(f"routing.balance.{index}.gamma", f"a loss has no step; {remedy.kind} has a weight")


def _hash_router(scenario: Scenario) -> Iterator[Problem]:
    """A hash router has no gate: its table and the text make the load, and nothing can balance it."""
    moe, routing = scenario.model.moe, scenario.routing
    if moe is None or moe.router.kind != "hash":
        return
    if routing.balance:
        yield Problem("routing.balance", "a hash router has no gate that a remedy could balance; leave it empty")
    if routing.load.kind not in ("balanced", "replay"):
        yield Problem(
            "routing.load.kind",
            f"{routing.load.kind}: the load of a hash router is that of its table under Zipf's law; leave routing.load "
            "out, or replay a record",
        )
