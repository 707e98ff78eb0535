"""Critical path and slack: what sets the step, and by how much every other op could be late.

Max-plus is the oracle: one op is made longer or shorter, the Program is evaluated again, and the step changes by what
the slack says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from simulator import load_scenario, simulate_step
from simulator.events import NO_SLACK, WAITING, Timeline, critical_path, evaluate, play, slack
from simulator.events.timeline import rows_of
from simulator.program import COMPUTE, EXPERT, EXPOSED, GRADIENT, PIPELINE, Draft, Program
from simulator.timing import Bulk, Fixed, OpClass, Prices, Send

Engine = Callable[[Program, Prices], Timeline]
ENGINES = pytest.mark.parametrize("engine", [play, evaluate], ids=["events", "max-plus"])
SEEDS = pytest.mark.parametrize("seed", range(25))


def random_case(seed: int) -> tuple[Program, Prices]:
    """30 ops on 3 ranks and 3 lanes: kernels, barriers, collectives, messages; each with a price of its own."""
    rng = np.random.default_rng(seed)
    draft, count, lanes = Draft(3), 30, 3
    seconds, latency = np.zeros((count, lanes)), np.zeros(count)
    flows, demand = np.zeros((count, 1)), np.ones((count, 1))
    for op in range(count):
        kind = rng.choice(["work", "work", "barrier", "collective", "message"])
        classes: dict[str, OpClass] = {
            "work": Fixed(f"work {op}", float(op)),
            "barrier": Fixed("barrier", float(op)),
            "collective": Bulk("all_reduce", "gradient", float(op)),
            "message": Send(f"stack {op}"),
        }
        cls = classes[kind]
        moves = kind in ("collective", "message")
        after = set(rng.integers(0, op, size=min(op, 2)).tolist()) if op else set()
        stream = int(rng.choice([EXPERT, PIPELINE, GRADIENT])) if moves else COMPUTE
        draft.op(rank=int(rng.integers(3)), stream=stream, cls=cls, label=kind, after=after)
        if moves:
            latency[op], flows[op] = 0.25, rng.uniform(0.0, 2.0)
            demand[op] = rng.uniform(0.4, 1.0)
            seconds[op] = latency[op] + flows[op]
        else:
            seconds[op] = rng.choice([0.0, 1.0, 2.0], size=lanes) * rng.uniform(0.5, 1.5)
    ones = np.ones(count, dtype=np.int64)
    share = np.ones((count, 1))
    return draft.finish(), Prices(np.arange(count), ones, seconds, latency, flows, demand, share, ("work",))


def small_case() -> tuple[Program, Prices]:
    """A real step with skewed experts, two pipeline ranks and four lanes."""
    tree: dict[str, Any] = {
        "name": "small",
        "model": {"preset": "mixtral-8x7b", "set": {"layers": 4}},
        "cluster": {"profile": "h100-sxm", "accelerators": 8},
        "parallelism": {"pipeline": 2, "expert": 4, "schedule": "zb1p"},
        "training": {"tokens": "1B", "sequence_length": 1024, "global_batch_sequences": 16},
        "routing": {"load": {"kind": "logits", "population": 0.5}},
    }
    step = simulate_step(load_scenario(tree), "max-plus")
    return step.program, step.prices


def priced_one_by_one(program: Program, prices: Prices) -> tuple[Program, Prices]:
    """The same step with a class and a row of prices for every op."""
    rows, count = rows_of(program, prices), len(program)
    alone = replace(program, cls=np.arange(count), classes=tuple(program.classes[cls] for cls in program.cls))
    share = prices.share[program.cls]
    row, ones = np.arange(count), np.ones(count, dtype=np.int64)
    seconds, latency = prices.seconds[rows], prices.latency[rows]
    flows, demand = prices.flow_seconds[rows], prices.flow_demand[rows]
    return alone, Prices(row, ones, seconds, latency, flows, demand, share, prices.families)


def assert_chain(timeline: Timeline) -> None:
    program, path, spare = timeline.program, critical_path(timeline), slack(timeline)
    start, end = timeline.start[path.ops, path.lanes], timeline.end[path.ops, path.lanes]

    assert end[-1] == timeline.step_s
    assert path.terms.total == pytest.approx(timeline.step_s, rel=1e-12)
    assert path.by_rank.sum() == pytest.approx(timeline.step_s, rel=1e-12)
    assert start[0] == pytest.approx(0.0, abs=1e-12)
    assert start[1:] == pytest.approx(end[:-1], abs=1e-9)
    for need, op in zip(path.ops[:-1], path.ops[1:], strict=True):
        assert need in program.needs[program.start[op] : program.start[op + 1]]
    same = path.lanes[1:] == path.lanes[:-1]
    assert (same | program.barrier[path.ops[1:]]).all()  # lanes meet at barriers only
    assert np.abs(spare[path.ops, path.lanes]).max() < NO_SLACK
    assert path.terms.get(WAITING, 0.0) == pytest.approx(0.0, abs=1e-9)


def assert_slack(timeline: Timeline) -> None:
    """No slack is negative, and what has none was held up by something that has none either."""
    program, spare = timeline.program, slack(timeline)
    assert spare.min() >= -NO_SLACK
    for op, lane in zip(*np.nonzero(spare < NO_SLACK), strict=True):
        if timeline.start[op, lane] < NO_SLACK:
            continue
        needs = program.needs[program.start[op] : program.start[op + 1]]
        lanes = slice(None) if program.barrier[op] else [lane]
        late = timeline.end[needs][:, lanes] > timeline.start[op, lane] - NO_SLACK
        assert (late & (spare[needs][:, lanes] < 2 * NO_SLACK)).any()


@ENGINES
@SEEDS
def test_the_path_is_a_chain_without_slack_that_sums_to_the_step(engine: Engine, seed: int) -> None:
    timeline = engine(*random_case(seed))
    assert_chain(timeline)
    assert_slack(timeline)


@ENGINES
def test_the_path_of_a_real_step(engine: Engine) -> None:
    timeline = engine(*small_case())
    assert_chain(timeline)
    assert_slack(timeline)
    path = critical_path(timeline)
    known = {*timeline.prices.families, *EXPOSED.values(), WAITING}
    assert set(path.terms) <= known
    assert {"expert", "attention"} <= set(path.terms)


@SEEDS
def test_the_step_grows_by_what_exceeds_the_slack_and_shrinks_only_where_there_is_none(seed: int) -> None:
    program, prices = random_case(seed)
    timeline = evaluate(program, prices)
    spare = slack(timeline)
    for op in range(len(program)):
        for lane in range(prices.lanes):
            if program.barrier[op] and lane:
                continue
            for change in (-0.4, 0.1, 1.0):
                seconds = prices.seconds.copy()
                lanes = slice(None) if program.barrier[op] else lane
                seconds[op, lanes] = np.maximum(seconds[op, lanes] + change, 0.0)
                after = evaluate(program, replace(prices, seconds=seconds)).step_s
                free = float(spare[op, lanes].min())
                if change > 0:
                    assert after == pytest.approx(timeline.step_s + max(0.0, change - free))
                elif free > NO_SLACK:
                    assert after == pytest.approx(timeline.step_s)
                else:
                    assert after <= timeline.step_s + 1e-12


def test_a_real_op_with_slack_can_take_no_time_at_all_without_an_effect() -> None:
    program, prices = priced_one_by_one(*small_case())
    timeline = evaluate(program, prices)
    spare = slack(timeline).min(axis=1)
    rng = np.random.default_rng(0)
    loose = rng.choice(np.flatnonzero(spare > 1e-6), 20)
    tight = critical_path(timeline).ops
    longest = tight[prices.seconds[tight].max(axis=1).argmax()]
    for op in [*loose.tolist(), longest]:
        seconds = prices.seconds.copy()
        seconds[op] = 0.0
        after = evaluate(program, replace(prices, seconds=seconds)).step_s
        if op == longest:
            assert after < timeline.step_s
        else:
            assert after == pytest.approx(timeline.step_s, rel=1e-12)


def test_of_needs_that_end_together_the_same_rank_is_followed() -> None:
    draft = Draft(2)
    other = draft.op(rank=1, stream=COMPUTE, cls=Fixed("a", 1.0), label="F", after=())
    own = draft.op(rank=0, stream=COMPUTE, cls=Fixed("b", 1.0), label="F", after=())
    last = draft.op(rank=0, stream=COMPUTE, cls=Fixed("c", 1.0), label="F", after=(other, own))
    seconds, none = np.ones((3, 1)), np.zeros((3, 1))
    ones = np.ones(3, dtype=np.int64)
    prices = Prices(np.arange(3), ones, seconds, none[:, 0], none, none + 1.0, none + 1.0, ("work",))
    path = critical_path(evaluate(draft.finish(), prices))
    assert path.ops.tolist() == [own, last]
    assert dict(path.terms) == {"work": 2.0}
    assert path.by_rank.tolist() == [2.0, 0.0]
