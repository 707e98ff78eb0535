"""DeepSeek-V3's training trace, played: a forward beside a backward, four MoE layers each, without pipeline messages.

The pieces that DeepSeek published are put into the chunk pair that the simulator builds for such a stage; only their
order and the dependencies are ours. The trace was taken while communication held 20 of 132 multiprocessors, so its
times contain that loss and it is not applied again. In the table below, a piece of period n is that of forward layer n
or of backward layer 3-n, which the trace runs side by side.

The second half prices the same pieces from the H800 profile alone.

Source of the pieces: github.com/deepseek-ai/profile-data, ``train.json`` (commit 4496024): GPU kernels attributed to
the enclosing annotation of their launch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from simulator.events import evaluate, play
from simulator.layout import Layout, resolve
from simulator.program import EXPERT, Program
from simulator.program.pipeline import alone
from simulator.routing import expert_load
from simulator.schedules import Action, Overlapped
from simulator.spec import Scenario, load_scenario
from simulator.timing import Compute, Fixed, OpClass, Pricer
from simulator.workload.ops import Gemm, GroupedGemm
from validation.checks import Check, near, within

GROUP = "chunk pair"
LAYERS = 4
TRACE = "github.com/deepseek-ai/profile-data, train.json"
REPLAY = f"{TRACE}: its pieces as two in-order streams with data dependencies only"

PIECES: dict[str, tuple[float, float, float, float]] = {
    "attn(F)": (4.31, 4.26, 4.44, 4.47),
    "mlp(B)": (5.69, 5.41, 5.41, 4.72),
    "mlp(W)": (5.33, 5.06, 5.26, 4.64),
    "mlp(F)": (4.25, 4.38, 5.18, 4.61),
    "attn(B)": (9.02, 9.37, 9.45, 9.53),
    "attn(W)": (2.38, 2.38, 2.39, 2.41),
    "combine(B)": (3.32, 3.58, 3.61, 3.11),
    "dispatch(F)": (4.60, 4.15, 4.44, 4.19),
    "dispatch(B)": (6.55, 6.54, 5.89, 6.49),
    "combine(F)": (6.00, 6.07, 5.85, 6.05),
}
"""Milliseconds of each piece by period: compute spans, then data kernels of the exchanges."""

NOTIFY: dict[str, tuple[float, float, float, float]] = {
    "combine(B)": (1.0, 1.3, 2.2, 3.8),
    "dispatch(F)": (1.4, 1.4, 2.6, 3.6),
    "dispatch(B)": (0.8, 1.4, 1.4, 1.0),
    "combine(F)": (1.3, 2.2, 3.7, 3.6),
}
"""Milliseconds of the kernels before each exchange that wait for the peers."""

_PLACES = {
    "F dense": "attn(F)",
    "I experts": "mlp(B)",
    "W experts": "mlp(W)",
    "F experts": "mlp(F)",
    "I dense": "attn(B)",
    "W dense": "attn(W)",
    "dispatch B": "combine(B)",  # the gradient of a combine travels as a dispatch
    "dispatch F": "dispatch(F)",
    "combine B": "dispatch(B)",
    "combine F": "combine(F)",
}
_MLP = frozenset({"expert", "shared_expert", "permute"})
"""Families that the trace counts under mlp; all others, the router among them, are under attn."""

PUBLISHED_MS = 129.0
REPLAYED_MS = {(True, 1.2): 138.7, (True, 1.5): 171.8, (False, 1.0): 124.3, (False, 1.2): 124.3, (False, 1.5): 129.5}
"""Milliseconds by (with notify, factor on communication) of an independent replay of the mean pieces."""


def checks() -> Iterator[Check]:
    """The pair from the trace's pieces, and each piece from the profile."""
    for engine in ("events", "max-plus"):
        yield within(GROUP, f"pair, {engine} engine", PUBLISHED_MS, pair_ms(engine=engine), "ms", 0.03, TRACE)
    for (notify, factor), expected in REPLAYED_MS.items():
        what = "communication" if notify else "data kernels only, communication"
        yield within(GROUP, f"{what} x {factor}", expected, pair_ms(factor, notify=notify), "ms", 0.03, REPLAY)
    for name, expected, reached in profile_pieces():
        yield near(GROUP, f"{name}, from the profile", expected, reached, "ms", None, TRACE)


