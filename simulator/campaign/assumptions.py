"""What an estimate takes for granted, in sentences: shown with every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from simulator.campaign.step import Step
from simulator.events import slowness
from simulator.routing.drawing import known_steps
from simulator.routing.replay import recorded_steps
from simulator.spec import Scenario
from simulator.spec.fields import sourced_numbers
from simulator.spec.model import MixtureOfExperts
from simulator.spec.routing import BalancedLoad, LogitLoad, Remedy, ReplayLoad


def assumptions(step: Step) -> list[str]:
    """What the estimate of a step takes for granted."""
    scenario, load = step.scenario, step.load
    stated = ["no failures, restarts or reserved idle time: GPU-hours are those of uninterrupted training"]
    stated += _assumed_numbers(scenario)
    if load is not None:
        groups = step.layout.expert_data
        if groups > 1:
            moe, kind = scenario.model.moe, str(scenario.routing.load.kind)
            if moe is not None and moe.router.kind == "hash" and kind == "balanced":
                kind = "of the hash router's table under Zipf's law"
            stated.append(f"expert load {kind}: one expert group stands for all {groups} of a stage")
        if scenario.parallelism.expert > 1 and scenario.routing.merges:
            stated.append("a token travels once to each node and rank that holds its experts (DeepEP-type dispatch)")
        if load.dropped_fraction > 0.0:
            stated.append("MFU counts dropped assignments as done; HFU does not")
        drawn = load.assigned.shape[0]
        if drawn < step.layout.microbatches:
            stated.append(f"loads of {drawn} microbatches are drawn and repeated over {step.layout.microbatches}")
        if isinstance(scenario.routing.load, ReplayLoad):
            stated += _replayed(scenario, recorded_steps(scenario.routing.load), drawn)
    stated += _routing(scenario)
    stated += _disturbed(step)
    split = scenario.parallelism
    if split.pipeline > 1 and split.tensor > 1 and not split.sequence_parallel:
        stated.append("tensor-parallel ranks each send their share to the next stage, which gathers (Megatron-LM)")
    if scenario.model.encoder is not None:
        stated.append("tokens are encoder tokens; the decoder's work is spread over them")
    if step.engine == "max-plus":
        stated.append("max-plus engine: no two transfers share a link")
    return stated


def _disturbed(step: Step) -> Iterator[str]:
    """What is assumed about slow ranks and links and about kernel jitter."""
    scenario, layout = step.scenario, step.layout
    slow = slowness(scenario, layout)
    if slow is not None:
        count = len(scenario.cluster.faults)
        lasting = "1 fault lasts" if count == 1 else f"{count} faults last"
        yield f"{lasting} the whole training; the expert group played for each stage is the slowest one"
        if slow.combined:
            yield "faults of several replicas are played as if they were in one: the worst of each lane, an upper bound"
    jitter = scenario.cluster.profile.jitter
    if jitter is not None and jitter.value > 0.0:
        yield f"kernel times vary by {jitter.value:.2g} between ranks, every kernel independently"
        if layout.expert_data > 1:
            yield f"the wait for the slowest of {layout.expert_data} replicas is an expected value"


def _assumed_numbers(scenario: Scenario) -> Iterator[str]:
    """How many numbers of the profile are assumed rather than measured, fitted or printed, and of what they are."""
    kinds = [(path.split(".")[0], number.kind) for path, number in sourced_numbers(scenario.cluster.profile)]
    assumed = Counter(part for part, kind in kinds if kind == "assumed")
    if assumed:
        parts = ", ".join(f"{count} in {part}" for part, count in assumed.most_common())
        yield (
            f"{assumed.total()} of the {len(kinds)} numbers of profile {scenario.profile_name} are assumed, not "
            f"measured ({parts}); moesim profiles {scenario.profile_name} shows which"
        )


def _routing(scenario: Scenario) -> Iterator[str]:
    """What is assumed about the load of the experts, its balancing and where experts are."""
    moe, routing = scenario.model.moe, scenario.routing
    if moe is None:
        return
    load, kinds = routing.load, [remedy.kind for remedy in routing.balance]
    if moe.router.kind == "expert_choice":
        stated = not isinstance(load, BalancedLoad) or kinds
        yield "experts that choose their tokens are equally loaded" + (
            ": routing.load and routing.balance do not act" if stated else ""
        )
    elif isinstance(load, ReplayLoad):
        ignored = "; routing.balance does not act on it" if kinds else ""
        yield f"remedies are part of a recorded load{ignored}"
    else:
        acting = [remedy.kind for remedy in routing.balance if _acts(remedy, moe)]
        if acting and isinstance(load, BalancedLoad):
            yield f"the stated load is balanced: it leaves {_listed(acting)} nothing to do"
        elif acting:
            law = "; losses shrink popularity by a law fitted to published loads" if set(acting) - {"bias"} else ""
            yield f"remedies that act on the stated load: {_listed(acting)}{law}"
        still = [remedy.kind for remedy in routing.balance if remedy.kind != "z" and not _acts(remedy, moe)]
        if still:
            yield f"remedies without an effect on the load: {_listed(still)}"
        if "z" in kinds:
            yield "the router z-loss has no effect on the load"
        grows = isinstance(load, LogitLoad) and load.growth is not None
        biased = "bias" in acting and not isinstance(load, BalancedLoad)
        if (grows or biased) and routing.at_step is None:
            yield "the load is that of the settled router; the first steps are left out"
    if routing.placement.redundant_experts:
        yield (
            "redundant experts: weights and gradients are counted on every rank that holds a copy; the sum of the "
            "gradients between the copies is not timed"
        )
    if moe.router.second_choice == "random":
        yield "second choices that the router makes at random are all counted"


def _replayed(scenario: Scenario, steps: int, drawn: int) -> Iterator[str]:
    """Which recorded steps stand for the microbatches that are drawn, and which a placement knows."""
    known = known_steps(scenario, steps)
    run = steps - known
    used = f"{drawn} of {run} recorded steps, evenly spaced," if run > drawn else f"{run} recorded steps"
    again = f", repeated over {drawn}" if run < drawn else ""
    before = f"; experts are placed after the {known} steps before" if known else ""
    if run == 1:
        yield f"one recorded step stands for every microbatch{before}"
    else:
        yield f"{used} stand for the microbatches{again}{before}"
    if not known and scenario.routing.placement.kind == "balanced":
        yield "experts are placed after the very step that is run, the only one recorded: no placement does better"


def _acts(remedy: Remedy, moe: MixtureOfExperts) -> bool:
    """Whether a remedy changes the load: not at strength 0, nor between devices where there is but one."""
    if remedy.kind == "z" or 0.0 in (remedy.weight, remedy.gamma):
        return False
    return remedy.kind not in ("device", "communication") or moe.router.groups > 1


def _listed(kinds: Sequence[str]) -> str:
    names = {"load_balance": "load-balance loss", "bias": "bias", "sequence": "sequence-wise loss"}
    return ", ".join(names.get(kind, f"{kind} loss") for kind in kinds)
