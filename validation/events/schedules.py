"""Pipeline schedules replayed with fixed durations, against closed forms, published tables and PyTorch's lists.

Times are in units of the stage durations F, I, W and F&B (an overlapped pair). Every value comes from the max-plus
reader; the last rows count the replays in which SimPy gives the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from simulator import schedules
from simulator.events import play
from simulator.schedules import Overlapped, Schedule
from validation.checks import Check, at_most, near
from validation.events import latencies, torch_tables
from validation.events.replay import Replayed, Times, replay

GROUP = "schedules"
V3 = "DeepSeek-V3, arXiv 2412.19437, Table 2"
ZERO_BUBBLE = "Zero Bubble Pipeline Parallelism, arXiv 2401.10241, Table 2"
REPLAY = "replay of the lists of torch.distributed.pipelining 2.13.0"
SCHEDULER = "heuristic scheduler of sail-sg/zero-bubble-pipeline-parallelism"
DUALPIPE = "replay of the order of deepseek-ai/DualPipe"
UNEVEN = Times(10, 13, 8)

DUALPIPE_BUBBLES = (
    (8, 20, Times(10, 10, 10, 30), 60, 60),
    (8, 32, Times(10, 10, 10, 30), 60, 60),
    (8, 20, Times(10, 10, 10, 24), 42, 42),
    (8, 32, Times(10, 10, 10, 24), 42, 42),
    (8, 32, Times(10, 13, 8, 28), 66, 75),
    (8, 32, Times(12, 16, 9, 30), 72, 84),
    (16, 120, Times(10, 10, 10, 24), 98, 98),
    (16, 120, Times(10, 15, 10, 35), 200, 210),
)
"""Ranks, microbatches, times, the largest bubble of a rank when DeepSeek's order is replayed, that of the formula."""


def checks() -> Iterator[Check]:
    """All checks of pipeline schedules."""
    yield from _bubbles()
    yield from _two_bubbles()
    yield from _uneven()
    yield from _in_flight()
    yield from _dualpipe_bubble()
    yield from _dualpipe_counts()
    yield from latencies.checks()
    yield from _tables()
    yield from _engines()


def _exact(name: str, expected: float, reached: float, unit: str, source: str) -> Check:
    return near(GROUP, name, expected, reached, unit, 1e-9, source)


def _sizes(schedule: Schedule) -> str:
    chunks = schedule.stages // schedule.ranks
    return f"{schedule.name}, P {schedule.ranks}, M {schedule.microbatches}" + (f", v {chunks}" if chunks > 1 else "")


def _bubbles() -> Iterator[Check]:
    """Closed forms of the bubble of the makespan, equal and unequal durations."""
    b = "(P-1)(F+B)"
    for name, ranks, microbatches, chunks, times, makespan, source in (
        ("gpipe", 4, 8, 1, Times(), 330, f"{b}; {V3}; {REPLAY}"),
        ("1f1b", 4, 8, 1, Times(), 330, f"{b}; {V3}; {REPLAY}"),
        ("interleaved", 4, 8, 2, Times(), 570, f"{b} of a chunk; {REPLAY}"),
        ("interleaved", 8, 16, 2, Times(), 1170, f"{b} of a chunk; {REPLAY}"),
        ("interleaved", 8, 16, 4, Times(), 2130, f"{b} of a chunk; {REPLAY}"),
        ("zb1p", 4, 8, 1, UNEVEN, 293, f"(P-1)(F+I-W); {ZERO_BUBBLE}; {REPLAY}"),
    ):
        schedule = schedules.build(name, ranks, microbatches, chunks)
        found = replay(schedule, times)
        backward = times.i if name == "zb1p" else times.i + 2 * times.w
        bubble = (ranks - 1) * (times.f + backward - times.w)
        label = f"{_sizes(schedule)}, F I W {times.f:g} {times.i:g} {times.w:g}"
        yield _exact(f"makespan: {label}", makespan, found.makespan, "", source)
        yield _exact(f"bubble of the worst rank: {label}", bubble, max(found.makespan_bubble), "", source)


def _two_bubbles() -> Iterator[Check]:
    """P 4, M 8, F = I = W: the bubble of the makespan, and that of each rank's own span."""
    source = f"{REPLAY}; zero-bubble schedules keep a fill of (P-1)F in a step that ends with a barrier"
    for name, makespan, bubble, spans in (
        ("1f1b", 330, 90, (90, 60, 30, 0)),
        ("zb1p", 270, 30, (30, 20, 10, 0)),
        ("zbh2", 270, 30, (0, 0, 0, 0)),
        ("zbv", 510, 30, (0, 0, 0, 0)),
    ):
        found = replay(schedules.build(name, 4, 8))
        label = f"{name}, P 4, M 8, F = I = W = 10"
        of = f"{source}; {SCHEDULER} at twice the memory" if name == "zbh2" else source
        yield _exact(f"both bubbles, makespan: {label}", makespan, found.makespan, "", of)
        for rank, span in enumerate(spans):
            reached = found.makespan_bubble[rank]
            yield _exact(f"bubble of the makespan: {label}, rank {rank}", bubble, reached, "", of)
            yield _exact(f"bubble of the own span: {label}, rank {rank}", span, found.span_bubble[rank], "", of)


