"""Speed, measured and printed; never a gate. ``make bench``.

Whole processes are timed as a user meets them, inner parts in one process. Best of several, because a shared machine
only ever adds time. Ratios are taken within one run.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from simulator.campaign import simulate_step
from simulator.events import evaluate, play
from simulator.events.max_plus import forget_plans
from simulator.layout import resolve
from simulator.program import build, schedule_of
from simulator.routing import expert_load
from simulator.routing.load import draw, inclusion
from simulator.routing.tendencies import Tendencies
from simulator.routing.tokens import block
from simulator.spec import load_scenario
from simulator.spec.model import Router
from simulator.timing import Pricer

SCENARIO = "deepseek-v3"


def best(action: Callable[[], object], times: int) -> float:
    """Shortest of several runs, in seconds."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        action()
        found.append(time.perf_counter() - begin)
    return min(found)


def process(*arguments: str) -> Callable[[], object]:
    """A whole `moesim` process."""
    command = [sys.executable, "-m", "simulator.cli", *arguments]
    return lambda: subprocess.run(command, check=False, capture_output=True)


def counts() -> object:
    """Counts of 58 layers x 64 ranks x 256 experts, 62 500 tokens per rank."""
    rng = np.random.default_rng(0)
    weights = np.exp(0.5 * rng.standard_normal((58, 1, 256)))
    chances = inclusion(weights / weights.sum(-1, keepdims=True), 8)
    return draw(np.repeat(chances, 64, axis=1), 62_500, 8, rng)


def tokens() -> object:
    """One layer token by token: 20 000 tokens choose 8 of 256 experts."""
    even = Tendencies(np.zeros((1, 256)), 8)
    return block(even, 0, 20_000, np.random.default_rng(0)).picks(Router(), 8)


def main() -> None:
    """Print the table."""
    scenario = load_scenario(SCENARIO)
    layout = resolve(scenario)
    schedule = schedule_of(scenario, layout)
    step = simulate_step(scenario, "max-plus")
    one = step.prices.slowest()

    def cold() -> None:
        forget_plans()
        program = build(scenario, layout, schedule)
        evaluate(program, one)

    rows: list[tuple[str, float | None, float]] = [
        ("moesim --help, whole process", 0.5, best(process("--help"), 5)),
        (f"moesim estimate {SCENARIO}, whole process", 3.0, best(process("estimate", SCENARIO), 3)),
        ("SimPy, one step, one rank per stage", 1.0, best(lambda: play(step.program, one), 3)),
        (
            f"SimPy, one step, {step.prices.lanes} expert ranks per stage",
            None,
            best(lambda: play(step.program, step.prices), 2),
        ),
        ("max-plus cold (program built, sorted, evaluated)", 0.5, best(cold, 3)),
        ("max-plus warm, one rank per stage", 0.05, best(lambda: evaluate(step.program, one), 5)),
        (
            f"max-plus warm, {step.prices.lanes} expert ranks per stage",
            None,
            best(lambda: evaluate(step.program, step.prices), 3),
        ),
        ("routing: counts, 58 layers x 64 ranks x 256 experts", 0.2, best(counts, 5)),
        ("routing: 20 000 tokens x 256 experts, one layer", 0.1, best(tokens, 5)),
        ("moesim validate --routing, whole process", None, best(process("validate", "--routing"), 1)),
        ("routing: loads drawn", None, best(lambda: expert_load(scenario, layout), 3)),
        (
            "pricing: all classes",
            None,
            best(lambda: Pricer(scenario, layout, step.load).price(step.program.classes), 3),
        ),
        ("program built", None, best(lambda: build(scenario, layout, schedule), 3)),
    ]
    print(
        f"{SCENARIO}: {len(step.program):,} ops, {len(step.program.classes)} classes, {len(step.program.levels)} waves"
    )
    print(f"{'':55s} {'target':>9s} {'reached':>9s}")
    for name, target, reached in rows:
        print(f"{name:55s} {f'{target:.3f} s' if target else '':>9s} {reached:7.3f} s")
    print(f"{'SimPy over max-plus warm, one rank per stage':55s} {'':9s} {rows[2][2] / rows[5][2]:7.1f} x")


if __name__ == "__main__":
    main()
