"""The frame of an HTML page, with places to be filled, and the pieces in them.

plotly.js is written into the page once and a content security policy forbids every request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;
 form-action 'none'; base-uri 'none'">
<title>@title@</title>
<style>
:root { --ink: #222; --soft: #5c6470; --line: #e3e6ea; --ground: #f6f7f9; --accent: #0072b2; --bad: #d55e00; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 Inter, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 36px 20px 60px; }
header h1 { margin: 0 0 4px; font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p, footer { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px; margin: 22px 0; }
h2 { margin: 0 0 4px; font-size: 20px; }
section > p { margin: 0 0 14px; color: var(--soft); max-width: 110ch; }
section > ul { margin: 8px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 0; padding: 8px 0; }
.tile { padding: 12px 20px; border-left: 1px solid var(--line); margin-left: -1px; }
.tile span, .tile small { display: block; color: var(--soft); font-size: 13px; line-height: 1.35; }
.tile b { display: block; font-size: 25px; line-height: 1.3; color: var(--accent); white-space: nowrap; }
.tile.bad b { color: var(--bad); }
.warning { border-color: var(--bad); border-left-width: 5px; }
.warning ul { margin: 0; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 18px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th.n, td.n { text-align: right; white-space: nowrap; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; background: var(--ground); padding: 14px; border-radius: 8px;
  font-size: 12.5px; line-height: 1.45; }
.plotly-graph-div { width: 100%; min-width: 820px; }
@media print { body { background: #fff; } section { border: 0; padding: 0; break-inside: avoid; } }
</style>
<script>@plotly@</script>
</head>
<body>
<main>
<header><h1>@title@</h1><p>@subtitle@</p></header>
@sections@
<footer>@footer@</footer>
</main>
</body>
</html>
"""


def filled(title: str, subtitle: str, footer: str, sections: Iterable[str]) -> str:
    """A whole page; the title is plain text, all else HTML already, and empty sections are left out."""
    words = {
        "title": escape(title),
        "subtitle": subtitle,
        "footer": footer,
        "sections": "\n".join(each for each in sections if each),
        "plotly": get_plotlyjs(),
    }
    return re.sub("@([a-z]+)@", lambda mark: words[mark[1]], PAGE)  # in one pass: no word is looked for inside another


def save(path: str | Path, text: str) -> None:
    """Write a page whole or not at all: an existing file stays as it is until the new one is complete."""
    path = Path(path)
    if path.exists() and not path.is_file():  # such as /dev/stdout, or a folder, which is refused here
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def section(title: str, note: str, *parts: str) -> str:
    """A titled section with a line of explanation; ``parts`` are HTML already."""
    return f"<section><h2>{title}</h2>" + (f"<p>{escape(note)}</p>" if note else "") + "\n".join(parts) + "</section>"


def bullets(texts: Iterable[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def details(summary: str, content: str) -> str:
    """HTML that is shown on request."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def table(heads: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; ``align`` has l or r for each column."""
    sides = [' class="n"' if side == "r" else "" for side in align]
    head = "".join(f"<th{side}>{name}</th>" for name, side in zip(heads, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{cell}</td>" for cell, side in zip(row, sides, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(drawn: go.Figure, name: str) -> str:
    """A figure without the library, under a fixed name, so that the same estimate gives the same page."""
    config = {
        "displaylogo": False,
        "responsive": True,
        "showSendToCloud": False,  # on by default since plotly 7: a button that uploads the figure
        "plotlyServerURL": "",
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
        "toImageButtonOptions": {"format": "svg", "filename": f"moesim-{name}"},
    }
    content = drawn.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=config)
    return f'<div class="scroll">{content}</div>'
