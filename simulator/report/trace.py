"""A timeline as Chrome trace JSON, to be opened in Perfetto (ui.perfetto.dev) or chrome://tracing.

One process is one pipeline rank, one thread is one of its in-order streams; on a thread of its own the steps of the
pipeline schedule, and as a counter the memory of the rank. Times are in microseconds with three decimals, that is,
whole nanoseconds. Rounding keeps the order of starts and ends, and no slice reaches the start of the next one on its
track even in double precision, so that a viewer never nests two slices that ran one after another.

Source: the Trace Event Format of the Chromium project (complete events ``X``, counters ``C``, metadata ``M``).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simulator.events import NO_SLACK, MemoryCurve, Timeline, slack, spans
from simulator.program import STREAMS, Program
from simulator.schedules import Schedule
from simulator.timing.classes import Bulk, Compute, Exchange, OpClass, Region, Send, Update

_LETTERS = {"F": "F", "I": "I", "W": "W", "B": "B", "recompute": "B", "again": "B"}
"""Words of a program label that name the action, and the action's letter in torch's notation."""

STEPS = len(STREAMS)
"""Thread of the steps of the schedule."""


def op_names(program: Program, ops: npt.NDArray[np.int64] | None = None) -> list[str]:
    """Every op, or some of them, in torch's notation: stage, letter and microbatch of its action, then what it does.

    ``3F5 dense`` is the dense part of the forward of stage 3 on microbatch 5, ``3SEND_F5`` what it sends on. What
    belongs to a whole stage or rank has no action: ``reduce expert, stage 3``, ``optimizer``.
    """
    forms: dict[tuple[int, int], tuple[str | None, str]] = {}
    names = []
    chosen = slice(None) if ops is None else ops
    columns = (program.label, program.cls, program.stage, program.microbatch)
    for label, cls, stage, microbatch in zip(*(column[chosen].tolist() for column in columns), strict=True):
        form = forms.get((label, cls))
        if form is None:
            form = forms[label, cls] = _form(program.labels[label], program.classes[cls])
        letter, rest = form
        if letter:
            names.append(f"{stage}{letter}{microbatch} {rest}".rstrip())
        else:
            names.append(rest + (f", stage {stage}" if letter is None else ""))
    return names


def chrome_trace(
    timeline: Timeline,
    *,
    lanes: Sequence[int] = (0,),
    schedule: Schedule | None = None,
    memory: Sequence[MemoryCurve] = (),
) -> dict[str, Any]:
    """The timeline of some lanes (ranks of the expert group) as a Chrome trace object.

    Process ids are pipeline ranks; with several lanes each lane of a rank is a process of its own. Every op says how
    much later it could have started, and whether it is critical. With a schedule its steps are shown too, with memory
    curves the bytes of every rank.
    """
    program = timeline.program
    events: list[dict[str, Any]] = []
    names = op_names(program)
    classes = [class_name(each) for each in program.classes]
    later = slack(timeline)
    for position, lane in enumerate(lanes):
        pid = program.rank * len(lanes) + position
        where = "" if len(lanes) == 1 else f", expert rank {lane}"
        events += _metadata(program, pid, where)
        begin, duration = _rounded(timeline.start[:, lane], timeline.end[:, lane])
        shown = np.flatnonzero(duration > 0)
        shown = shown[np.lexsort((shown, begin[shown]))]
        spare = np.round(1e6 * np.maximum(later[shown, lane], 0.0), 3)
        critical = later[shown, lane] < NO_SLACK
        columns = (shown, pid[shown], begin[shown], duration[shown], spare, critical)
        for op, process, ts, dur, slack_us, first in zip(*(column.tolist() for column in columns), strict=True):
            stream = int(program.stream[op])
            about = {
                "class": classes[program.cls[op]],
                "microbatch": int(program.microbatch[op]),
                "stage": int(program.stage[op]),
                "critical": first,
                "slack_us": slack_us,
            }
            events.append(_slice(names[op], STREAMS[stream], process, stream, ts, dur, about))
        pids = [rank * len(lanes) + position for rank in range(program.ranks)]
        if schedule is not None:
            events += _steps(timeline, schedule, lane, pids)
        events += _counters(memory, pids)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"step_time_s": timeline.step_s}}


def write_trace(
    timeline: Timeline,
    path: str | Path,
    *,
    lanes: Sequence[int] = (0,),
    schedule: Schedule | None = None,
    memory: Sequence[MemoryCurve] = (),
) -> None:
    """Write :func:`chrome_trace`: as JSON, compressed when the path ends in ``.gz``, as protobuf when in ``.pftrace``.

    Raises:
        InvalidInput: protobuf needs the optional extra ``trace``.
    """
    path = Path(path)
    if path.suffix == ".pftrace":
        from simulator.report.protobuf import packed, require

        require()
        path.write_bytes(packed(chrome_trace(timeline, lanes=lanes, schedule=schedule, memory=memory)))
        return
    trace = chrome_trace(timeline, lanes=lanes, schedule=schedule, memory=memory)
    data = json.dumps(trace, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(data, compresslevel=6, mtime=0) if path.suffix == ".gz" else data)


def class_name(each: OpClass) -> str:
    """One line on what an op class is.

    >>> class_name(Bulk("all_gather", "gradient", 2e9))
    'all_gather over gradient group, 2.000 GB'
    """
    if isinstance(each, Compute):
        layer = "" if each.layer is None else f", MoE layer {each.layer}"
        repeats = f", {len(each.repeats)} ops recomputed" if each.repeats else ""
        return f"compute {each.which}: {len(each.items)} ops{layer}{repeats}" + (
            ", beside communication" if each.overlapped else ""
        )
    if isinstance(each, Exchange):
        return f"{each.shape} all-to-all, MoE layer {each.layer}"
    if isinstance(each, Region):
        return f"{each.op.kind} over {each.op.group} group"
    if isinstance(each, Bulk):
        return f"{each.kind} over {each.group} group, {each.size_bytes / 1e9:.3f} GB"
    if isinstance(each, Update):
        return f"optimizer update, {each.traffic_bytes / 1e9:.3f} GB read and written"
    return "send to the neighbouring stage" if isinstance(each, Send) else f"fixed time: {each.family}"


def _form(label: str, cls: OpClass) -> tuple[str | None, str]:
    """Letter and rest of a label; the letter is None for work of a stage and empty for work of a rank."""
    words = label.split()
    if isinstance(cls, Send):
        return f"SEND_{words[-1]}", ""
    letter = next((_LETTERS[word] for word in words if word in _LETTERS), "")
    if letter:
        kept = (
            words
            if label.startswith(("recompute", "dispatch again"))
            else [word for word in words if word not in _LETTERS]
        )
        return letter, " ".join(kept)
    if isinstance(cls, Region):
        return ("I" if cls.backward else "F"), label
    if isinstance(cls, Bulk) and not label.startswith("gradient norm"):
        return None, label
    return "", label


def _metadata(program: Program, pid: npt.NDArray[np.int64], where: str) -> list[dict[str, Any]]:
    """Names and order of processes and threads."""
    events: list[dict[str, Any]] = []
    tracks = np.unique(np.stack([program.rank, pid, program.stream]), axis=1).T.tolist()
    for rank, process in sorted({(rank, process) for rank, process, _ in tracks}):
        for name, args in (
            ("process_name", {"name": f"pipeline rank {rank}{where}"}),
            ("process_sort_index", {"sort_index": process}),
        ):
            events.append({"name": name, "ph": "M", "pid": process, "tid": 0, "args": args})
    for _, process, stream in tracks:
        for name, value in (("thread_name", {"name": STREAMS[stream]}), ("thread_sort_index", {"sort_index": stream})):
            events.append({"name": name, "ph": "M", "pid": process, "tid": stream, "args": value})
    return events


def _steps(timeline: Timeline, schedule: Schedule, lane: int, pids: Sequence[int]) -> list[dict[str, Any]]:
    """The steps of the schedule on a thread of their own, in torch's notation."""
    events: list[dict[str, Any]] = []
    for steps, span, process in zip(schedule.steps, spans(timeline, schedule, lane), pids, strict=True):
        for name, value in (("thread_name", {"name": "schedule"}), ("thread_sort_index", {"sort_index": -1})):
            events.append({"name": name, "ph": "M", "pid": process, "tid": STEPS, "args": value})
        begin, duration = _rounded(span[:, 0], span[:, 1])
        for step, ts, dur in zip(steps, begin.tolist(), duration.tolist(), strict=True):
            if dur > 0:
                events.append(_slice(str(step), "schedule", process, STEPS, ts, dur, {}))
    return events


