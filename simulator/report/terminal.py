"""The terminal: results on stdout, progress and notes on stderr.

rich is imported only when something is drawn, so that ``moesim --help`` stays quick.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator import errors

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_WIDTH = 160
"""Columns of a table that is not printed to a terminal."""


def show(view: RenderableType) -> None:
    """Print a table or text on stdout."""
    from rich.console import Console

    asked = os.environ.get("COLUMNS", "")
    wide = None if sys.stdout.isatty() else max(PLAIN_WIDTH, int(asked) if asked.isdecimal() else 0)
    Console(width=wide, highlight=False).print(view)


def print_json(value: object) -> None:
    """Print plain data on stdout as strict JSON."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def note(text: str) -> None:
    """Print one line on stderr."""
    sys.stderr.write(text + "\n")


def writing(path: Path, write: Callable[[], Any]) -> None:
    """Write a file; a failure becomes one message.

    Raises:
        InvalidInput: the file cannot be written.
    """
    try:
        write()
    except OSError as error:
        reason = (error.strerror or "error").lower()
        raise errors.invalid(f"cannot be written: {reason}", origin=errors.Origin(str(path))) from None


def ready(path: Path) -> None:
    """Refuse a file that cannot be written before the work for it begins.

    Raises:
        InvalidInput: it is a folder, or its folder is missing or read-only.
    """

    def probe() -> None:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not path.exists():
            with tempfile.TemporaryFile(dir=path.parent):
                pass

    writing(path, probe)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show on stderr that something runs, where a person watches."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def counting(total: int) -> Iterator[Callable[[object], None]]:
    """Show on stderr how many rows are done; call what it gives once for each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("scenarios", total=total)
        yield lambda row: progress.update(task, advance=1)