def pair_ms(factor: float = 1.0, *, notify: bool = True, engine: str = "events", mean: bool = False) -> float:
    """Milliseconds of the pair with all communication ``factor`` times as long; ``mean``: all periods alike."""
    scenario, layout = _published()
    program = _with_pieces(alone(scenario, layout, _pair(layout)), factor, notify=notify, mean=mean)
    prices = Pricer(scenario, layout, None).price(program.classes)
    return 1e3 * (play if engine == "events" else evaluate)(program, prices).step_s


def profile_pieces() -> Iterator[tuple[str, float, float]]:
    """Name, trace and profile of each piece (mean per layer, ms), and of the whole pair."""
    scenario, layout = _published()
    program = alone(scenario, layout, _pair(layout))
    pricer = Pricer(scenario, layout, expert_load(scenario, layout))
    ours = _profile_ms(program, pricer)
    for name, values in PIECES.items():
        yield name, float(np.mean(values)), ours[name]
    prices = pricer.price(program.classes)
    yield "pair", PUBLISHED_MS, 1e3 * play(program, prices).step_s


def _published() -> tuple[Scenario, Layout]:
    scenario = load_scenario("deepseek-v3")
    return scenario, resolve(scenario)


def _pair(layout: Layout) -> Overlapped:
    """A stage of four MoE layers, forward and backward."""
    stage = next(
        number
        for number, blocks in enumerate(layout.stages)
        if len(blocks) == 4 and all(layout.blocks[index].is_moe for index in blocks)
    )
    return Overlapped(Action(stage, "F", 1), Action(stage, "B", 0))


def _with_pieces(program: Program, factor: float, *, notify: bool, mean: bool) -> Program:
    """The same ops with the trace's durations. Ends of the stage that the trace has no piece for take no time."""
    extra: Mapping[str, tuple[float, ...]] = NOTIFY if notify else {}
    seen: Counter[str] = Counter()
    seconds = []
    for op in range(len(program)):
        name = _PLACES[program.labels[program.label[op]]]
        if _is_end(program, op):
            seconds.append(0.0)
            continue
        times = np.array(PIECES[name]) + np.array(extra.get(name, 0.0))
        taken = float(times.mean() if mean else times[seen[name]])
        seen[name] += 1
        seconds.append(1e-3 * taken * (factor if program.stream[op] == EXPERT else 1.0))
    assert all(seen[name] == 4 for name in PIECES), f"the pair is not four layers by four layers: {seen}"
    # One class for each op: equal segments have different times here.
    classes = tuple(Fixed(f"op {number}", value) for number, value in enumerate(seconds))
    return replace(program, classes=classes, cls=np.arange(len(program)))


def _is_end(program: Program, op: int) -> bool:
    """Whether an op is what a stage does after its last combine: a tail without any product."""
    cls = program.classes[program.cls[op]]
    return isinstance(cls, Compute) and not any(isinstance(item.op, Gemm | GroupedGemm) for item in cls.items)


def _profile_ms(program: Program, pricer: Pricer) -> dict[str, float]:
    """Milliseconds by piece, mean per layer. Dense stretches are divided by family, as the trace divides them."""
    totals: dict[str, float] = defaultdict(float)
    for op in range(len(program)):
        cls = program.classes[program.cls[op]]
        name = _PLACES[program.labels[program.label[op]]]
        if isinstance(cls, Compute):
            for kind in ("attn", "mlp"):
                chosen = [
                    tuple(item for item in items if (item.family in _MLP) == (kind == "mlp"))
                    for items in (cls.items, cls.repeats)
                ]
                part = replace(cls, items=chosen[0], repeats=chosen[1])
                totals[kind + name[name.index("(") :]] += _alone_ms(part, pricer) / LAYERS
        else:
            totals[name] += _alone_ms(cls, pricer) / LAYERS
    return totals


def _alone_ms(cls: OpClass, pricer: Pricer) -> float:
    """Milliseconds of one op, mean over microbatches and ranks."""
    return 1e3 * float(pricer.price([cls]).seconds.mean())


__all__ = ["checks", "pair_ms", "profile_pieces"]
