"""A long training step from two shorter ones: what a pipeline does in its middle, it does again and again.

With loads that are the same in every microbatch, a schedule that keeps few microbatches in flight repeats itself after
its warm-up: each further round of as many microbatches as there are pipeline ranks takes the same time, so that

    T(M) = T(M2) + (M - M2) / (M2 - M1) (T(M2) - T(M1)),       M > M2 > M1 beyond the warm-up,

and every term of the breakdown likewise, but for how a pause divides into bubble and sends on their way; memory does
not grow any more. Published runs have up to 512 microbatches on 8 stages. Where all experts are equally likely,
microbatches differ by chance alone: more rounds are played, and their mean stands for the others. Other loads, jitter,
DualPipe, and schedules that keep all microbatches (GPipe) are played to the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simulator.campaign import Step, simulate_step
from simulator.spec import EngineName, Scenario

Readable = Callable[[Step], float]
WARM_UP_ROUNDS = {True: 1, False: 3}
"""Rounds of the first short step, with a pipeline and without."""
DRAWN_ROUNDS = 2
"""Further rounds of the second one, where loads are drawn: their mean stands for the others."""
REPEATS = frozenset({"1f1b", "interleaved"})


@dataclass(frozen=True)
class Played:
    """A step as the weighted sum of the steps that were simulated: the whole one, or two short ones.

    ``longest``: the simulated step with most microbatches, for all that does not grow with them.
    """

    scenario: Scenario
    parts: tuple[tuple[float, Step], ...]

    @property
    def longest(self) -> Step:
        """The simulated step with most microbatches."""
        return self.parts[0][1]

    def total(self, of: Readable) -> float:
        """Anything that adds up over microbatches, from what it is in the simulated steps."""
        return sum(weight * of(step) for weight, step in self.parts)

    @property
    def seconds(self) -> float:
        """Duration of the step."""
        return self.total(lambda step: step.seconds)

    @property
    def breakdown(self) -> dict[str, float]:
        """Every term of the step time."""
        ledgers = [(weight, step.timeline.breakdown) for weight, step in self.parts]
        names = dict.fromkeys(name for _, ledger in ledgers for name in ledger)
        return {name: sum(weight * dict(ledger).get(name, 0.0) for weight, ledger in ledgers) for name in names}


def played(scenario: Scenario, engine: EngineName) -> Played:
    """Simulate a step, as two short ones where that is the same.

    Raises:
        InvalidInput: the layout cannot be formed.
        NotSimulated: the scenario asks for something that no room models yet.
    """
    found = shortened(scenario, engine, only_if=repeats)
    if found is None and scenario.routing.load.kind == "balanced":
        found = shortened(scenario, engine, further=DRAWN_ROUNDS, only_if=lambda step: step.prices.noise is None)
    return Played(scenario, ((1.0, simulate_step(scenario, engine)),)) if found is None else found


def shortened(
    scenario: Scenario, engine: EngineName, *, further: int = 1, only_if: Callable[[Step], bool] = lambda _: True
) -> Played | None:
    """A step as two short ones, ``further`` rounds apart; None where it is short itself or does not repeat.

    ``only_if``: what the first short step has to fulfil.
    """
    rounds = _rounds(scenario)
    first = WARM_UP_ROUNDS[scenario.parallelism.pipeline > 1]
    if rounds is None or rounds <= 2 * first + further:
        return None
    shorter = simulate_step(_of_rounds(scenario, first, rounds), engine)
    if not only_if(shorter):
        return None
    longer = simulate_step(_of_rounds(scenario, first + further, rounds), engine)
    more = (rounds - first - further) / further
    return Played(scenario, ((1.0 + more, longer), (-more, shorter)))


def repeats(step: Step) -> bool:
    """Whether all microbatches cost the same."""
    rows = None if step.load is None else step.load.computed
    return step.prices.noise is None and (rows is None or bool((rows == rows[:1]).all()))


def _rounds(scenario: Scenario) -> int | None:
    """Microbatches of a step over pipeline ranks; None where a step cannot be shortened."""
    split, training = scenario.parallelism, scenario.training
    ranks = scenario.cluster.accelerators * scenario.cluster.profile.accelerator.ranks_per_accelerator
    data = ranks // (split.pipeline * split.tensor * split.context)
    sequences = training.global_batch_sequences
    each = training.micro_batch_sequences * data * split.pipeline
    if split.schedule not in REPEATS or not isinstance(sequences, int) or sequences % each:
        return None
    return sequences // each


def _of_rounds(scenario: Scenario, rounds: int, of: int) -> Scenario:
    sequences = scenario.training.steady_batch_sequences * rounds // of
    training = scenario.training.model_copy(update={"global_batch_sequences": sequences})
    return scenario.model_copy(update={"training": training})


__all__ = ["Played", "played", "repeats", "shortened"]
