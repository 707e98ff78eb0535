"""``moesim explain``: a number of an estimate opened into its terms, beside its meaning, formula and source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simulator.report.glossary import KEYS, TERMS, meaning_of
from simulator.report.tables import number, pairs_table

_UNITS = {
    "gpu_hours": "GPU-hours",
    "days": "days",
    "cost_usd": "USD",
    "tokens_per_s_per_accelerator": "tokens/s",
    "model_flop_per_token": "FLOP",
    "model_flop_per_token_noncausal": "FLOP",
    "mfu_peak_flop_per_s": "FLOP/s",
}


def explained(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """One number of an estimate (``values``: its plain data) with its meaning, formula, source and terms."""
    step, held = values["step_breakdown_s"], values["memory_breakdown_bytes"]
    value = values.get(name) if name in KEYS else step.get(name, held.get(name, 0.0))
    opened = {
        "gpu_hours": values["gpu_hours_by_phase"],
        "step_time_s": step,
        "memory_peak_bytes": held,
        "exposed_communication_s": {k: v for k, v in step.items() if k.startswith("exposed_")},
        "all_to_all_bytes_per_token": values["all_to_all_bytes_per_token_by_tier"],
    }
    if isinstance(value, list):  # equal parts of a whole
        width = 100 // max(1, len(value))
        opened[name] = {f"{width * part} to {width * (part + 1)} %": share for part, share in enumerate(value)}
    terms = value if isinstance(value, dict) else opened.get(name, {})
    unit = (
        "s"
        if name.endswith("_s") or name in TERMS
        else "B"
        if "bytes" in name or name in held
        else _UNITS.get(name, "")
    )
    shown = "" if value is None or isinstance(value, dict | list) else f"{value} {unit}".strip()
    meaning = meaning_of(name)
    assert meaning is not None  # the caller has checked the name
    return {"name": name, "value": value, "shown": shown, "unit": unit, **meaning._asdict(), "terms": terms}


def explanations_table(title: str, entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Every number that can be opened, with its meaning."""
    rows = [(entry["name"], entry["shown"], entry["meaning"]) for entry in entries]
    return pairs_table(title, rows, "name", "value", "meaning")


def explanation_view(entry: Mapping[str, Any]) -> RenderableType:
    """One number: value, meaning, formula, source and terms."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    for key, name in (("name", "name"), ("shown", "value"), ("meaning",) * 2, ("formula",) * 2, ("source",) * 2):
        if entry[key]:
            facts.add_row(Text(name, style="dim"), Text(str(entry[key])))
    in_order = isinstance(entry["value"], list)
    terms = sorted(entry["terms"].items(), key=lambda item: 0.0 if in_order else -abs(item[1]))
    if not terms:
        return facts
    rows = [(name, number(value, entry["unit"])) for name, value in terms]
    return Group(facts, Text(), pairs_table("terms", rows, "term", "value"))