def _uneven() -> Iterator[Check]:
    """P 8, M 24 and unequal durations; orders of other generators are for the record."""
    found = {name: replay(schedules.build(name, 8, 24), UNEVEN) for name in ("1f1b", "zb1p", "zbh2", "zbv")}
    label = "P 8, M 24, F I W 10 13 8"
    for name, bubble, source in (
        ("1f1b", 217, f"(P-1)(F+B); {REPLAY}"),
        ("zb1p", 105, f"(P-1)(F+I-W); {REPLAY}"),
        ("zbh2", 70, f"(P-1)F; {SCHEDULER} at twice the memory"),
        ("zbv", 91, REPLAY),
    ):
        reached = max(found[name].makespan_bubble)
        yield _exact(f"bubble of the makespan: {name}, {label}", bubble, reached, "", source)
    worst = {name: max(each.span_bubble) for name, each in found.items()}
    yield _exact(f"bubble of the own span: zbv, {label}", 70, worst["zbv"], "", REPLAY)
    yield _record(f"bubble of the own span: zbv, {label}", 62, worst["zbv"], f"{SCHEDULER}: another order")
    source = f"(P-1)(F+I-2W); {ZERO_BUBBLE}"
    yield _exact(f"bubble of the own span: zbh2, {label}", 49, worst["zbh2"], "", source)
    yield _record(
        f"bubble of the own span: zbh2, {label}", 41, worst["zbh2"], f"{SCHEDULER}, fitted to the durations, with 2P"
    )
    for ranks, microbatches in ((2, 3), (4, 8), (8, 15), (8, 48), (16, 64)):
        for times in (Times(), UNEVEN, Times(7, 9, 6)):
            schedule = schedules.build("zbh2", ranks, microbatches)
            expected = (ranks - 1) * (times.f + times.i - 2 * times.w)
            name = f"bubble of the own span: {_sizes(schedule)}, F I W {times.f:g} {times.i:g} {times.w:g}"
            yield _exact(name, expected, max(replay(schedule, times).span_bubble), "", source)


def _record(name: str, expected: float, reached: float, source: str) -> Check:
    return near(GROUP, f"{name}, other order", expected, reached, "", None, source)


def _in_flight() -> Iterator[Check]:
    """Activations that a rank holds at most, in passes of a stage."""
    for name, ranks, microbatches, chunks, peaks, source in (
        ("gpipe", 4, 8, 1, [8] * 4, "GPipe, arXiv 1811.06965: M"),
        ("1f1b", 4, 8, 1, [4, 3, 2, 1], f"P - r; {REPLAY}"),
        ("interleaved", 4, 8, 2, [11, 9, 7, 5], f"min(vM, 2(P-r-1) + (v-1)P + 1); {REPLAY}"),
        ("interleaved", 8, 16, 2, [*range(23, 8, -2)], f"min(vM, 2(P-r-1) + (v-1)P + 1); {REPLAY}"),
        ("zb1p", 4, 8, 1, [4] * 4, f"P; {ZERO_BUBBLE}; {REPLAY}"),
        ("zbh2", 4, 8, 1, [7] * 4, f"2P - 1; {ZERO_BUBBLE}"),
        ("zbh2", 8, 24, 1, [15] * 8, f"2P - 1; {ZERO_BUBBLE}"),
        ("zbv", 4, 8, 2, [8] * 4, f"2P chunks, as much as 1F1B; {REPLAY}"),
        ("dualpipe", 4, 8, 1, [5] * 4, f"P + 1; {V3}"),
        ("dualpipe", 8, 20, 1, [9] * 8, f"P + 1; {V3}"),
        ("dualpipe", 16, 120, 1, [17] * 16, f"P + 1; {V3}"),
        ("dualpipev", 4, 8, 2, [9] * 4, f"2P + 1 chunks; {REPLAY}"),
    ):
        schedule = schedules.build(name, ranks, microbatches, chunks)
        for rank, (expected, reached) in enumerate(zip(peaks, schedules.in_flight(schedule), strict=True)):
            if rank < 4:
                yield _exact(f"activations held: {_sizes(schedule)}, rank {rank}", expected, reached, "", source)
    held = max(schedules.in_flight(schedules.build("zbh2", 4, 8)))
    yield at_most(GROUP, "activations held: zbh2, P 4, M 8, limit 2P", 8, held, "", f"{SCHEDULER} at this limit")


