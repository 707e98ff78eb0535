"""How tables and numbers look in a terminal: titles, alignment, and four digits with a prefix."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GIB = 2.0**30


def pairs_table(title: str, rows: Sequence[tuple[str, ...]], *heads: str) -> RenderableType:
    """A plain table of texts."""
    table = new_table(*heads)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return titled(title, table)


def titled(title: str, table: Table) -> RenderableType:
    """A table under its title; rich would wrap a title to the width of the table."""
    return Group(Text(title, style="bold"), table)


def new_table(*heads: str) -> Table:
    """An empty table in the common look; prose is aligned left, numbers right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    prose = {"", "term", "source", "scenario", "preset", "what moved most", "convention", "meaning", "name", "path"}
    whole = {"scenario", "preset", "term", "convention", "name", "quantity"}
    for head in heads:
        table.add_column(head, justify="left" if head in prose else "right", no_wrap=head in whole, overflow="fold")
    return table


def stacked(parts: Sequence[RenderableType]) -> RenderableType:
    """Parts under each other, an empty line after each."""
    return Group(*(Padding(part, (0, 0, 1, 0), expand=False) for part in parts))


def number(value: float, unit: str) -> str:
    """A number for human eyes: four digits and a prefix.

    >>> number(2266213.8, "GPU-hours"), number(0.0164, "s"), number(989.4e12, "FLOP/s")
    ('2.266 M GPU-hours', '16.4 ms', '989.4 TFLOP/s')
    """
    scalable = unit.split("/")[0] in ("B", "FLOP", "s", "W")
    small = ((1e-9, "n"), (1e-6, "u"), (1e-3, "m"))
    large = ((1e15, "P"), (1e12, "T"), (1e9, "G" if scalable else "B"), (1e6, "M"), (1e3, "k" if scalable else "K"))
    if unit == "s":
        if value >= 1.0 or value == 0.0:
            return f"{value:.4g} s"
        scale, prefix = next((pair for pair in reversed(small) if value >= pair[0]), small[0])
        return f"{value / scale:.4g} {prefix}s"
    scale, prefix = next((pair for pair in large if abs(value) >= pair[0]), (1.0, ""))
    return f"{value / scale:.4g} {prefix}{'' if scalable or not prefix else ' '}{unit}".strip()
