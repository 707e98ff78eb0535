"""Schedules from files: one row per rank, the cells are its actions in order, as PyTorch's pipelining writes them.

Cells such as ``0F3``, ``4I0``, ``4W0``, ``3B0`` and ``(4F4;3B0)OVERLAP_F_B`` are steps. Empty cells, rows of nothing
else, and the actions that are no work of a pipeline schedule (sends, receives, sharding, gradient reduction) are
skipped, so that both of PyTorch's forms are read, compute only and with communication. Where a stage sits follows from
the rows. Each stage sits on one rank; or each on two, r and P-1-r, and the microbatches 0 .. M/2-1 run from rank 0 on,
as in DualPipe.

Source of the format: ``torch.distributed.pipelining.schedules`` of PyTorch 2.13.0, ``_dump_csv`` and
``_Action.from_str``.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from simulator import errors
from simulator.errors import Origin
from simulator.schedules.actions import Action, Overlapped, Schedule, Step, parts
from simulator.schedules.laws import check
from simulator.units import shown

PATH = "parallelism.schedule.file"
MAX_BYTES = 50_000_000

_ACTION = re.compile(r"([0-9]{1,9})([FIWB])([0-9]{1,9})")
_PAIR = re.compile(r"\(\s*([0-9]\w*)\s*;\s*([0-9]\w*)\s*\)\s*OVERLAP_F_B")
_NO_WORK = re.compile(r"[0-9]{1,9}(?:(?:SEND|RECV)_[FB]|UNSHARD|RESHARD|REDUCE_GRAD)[0-9]{0,9}")

Row = tuple[int, tuple[Step, ...]]
"""Line of the file, and the steps in it."""


def read(file: str | Path, ranks: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """Read a schedule file for P ranks, M microbatches and P x v stages, and check it. Cached while it is unchanged.

    Raises:
        InvalidInput: no such file, a cell that is no action, other sizes than asked for, or lists that are incomplete
            or wait for each other for ever. The text names file, line, cell or rank and action.
    """
    path = Path(file)
    try:
        if not path.exists():
            raise errors.invalid(f"no such file: {shown(str(file))}", path=PATH)
        if not path.is_file():
            _stop(path, "is not a file; give a CSV file with one row per pipeline rank")
        found = path.stat()
        if found.st_size > MAX_BYTES:
            _stop(path, f"has {found.st_size / 1e6:.0f} MB; at most {MAX_BYTES / 1e6:.0f} MB are read")
        return _schedule(path, (found.st_mtime_ns, found.st_size), ranks, microbatches, virtual_stages)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or "not a file name").lower()
        raise errors.invalid(f"{shown(str(file))} cannot be read: {reason}", path=PATH) from None


@lru_cache(maxsize=16)
def _schedule(path: Path, version: tuple[int, int], ranks: int, microbatches: int, virtual_stages: int) -> Schedule:
    rows = _rows(path)
    if len(rows) != ranks:
        _stop(path, f"holds {len(rows)} rows with actions, one per rank, but parallelism.pipeline is {ranks}")
    stages = ranks * virtual_stages
    every = [(action, line) for line, steps in rows for step in steps for action in parts(step)]
    largest, line = max(every, key=lambda each: each[0].stage)
    if largest.stage + 1 != stages:
        _stop(
            path,
            f"{largest}: stages 0 to {largest.stage}, but pipeline {ranks} x virtual_stages {virtual_stages} makes "
            f"{stages} stages",
            line,
        )
    largest, line = max(every, key=lambda each: each[0].microbatch)
    if largest.microbatch + 1 != microbatches:
        _stop(
            path,
            f"{largest}: microbatches 0 to {largest.microbatch}, but the batch makes {microbatches} microbatches per "
            "pipeline",
            line,
        )
    schedule = Schedule(
        name=path.name,
        ranks=ranks,
        stages=stages,
        microbatches=microbatches,
        steps=tuple(steps for _, steps in rows),
        placement=_placement(path, rows, stages),
    )
    try:
        check(schedule)
    except ValueError as error:
        message = str(error).removeprefix(f"{schedule.name}: ")
        rank = re.search(r"rank (\d+)", message)
        _stop(path, message, rows[int(rank[1])][0] if rank else None)
    return schedule


def _rows(path: Path) -> list[Row]:
    """Rows with work, in order."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        _stop(path, "is not UTF-8 text; give a CSV file with one row per pipeline rank")
    rows = []
    reader = csv.reader(text.splitlines(), strict=True)
    try:
        for cells in reader:
            texts = [cell.strip() for cell in cells]
            steps = [_step(path, reader.line_num, cell) for cell in texts if cell and not _NO_WORK.fullmatch(cell)]
            if steps:
                rows.append((reader.line_num, tuple(steps)))
    except csv.Error as error:
        _stop(path, f"not CSV: {error}", reader.line_num)
    return rows


def _step(path: Path, line: int, cell: str) -> Step:
    single, pair = _ACTION.fullmatch(cell), _PAIR.fullmatch(cell)
    found = [single] if single else [_ACTION.fullmatch(part) for part in pair.groups()] if pair else []
    actions = [Action(int(each[1]), each[2], int(each[3])) for each in found if each]  # type: ignore[arg-type]
    if not found or len(actions) < len(found):
        _stop(
            path,
            f"cell {shown(cell)} is no action; write stage, F, I, W or B, and microbatch, such as 0F3, or a pair such "
            "as (4F4;3B0)OVERLAP_F_B",
            line,
        )
    return Overlapped(*actions) if pair else actions[0]


def _placement(path: Path, rows: list[Row], stages: int) -> tuple[tuple[int, ...], ...]:
    """Stages of each rank: in order, or the two of a bidirectional schedule, that of the first half first."""
    held = [tuple(sorted({action.stage for step in steps for action in parts(step)})) for _, steps in rows]
    homes: defaultdict[int, list[int]] = defaultdict(list)
    for rank, mine in enumerate(held):
        for stage in mine:
            homes[stage].append(rank)
    for stage in range(stages):
        if not homes[stage]:
            _stop(path, f"no rank works on stage {stage}")
    both = tuple((rank, len(rows) - 1 - rank) for rank in range(len(rows)))
    if len(rows) % 2 == 0 and held == [tuple(sorted(pair)) for pair in both]:
        return both
    for stage, at in sorted(homes.items()):
        if len(at) > 1:
            listed = ", ".join(map(str, at[:8]))
            _stop(
                path,
                f"stage {stage} is on the ranks {listed}; a stage is on one rank, or every stage is on two, rank r "
                "holding the stages r and P-1-r",
                rows[at[1]][0],
            )
    return tuple(held)


def _stop(path: Path, message: str, line: int | None = None) -> NoReturn:
    raise errors.invalid(message, path=PATH, origin=Origin(str(path), line))
