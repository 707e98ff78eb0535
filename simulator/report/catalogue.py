"""Lists of what ships: model presets with their counts, hardware profiles with their sources, as data and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from simulator.report.tables import new_table, number, pairs_table, titled
from simulator.spec import load_model, load_profile
from simulator.spec.fields import sourced_numbers
from simulator.workload import parameters


def model_row(preset: str) -> dict[str, Any]:
    """Computed and published counts of one preset, with the convention of each."""
    model = load_model(preset)
    counts, published = parameters.count(model), model.published
    total = counts.non_embedding if published and published.total_convention == "non_embedding" else counts.total.total
    row: dict[str, Any] = {
        "preset": preset,
        "name": model.name,
        "total": counts.total.total,
        "active": counts.active.total,
        "active_excl_input_embedding": counts.active_excl_input_embedding,
        "non_embedding_total": counts.non_embedding,
        "non_embedding_active": counts.non_embedding_active,
        "mtp": counts.mtp,
        "published_total": published.total if published else None,
        "total_convention": published.total_convention if published else None,
        "total_error_percent": 100.0 * (total / published.total - 1.0) if published and published.total else None,
        "published_active": published.active if published else None,
        "active_convention": published.active_convention if published and published.active else None,
        "active_error_percent": None,
        "source": published.source if published else None,
    }
    if published and published.active and published.active_convention != "not_an_active_count":
        key = {"non_embedding": "non_embedding_active"}.get(published.active_convention, published.active_convention)
        row["active_error_percent"] = 100.0 * (row[key] / published.active - 1.0)
    return row


def models_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Computed against published parameter counts."""
    table = new_table(
        "preset", "total", "published", "error", "active",
        "no input table", "non-embedding", "published", "error", "convention",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["preset"],
            number(row["total"], ""),
            number(row["published_total"], "") if row["published_total"] else "",
            f"{row['total_error_percent']:+.2f} %" if row["total_error_percent"] is not None else "",
            number(row["active"], ""),
            number(row["active_excl_input_embedding"], ""),
            number(row["non_embedding_active"], ""),
            number(row["published_active"], "") if row["published_active"] else "",
            f"{row['active_error_percent']:+.1f} %" if row["active_error_percent"] is not None else "",
            row["active_convention"] or "",
        )
    return titled("Model presets: parameters computed from the op list against published", table)


def parameters_table(preset: str) -> RenderableType:
    """Parameters of one preset by family: total and active."""
    counts = parameters.count(load_model(preset))
    rows = [(name, number(value, ""), number(counts.active.get(name, 0.0), "")) for name, value in counts.total.items()]
    return pairs_table(f"{preset}: parameters by family", rows, "term", "total", "active")


def profile_row(name: str) -> dict[str, str]:
    """One line about a profile."""
    profile = load_profile(name)
    chip = profile.accelerator
    kinds = [leaf.kind for _, leaf in sourced_numbers(profile)]
    return {
        "name": name,
        "bf16": number(chip.peak["bf16"].value, "FLOP/s"),
        "memory": f"{chip.memory_bytes.value / 2**30:.1f} GiB",
        "bandwidth": number(chip.memory_bandwidth.value, "B/s"),
        "tiers": ", ".join(f"{tier.name} {number(tier.bandwidth.value, 'B/s')}" for tier in profile.tiers),
        "stacks": ", ".join(profile.stacks),
        "provenance": ", ".join(
            f"{kinds.count(kind)} {kind}" for kind in ("datasheet", "measured", "fitted", "assumed")
        ),
    }


def profiles_table(rows: Sequence[Mapping[str, str]]) -> RenderableType:
    """One line for each profile."""
    return pairs_table("Hardware profiles", [tuple(row.values()) for row in rows], *rows[0])


def profile_table(name: str) -> RenderableType:
    """Every number of a profile: path, value, kind, error, source."""
    profile = load_profile(name)
    rows: list[tuple[str, ...]] = []
    for path, leaf in sourced_numbers(profile):
        shown = leaf.model_dump(mode="json")["value"]
        rows.append((path, str(shown), leaf.kind, leaf.error or "", profile.sources[leaf.source]))
    return pairs_table(f"{name}: every number and its source", rows, "path", "value", "kind", "error", "source")