def _counters(memory: Sequence[MemoryCurve], pids: Sequence[int]) -> list[dict[str, Any]]:
    """Bytes of every rank where they change."""
    events: list[dict[str, Any]] = []
    for curve in memory:
        times, sizes = np.round(1e9 * curve.time) / 1e3, curve.bytes
        last = np.append(times[1:] > times[:-1], True)  # of several values at one time the last one stays
        times, sizes = times[last], sizes[last]
        change = np.concatenate([[True], sizes[1:] != sizes[:-1]])
        for ts, size in zip(times[change].tolist(), sizes[change].tolist(), strict=True):
            entry = {"name": "memory", "ph": "C", "pid": pids[curve.rank], "ts": ts, "args": {"bytes": size}}
            events.append(entry)
    return events


def _slice(
    name: str, category: str, process: int, thread: int, ts: float, dur: float, about: dict[str, Any]
) -> dict[str, Any]:
    """One complete event."""
    place = {"pid": process, "tid": thread, "ts": ts, "dur": dur}
    return {"name": name, "cat": category, "ph": "X", **place, "args": about}


def _rounded(
    start: npt.NDArray[np.float64], stop: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Starts and durations in microseconds, on whole nanoseconds, such that start + duration never passes the end."""
    begin, end = (np.round(times * 1e9) for times in (start, stop))
    ts, dur = begin / 1e3, (end - begin) / 1e3
    late = ts + dur > end / 1e3
    return ts, np.where(late, (end - begin - 1.0) / 1e3, dur)
