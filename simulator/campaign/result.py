"""The answer: one object with every number of an estimate, and its JSON form (the contract of the command line)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from simulator.campaign.assumptions import assumptions
from simulator.campaign.step import Step
from simulator.campaign.uncertainty import interval
from simulator.events import BUBBLE
from simulator.layout import Layout
from simulator.routing import ExpertLoad
from simulator.spec import Scenario, profile_sha256
from simulator.spec.fields import ELEMENT_BYTES
from simulator.workload import Ledger, flops, parameters

SCHEMA_VERSION = 1
SECONDS_PER_HOUR, SECONDS_PER_DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class TrainingEstimate:
    """What one training run costs, and why. Times in seconds, sizes in bytes, rates per accelerator (chip)."""

    step: Step
    later_steps: tuple[tuple[str, Step], ...]
    phase_gpu_hours: Ledger
    phase_seconds: Ledger
    price_usd_per_hour: float
    flop: flops.FlopCounts
    counts: parameters.ParameterCounts
    all_to_all_bytes: Ledger
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def scenario(self) -> Scenario:
        """The resolved scenario."""
        return self.step.scenario

    @property
    def gpu_hours(self) -> float:
        """Accelerator-hours of all phases."""
        return self.phase_gpu_hours.total

    @property
    def gpu_hours_interval(self) -> tuple[float, float] | None:
        """80 % interval of the accelerator-hours by the signed errors of published runs; None without evidence."""
        return interval(self.scenario, self.gpu_hours)

    @property
    def days(self) -> float:
        """Duration of all phases."""
        return self.phase_seconds.total / SECONDS_PER_DAY

    @property
    def cost_usd(self) -> float:
        """Accelerator-hours times their price."""
        return self.gpu_hours * self.price_usd_per_hour

    @property
    def step_time_s(self) -> float:
        """Duration of one step at the steady batch."""
        return self.step.seconds

    @property
    def tokens_per_s_per_accelerator(self) -> float:
        """Counted tokens per second and chip at the steady batch."""
        training = self.scenario.training
        tokens = training.steady_batch_sequences * training.tokens_per_sequence
        return tokens / self.step_time_s / self.scenario.cluster.accelerators

    @property
    def peak_flop_per_s(self) -> float:
        """Dense BF16 peak of one chip: the denominator of MFU."""
        return float(self.scenario.cluster.profile.accelerator.peak["bf16"].value)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, causal."""
        return self.flop.model_flop_per_token * self.tokens_per_s_per_accelerator / self.peak_flop_per_s

    @property
    def mfu_noncausal(self) -> float:
        """Model FLOPs utilisation with the whole attention matrix counted."""
        return self.flop.model_flop_per_token_noncausal * self.tokens_per_s_per_accelerator / self.peak_flop_per_s

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: router, MTP and recomputation counted too."""
        return self.flop.hardware_flop_per_token * self.tokens_per_s_per_accelerator / self.peak_flop_per_s

    @property
    def breakdown(self) -> Ledger:
        """Step time by term, mean over ranks."""
        return self.step.timeline.breakdown

    @property
    def exposed(self) -> float:
        """Communication that no compute hides."""
        return sum(value for name, value in self.breakdown.items() if name.startswith("exposed_"))

    @property
    def memory_limit_bytes(self) -> float:
        """Memory that a rank can allocate: the profile's reserve taken off."""
        chip = self.scenario.cluster.profile.accelerator
        return chip.memory_bytes.value * chip.usable_fraction.value / chip.ranks_per_accelerator

    @property
    def fits(self) -> bool:
        """Whether the worst rank fits into the usable memory, in every phase."""
        steps = (self.step, *(step for _, step in self.later_steps))
        return all(step.memory.peak_bytes <= self.memory_limit_bytes for step in steps)

    def as_dict(self) -> dict[str, Any]:
        """Plain data with the keys of the contract."""
        step, load = self.step, self.step.load
        return {
            "schema_version": SCHEMA_VERSION,
            "simulator_version": simulator_version(),
            "name": self.scenario.name,
            "engine": step.engine,
            "seed": self.scenario.routing.seed,
            "scenario": self.scenario.as_dict(),
            "profile": self.scenario.profile_name,
            "profile_sha256": profile_sha256(self.scenario.cluster.profile),
            "stack": self.scenario.cluster.stack_name,
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "gpu_hours": self.gpu_hours,
            "gpu_hours_interval": None if (likely := self.gpu_hours_interval) is None else list(likely),
            "gpu_hours_by_phase": dict(self.phase_gpu_hours),
            "days": self.days,
            "cost_usd": self.cost_usd,
            "tokens_per_s_per_accelerator": self.tokens_per_s_per_accelerator,
            "step_time_s": self.step_time_s,
            "step_breakdown_s": dict(self.breakdown),
            "bubble_s": self.breakdown.get(BUBBLE, 0.0),
            "exposed_communication_s": self.exposed,
            "model_flop_per_token": self.flop.model_flop_per_token,
            "model_flop_per_token_noncausal": self.flop.model_flop_per_token_noncausal,
            "mfu": self.mfu,
            "mfu_noncausal": self.mfu_noncausal,
            "mfu_peak_flop_per_s": self.peak_flop_per_s,
            "hfu": self.hfu,
            "parameters_total": self.counts.total.total,
            "parameters_active": self.counts.active.total,
            "parameters_active_excl_input_embedding": self.counts.active_excl_input_embedding,
            "parameters_mtp": self.counts.mtp,
            "memory_peak_bytes": step.memory.peak_bytes,
            "memory_breakdown_bytes": dict(step.memory.terms),
            "memory_limit_bytes": self.memory_limit_bytes,
            "memory_worst_rank": step.memory.rank,
            "fits": self.fits,
            "dropped_token_fraction": load.dropped_fraction if load else 0.0,
            "dropped_token_fraction_by_position": load.drop_profile.tolist() if load else [],
            "dropped_token_fraction_evaluation": load.dropped_fraction_evaluation if load else 0.0,
            "lost_token_fraction": load.lost_fraction if load else 0.0,
            "padding_fraction": load.padding_fraction if load else 0.0,
            "expert_load_max_over_mean": load.max_over_mean if load else 1.0,
            "expert_rank_load_max_over_mean": load.rank_max_over_mean if load else 1.0,
            "all_to_all_bytes_per_token": self.all_to_all_bytes.total,
            "all_to_all_bytes_per_token_by_tier": dict(self.all_to_all_bytes),
            "pipeline_stages": [[step.layout.blocks[i].name for i in stage] for stage in step.layout.stages],
            "microbatches": step.layout.microbatches,
        }


