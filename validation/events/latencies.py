"""What a latency of every message between ranks adds to a step: some schedules pay it once, some all the time."""

from __future__ import annotations

from collections.abc import Iterator

from simulator import schedules
from simulator.schedules import Schedule
from validation.checks import Check, near
from validation.events.replay import Times, replay

GROUP = "schedules"
TORCH = "replay of the lists of torch.distributed.pipelining 2.13.0, messages in units of the latency c"
OTHER_ORDER = (
    "a replay of deepseek-ai/DualPipe whose rule for messages is not published. Replays of DualPipe.step give 34 to 41 "
    "at P 8 and 126 to 141 at P 16 where sends are not awaited, 41 to 45 and 141 to 149 where they are, depending on "
    "when a pair awaits its messages; no rule tried gives both numbers. Here both parts of a pair await theirs, sent "
    "without waiting"
)

GROWING = {
    4: {4: 10, 8: 16, 16: 28, 32: 52},
    8: {8: 26, 16: 40, 32: 68, 64: 124},
    16: {16: 58, 32: 88, 64: 148, 128: 268},
}
"""Latencies that 1F1B pays, by ranks and microbatches."""

PAID_ONCE = (
    ("interleaved", 2, "2(vP-1), whatever M", {4: 14, 8: 30}),
    ("zb1p", 1, "4(P-1), whatever M", {4: 12, 8: 28}),
    ("zbv", 2, "whatever M", {4: 13, 8: 33}),
)
"""Schedule, chunks, form, and the latencies that it pays by ranks."""


def checks() -> Iterator[Check]:
    """Extra makespan per unit of latency."""
    for ranks, by_microbatches in GROWING.items():
        for microbatches, expected in by_microbatches.items():
            source = f"2(P-1)M/P + 2(P-2), P divides M; {TORCH}"
            yield _row(schedules.build("1f1b", ranks, microbatches), expected, source)
    for name, chunks, source, by_ranks in PAID_ONCE:
        for ranks, expected in by_ranks.items():
            for rounds in (2, 4):
                schedule = schedules.build(name, ranks, rounds * ranks, chunks)
                yield _row(schedule, expected, f"{source}; {TORCH}")
    for microbatches, expected in ((8, 16), (16, 28), (32, 52)):
        yield _row(schedules.build("dualpipev", 4, microbatches), expected, f"grows with M; {TORCH}")
    for ranks, microbatches, expected in ((8, 32, 41), (16, 120, 149)):
        yield _row(schedules.build("dualpipe", ranks, microbatches), expected, OTHER_ORDER, None)


def _row(schedule: Schedule, expected: float, source: str, tolerance: float | None = 1e-9) -> Check:
    reached = replay(schedule, Times(message=1)).makespan - replay(schedule, Times()).makespan
    name = f"latency of messages: {schedule.name}, P {schedule.ranks}, M {schedule.microbatches}"
    return near(GROUP, name, expected, reached, "c", tolerance, source)
