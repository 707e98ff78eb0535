"""Speed, measured and printed; never a gate. ``make bench``.

Whole processes are timed as a user meets them, inner parts in one process. Best of several, because a shared machine
only ever adds time. Ratios are taken within one run.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from simulator.campaign import estimate, simulate_step
from simulator.events import critical_path, evaluate, evaluate_batch, play, play_every_rank, slack
from simulator.events.max_plus import forget_plans
from simulator.layout import resolve
from simulator.program import Program, build, schedule_of
from simulator.routing import expert_load
from simulator.routing.load import draw, inclusion
from simulator.routing.tendencies import Tendencies
from simulator.routing.tokens import block
from simulator.spec import load_scenario
from simulator.spec.model import Router
from simulator.timing import Pricer, Prices

SCENARIO = "deepseek-v3"
SKEWED = {"routing.load": {"kind": "logits", "population": 0.3}}
BATCH = 256
LARGE = {"cluster.accelerators": 98_304, "training.global_batch_sequences": 245_760}


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


def batch(program: Program, prices: Prices) -> float:
    """Seconds for each of many scenarios evaluated together, without those to make their prices; the better of two."""
    rng, making = np.random.default_rng(0), [0.0]

    def tables() -> Iterator[Prices]:
        for _ in range(BATCH):
            begin = time.perf_counter()
            made = replace(prices, seconds=prices.seconds * rng.uniform(0.5, 1.5))
            making[0] += time.perf_counter() - begin
            yield made

    found = []
    for _ in range(2):
        making[0] = 0.0
        whole = best(lambda: evaluate_batch(program, tables()), 1)
        found.append((whole - making[0]) / BATCH)
    return min(found)


def growing(pipeline: int, expert: int) -> dict[str, Any]:
    """One MoE layer on each of some pipeline ranks, a rank for every lane of its group, M = 2P microbatches."""
    return {
        "name": "growth",
        "model": {
            "name": "growth",
            "layers": pipeline,
            "hidden_size": 1024,
            "vocabulary_size": 4000,
            "context": 1024,
            "mixer": {"kind": "gqa", "heads": 8, "kv_heads": 4, "head_dim": 128},
            "moe": {"experts": 2048, "top_k": 2, "expert_ffn_size": 1024},
        },
        "cluster": {"profile": "h100-sxm", "accelerators": pipeline * expert},
        "parallelism": {"pipeline": pipeline, "expert": expert, "schedule": "1f1b"},
        "training": {"tokens": "1B", "sequence_length": 1024, "global_batch_sequences": 2 * pipeline * expert},
        "routing": {"load": {"kind": "logits", "population": 0.5}},
    }


def growth() -> None:
    """Print the time per event of separate ranks as their number grows."""
    print(f"\n{'SimPy, every rank its own events':36s} {'events':>10s} {'seconds':>9s} {'us/event':>9s}")
    first = None
    for pipeline, expert in ((8, 8), (8, 64), (8, 512), (8, 2048), (16, 64), (16, 1024)):
        step = simulate_step(load_scenario(growing(pipeline, expert)), "max-plus")
        program = step.program
        alone = int((~program.barrier).sum())
        events = alone * step.prices.lanes + len(program) - alone
        seconds = best(lambda step=step: play_every_rank(step.program, step.prices), 3)  # type: ignore[misc]
        first = first or seconds / events
        ranks = f"{pipeline * expert:,} ranks: {pipeline} x {expert}"
        print(
            f"{ranks:36s} {events:10,d} {seconds:9.2f} {seconds / events * 1e6:9.2f}  {seconds / events / first:.2f} x"
        )


def main() -> None:
    """Print the tables."""
    scenario = load_scenario(SCENARIO)
    layout = resolve(scenario)
    schedule = schedule_of(scenario, layout)
    step = simulate_step(scenario, "max-plus")
    one = step.prices.slowest()
    skewed = simulate_step(load_scenario(SCENARIO, SKEWED), "max-plus")
    large = load_scenario(SCENARIO, LARGE)

    def cold() -> None:
        forget_plans()
        program = build(scenario, layout, schedule)
        evaluate(program, one)

    rows: list[tuple[str, float | None, float]] = [
        ("moesim --help, whole process", 0.5, best(process("--help"), 5)),
        (f"moesim estimate {SCENARIO}, whole process", 3.0, best(process("estimate", SCENARIO), 3)),
        (f"estimate on {large.cluster.accelerators:,} accelerators", 5.0, best(lambda: estimate(large), 2)),
        ("SimPy, one step, one rank per stage", 0.5, best(lambda: play(step.program, one), 5)),
        (
            f"SimPy, one step, {skewed.prices.lanes} expert ranks, skewed load",
            3.0,
            best(lambda: play(skewed.program, skewed.prices), 3),
        ),
        (
            f"SimPy, {skewed.prices.lanes} expert ranks as events of their own",
            10.0,
            best(lambda: play_every_rank(skewed.program, skewed.prices), 1),
        ),
        ("max-plus cold (program built, sorted, evaluated)", 0.5, best(cold, 3)),
        ("max-plus warm, one rank per stage", 0.05, best(lambda: evaluate(step.program, one), 5)),
        (
            f"max-plus warm, {skewed.prices.lanes} expert ranks per stage",
            0.3,
            best(lambda: evaluate(skewed.program, skewed.prices), 3),
        ),
        (f"one of {BATCH} scenarios together, one rank per stage", 0.001, batch(step.program, one)),
        (
            f"one of {BATCH} scenarios together, {skewed.prices.lanes} expert ranks",
            0.010,
            batch(skewed.program, skewed.prices),
        ),
        ("critical path", 0.1, best(lambda: critical_path(step.timeline), 3)),
        (f"slack of every op, {step.prices.lanes} expert ranks", 0.5, best(lambda: slack(step.timeline), 3)),
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
    print(f"{'':55s} {'target':>10s} {'reached':>10s}")
    for name, target, reached in rows:
        print(f"{name:55s} {f'{target:.4f} s' if target else '':>10s} {reached:8.4f} s")
    reached_by = {name: reached for name, _, reached in rows}
    ratio = reached_by["SimPy, one step, one rank per stage"] / reached_by["max-plus warm, one rank per stage"]
    print(f"{'SimPy over max-plus warm, one rank per stage':55s} {'':10s} {ratio:8.1f} x")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{'peak memory of all of it':55s} {'2.00 GB':>10s} {peak:7.2f} GB")
    growth()


if __name__ == "__main__":
    main()