def describe(
    step: Step, phase_seconds: dict[str, float], later_steps: Sequence[tuple[str, Step]] = ()
) -> TrainingEstimate:
    """Collect everything that an estimate says about a step and its run."""
    scenario = step.scenario
    price = scenario.cost.price_per_accelerator_hour
    if price is None:
        market = scenario.cluster.profile.price
        assert market is not None  # a law of the scenario
        price = market.usd_per_hour
    seconds = Ledger(phase_seconds)
    result = TrainingEstimate(
        step=step,
        later_steps=tuple(later_steps),
        phase_gpu_hours=seconds.scaled(scenario.cluster.accelerators / SECONDS_PER_HOUR),
        phase_seconds=seconds,
        price_usd_per_hour=price,
        flop=flops.count(scenario, step.layout.stages, computed_rows=_computed_rows(step.load)),
        counts=parameters.count(scenario.model),
        all_to_all_bytes=all_to_all_bytes_per_token(scenario, step.layout, step.load),
        assumptions=tuple(assumptions(step)),
        warnings=(),
    )
    return TrainingEstimate(**{**result.__dict__, "warnings": tuple(_warnings(result))})


def _computed_rows(load: ExpertLoad | None) -> float:
    """Expert rows computed over those assigned."""
    return float(load.computed.sum()) / max(1.0, float(load.assigned.sum())) if load is not None else 1.0


def all_to_all_bytes_per_token(scenario: Scenario, layout: Layout, load: ExpertLoad | None) -> Ledger:
    """Bytes that one token's expert exchanges put on each tier in a step, forward and backward, all MoE layers."""
    moe = scenario.model.moe
    if moe is None or load is None:
        return Ledger()
    precision, training = scenario.training.precision, scenario.training
    moe_stacks = [block.stack for block in layout.blocks if block.is_moe]
    layers = sum(training.length(stack) / training.tokens_per_sequence for stack in moe_stacks)
    size = 2.0 * (ELEMENT_BYTES[precision.dispatch] + ELEMENT_BYTES[precision.combine]) * scenario.model.hidden_size
    volume = float(load.computed.sum()) / max(1.0, float(load.assigned.sum()))
    tiers = scenario.cluster.profile.tiers
    copies = load.copies_by_tier(moe, layout.spans["expert"].ways, merged=scenario.routing.merges)
    return Ledger({tiers[index].name: number * size * volume * layers for index, number in copies})


def simulator_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("moesim")
    except PackageNotFoundError:
        return "0+unknown"


def _warnings(result: TrainingEstimate) -> list[str]:
    found = []
    limit = result.memory_limit_bytes
    for name, step in (("", result.step), *result.later_steps):
        if step.memory.peak_bytes > limit:
            phase = f"phase {name} " if name else ""
            found.append(
                f"{phase}does not fit: rank {step.memory.rank} needs {step.memory.peak_bytes / 2**30:.1f} GiB of "
                f"{limit / 2**30:.1f} GiB usable; the largest terms are {', '.join(_largest(step.memory.terms))}"
            )
    scenario = result.scenario
    longest = scenario.training.tokens_per_sequence
    if longest > scenario.model.context:
        found.append(f"sequences of {longest} tokens exceed the model's context of {scenario.model.context}")
    if result.step.load is not None and result.step.load.dropped_fraction > 0.2:
        found.append(f"{result.step.load.dropped_fraction:.0%} of the expert assignments are dropped")
    return found


def _largest(terms: Ledger) -> list[str]:
    ordered = sorted(terms.items(), key=lambda item: -item[1])[:3]
    return [f"{name} {value / 2**30:.1f} GiB" for name, value in ordered]
