"""The record of a measurement: one JSON object per line, appended as soon as a case has been timed.

The first line says on what was measured (:class:`Environment`), every further one is a :class:`Record`: a case, in
which of several separated passes it was timed, and the seconds. A file holds one environment. Nothing is ever
rewritten: a measurement that was interrupted leaves what it finished, and the next run does the rest. A last line
without its end is what an interruption in the middle of writing leaves; it is dropped.
What a record is worth, since a processor is not equally fast all the time, is in :mod:`validation.steadiness`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from simulator.errors import InvalidInput, Origin, Problem, invalid, one_of

Contract = TypeVar("Contract", "Environment", "Record")


@dataclass(frozen=True)
class Environment:
    """On what was measured: device, versions and threads, which make the ``id``, date and noise floor.

    ``noise_floor``: median over minimum of the reference kernel's times at the start, minus 1.
    """

    id: str
    device: str
    kind: str
    threads: int
    torch: str
    python: str
    date: str
    cores: int
    memory_bytes: int
    driver: str | None
    noise_floor: float


@dataclass(frozen=True)
class Record:
    """One case in one pass.

    ``seconds`` is the minimum over ``repeats``, ``median_s`` their median, ``spread`` the distance of their quartiles
    over the median; ``reference_s`` the seconds of the reference kernel around the case; ``number`` the pass, from 1.
    """

    key: str
    kind: str
    number: int
    environment: str
    case: Mapping[str, Any]
    seconds: float
    median_s: float
    spread: float
    repeats: int
    reference_s: float


@dataclass(frozen=True)
class Recording:
    """What a file holds."""

    environment: Environment
    records: tuple[Record, ...]


def append(path: Path, entry: Environment | Record) -> None:
    """Write one line at the end; an unfinished last line gives way to it."""
    content = {"environment": asdict(entry)} if isinstance(entry, Environment) else asdict(entry)
    line = json.dumps(content, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.truncate(_finished(file.seek(0, os.SEEK_END), path))
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Recording:
    """Read a file of records.

    Raises:
        InvalidInput: no such file, or lines that are no records, with their numbers.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise invalid(f"cannot be read: {error.strerror}", origin=Origin(str(path))) from None
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    problems: list[Problem] = []
    environment: Environment | None = None
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        origin = Origin(str(path), number)
        try:
            entry = _entry(line, first=number == 1)
        except ValueError as error:
            problems.append(Problem("", str(error), origin))
            continue
        if isinstance(entry, Environment):
            environment = entry
        elif environment is not None and entry.environment != environment.id:
            message = f"is of another environment ({entry.environment}) than the file ({environment.id})"
            problems.append(Problem("", message, origin))
        else:
            records.append(entry)
    if not lines:
        problems.append(Problem("", "has no environment and no records", Origin(str(path))))
    if problems or environment is None:
        raise InvalidInput(problems)
    return Recording(environment, tuple(records))


def resume(path: Path, environment: Environment) -> Recording:
    """Begin a file, or go on with one that the same environment began.

    Raises:
        InvalidInput: the file is not of this environment, or holds lines that are no records.
    """
    if not path.exists() or not _finished(path.stat().st_size, path):
        append(path, environment)
    found = read(path)
    if found.environment.id != environment.id:
        ours, theirs = asdict(environment), asdict(found.environment)
        differing = [name for name in ("device", "kind", "threads", "torch", "python") if ours[name] != theirs[name]]
        differences = ", ".join(f"{name} {theirs[name]} there, {ours[name]} here" for name in differing)
        message = f"was recorded in another environment ({differences or 'cores or memory'}); name another file"
        raise invalid(message, origin=Origin(str(path)))
    return found


def finished_keys(records: Iterable[Record], number: int) -> frozenset[str]:
    """Cases that a pass has done."""
    return frozenset(record.key for record in records if record.number == number)


def _finished(size: int, path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if size else 0


def _entry(line: bytes, *, first: bool) -> Environment | Record:
    try:
        content = json.loads(line)
    except ValueError:
        raise ValueError("is not a line of JSON") from None
    if not isinstance(content, dict):
        raise ValueError("must be a JSON object")
    if first != (set(content) == {"environment"}):
        raise ValueError("the first line, and no other, must be the environment")
    if first and not isinstance(content["environment"], dict):
        raise ValueError("environment must be a JSON object")
    return _filled(Environment, content["environment"]) if first else _filled(Record, content)


def _filled(contract: type[Contract], content: dict[str, Any]) -> Contract:
    """Build a record or environment.

    Raises:
        ValueError: a field that is missing, unknown or of a wrong kind.
    """
    names = {field.name: str(field.type) for field in fields(contract)}
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"lacks {', '.join(missing)}")
    for name, value in content.items():
        if name not in names:
            raise ValueError(one_of(name, names, "field"))
        if not _fits(value, names[name]):
            raise ValueError(f"{name} must be {_KINDS[names[name]]} (got {json.dumps(value)[:60]})")
    if contract is Record:
        for name in ("seconds", "median_s", "reference_s"):
            if content[name] <= 0.0:
                raise ValueError(f"{name} must be above 0 (got {content[name]})")
    return contract(**content)


_KINDS = {
    "str": "a text",
    "str | None": "a text or null",
    "int": "a whole number of zero or more",
    "float": "a number of zero or more",
    "Mapping[str, Any]": "a JSON object",
}


def _fits(value: object, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value >= 0
    return {
        "str": isinstance(value, str),
        "str | None": value is None or isinstance(value, str),
        "int": number and isinstance(value, int),
        "float": number,
        "Mapping[str, Any]": isinstance(value, dict),
    }[kind]


__all__ = [
    "Environment", "Record", "Recording", "append", "finished_keys", "read", "resume",
]  # fmt: skip
