"""Every text that a user meets when something is wrong with the input, and the exceptions that carry them.

::

    MoesimError
    ├── InvalidInput      the input cannot be understood or breaks a law; exit code 2
    └── NotSimulated      the input is valid, but this release cannot simulate it; exit code 2

A :class:`Problem` is one finding: where it is (file, line, column), the dotted path, what is wrong, and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from simulator.units import shown

_LISTED = 24


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file with line and column, or a name such as ``--set model=...``."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: ``origin: path: message``, on one line."""

    path: str
    message: str
    origin: Origin | None = None

    def __str__(self) -> str:
        origin = str(self.origin or "")
        path = "" if origin.endswith(f" {self.path}") else self.path  # as in ``--set routing.seed``
        return _one_line(": ".join(part for part in (origin, path, self.message) if part))


class MoesimError(Exception):
    """Base of the errors that are meant for the user's eyes."""


# The two names read as what they say in `raise InvalidInput(...)` and in the command line's documentation.
@dataclass(eq=False)
class InvalidInput(MoesimError):  # noqa: N818
    """The input cannot be understood or breaks a law. Holds every problem that was found."""

    problems: Sequence[Problem] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class NotSimulated(MoesimError):  # noqa: N818
    """The input is valid, but this release has no model for it; the message says what to use instead."""


def invalid(message: str, *, path: str = "", origin: Origin | None = None) -> InvalidInput:
    """Build an :class:`InvalidInput` with a single problem."""
    return InvalidInput([Problem(path, message, origin)])


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the valid name that is closest to what was typed, or None when nothing is close.

    >>> nearest("dualpip", ["1f1b", "dualpipe"])
    'dualpipe'
    """
    found = difflib.get_close_matches(name[:200], list(allowed), n=1, cutoff=0.6)
    return found[0] if found else None


def one_of(name: str, allowed: Iterable[str], what: str) -> str:
    """Say that a name is unknown, which names exist, and which one was probably meant.

    >>> one_of("dualpip", ["1f1b", "dualpipe"], "schedule")
    "unknown schedule 'dualpip'; did you mean 'dualpipe'? Allowed: 1f1b, dualpipe"
    """
    names = sorted(allowed)
    unknown = f"unknown {what} {shown(name)}"
    if not names:
        return f"{unknown}; none is allowed here"
    listed = ", ".join(names[:_LISTED]) + (f", ... ({len(names)} in all)" if len(names) > _LISTED else "")
    close = nearest(name, names)
    return f"{unknown}; did you mean {close!r}? Allowed: {listed}" if close else f"{unknown}; allowed: {listed}"


def _one_line(text: str) -> str:
    """Escape what a terminal cannot show: line breaks, control characters, lone surrogates."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