def _dualpipe_bubble() -> Iterator[Check]:
    """(PP/2-1)(F&B + B - 3W): exact for F = I = W, an upper bound otherwise."""
    for ranks, microbatches, times, bubble, formula in DUALPIPE_BUBBLES:
        reached = max(replay(schedules.build("dualpipe", ranks, microbatches), times).makespan_bubble)
        label = f"DualPipe, P {ranks}, M {microbatches}, F I W F&B {times.f:g} {times.i:g} {times.w:g} {times.pair:g}"
        yield _exact(f"bubble of the worst rank: {label}", bubble, reached, "", DUALPIPE)
        yield at_most(GROUP, f"bubble at most (PP/2-1)(F&B+B-3W): {label}", formula, reached, "", V3)
    ends = replay(schedules.build("dualpipe", 8, 32), Times(pair=24)).makespan_bubble
    for rank, expected in enumerate((30, 36, 42, 42, 42, 42, 36, 30)):
        name = f"bubble: DualPipe, P 8, M 32, F I W F&B 10 10 10 24, rank {rank}"
        yield _exact(name, expected, ends[rank], "", DUALPIPE)
    for ranks, microbatches in ((2, 4), (4, 8), (4, 16), (8, 16)):
        for pair in (30, 24):
            schedule = schedules.build("dualpipev", ranks, microbatches)
            reached = max(replay(schedule, Times(pair=pair)).makespan_bubble)
            name = f"bubble of the worst rank: DualPipeV, P {ranks}, M {microbatches}, F I W F&B 10 10 10 {pair}"
            yield _exact(name, (ranks - 1) * (pair - 10), reached, "", f"(P-1)(F&B+B-3W), PP = 2P; {V3}; {REPLAY}")


def _dualpipe_counts() -> Iterator[Check]:
    """What a rank of DeepSeek-V3's pipeline does alone and what it overlaps, and the lengths of small lists."""
    lists = schedules.build("dualpipe", 16, 120).steps
    counts = [Counter("F&B" if isinstance(step, Overlapped) else step.kind for step in steps) for steps in lists]
    for rank, expected in (
        (0, {"F": 23, "B": 8, "I": 15, "W": 15, "F&B": 97}),
        (8, {"F": 17, "B": 9, "I": 8, "W": 8, "F&B": 103}),
    ):
        for kind, number in expected.items():
            yield _exact(f"DualPipe, P 16, M 120, rank {rank}: {kind}", number, counts[rank][kind], "steps", DUALPIPE)
    for kind, mean in {"F": 19.6, "B": 8.1, "I": 11.5, "W": 11.5, "F&B": 100.4}.items():
        reached = sum(count[kind] for count in counts) / 16
        yield near(GROUP, f"DualPipe, P 16, M 120, mean of ranks: {kind}", mean, reached, "steps", 0.05, DUALPIPE)
    for name, chunks, lengths in (
        ("1f1b", 1, [16] * 4),
        ("zb1p", 1, [24] * 4),
        ("interleaved", 2, [32] * 4),
        ("zbv", 2, [48] * 4),
        ("dualpipev", 2, [34, 32, 30, 29]),
    ):
        built = schedules.build(name, 4, 8, chunks)
        for rank, length in enumerate(lengths):
            yield _exact(f"steps: {_sizes(built)}, rank {rank}", length, len(built.steps[rank]), "steps", REPLAY)


def _tables() -> Iterator[Check]:
    """Recorded lists that ours equal on every rank, action for action."""
    found = torch_tables.tables()
    equal = Counter(table.name for table in found if table.is_ours())
    for name, number in sorted(Counter(table.name for table in found).items()):
        ranks = [table.ranks for table in found if table.name == name]
        label = f"lists equal on every rank: {name}, P {min(ranks)} to {max(ranks)} ({len(set(ranks))} sizes)"
        of = "deepseek-ai/DualPipe, DualPipe.step" if name == "dualpipe" else "torch.distributed.pipelining 2.13.0"
        yield near(GROUP, label, number, equal[name], "lists", 0.0, of)


def _engines() -> Iterator[Check]:
    """SimPy against max-plus."""
    cases = [
        (name, times)
        for name in schedules.SCHEDULES
        for times in (Times(), UNEVEN, Times(12, 16, 9, 30, 1), Times(10, 10, 10, 24, 3))
    ]
    same = sum(
        _close(replay(schedule, times), replay(schedule, times, play))
        for schedule, times in ((schedules.build(n, 4, 8, 2 if n == "interleaved" else 1), t) for n, t in cases)
    )
    yield near(GROUP, "replays equal in SimPy and max-plus, to 1e-9", len(cases), same, "replays", 0.0, "own invariant")


def _close(one: Replayed, other: Replayed) -> bool:
    pairs = zip(
        [one.makespan, *one.makespan_bubble, *one.span_bubble],
        [other.makespan, *other.makespan_bubble, *other.span_bubble],
        strict=True,
    )
    return all(abs(a - b) <= 1e-9 * max(1.0, one.makespan) for a, b in pairs)
