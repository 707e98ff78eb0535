"""Terminal tables: the answer first, then the terms that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from simulator.campaign import TrainingEstimate

GIB = 2.0**30


def estimate_view(result: TrainingEstimate, published: Sequence[Mapping[str, Any]] = ()) -> RenderableType:
    """The whole answer of ``moesim estimate``."""
    parts: list[RenderableType] = [_headline(result)]
    if published:
        parts.append(published_table(published))
    parts += [step_table(result), memory_table(result), _routing_line(result)]
    parts += [Text(f"warning: {text}", style="yellow") for text in result.warnings]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def published_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Prediction against publication."""
    table = new_table("", "predicted", "published", "error", "source")
    for row in rows:
        predicted, published = (number(row[key], row["unit"]) for key in ("predicted", "published"))
        table.add_row(
            escape(str(row["quantity"])),
            predicted,
            published,
            f"{row['error_percent']:+.1f} %",
            Text(str(row["source"]), overflow="fold"),
        )
    return titled("Against the published run", table)


def step_table(result: TrainingEstimate) -> RenderableType:
    """Step time term by term."""
    table = new_table("term", "time", "share", "")
    total = result.step_time_s
    compute = {k: v for k, v in result.breakdown.items() if not _idle(k)}
    idle = {k: v for k, v in result.breakdown.items() if _idle(k)}
    for terms in (compute, idle):
        for name, value in sorted(terms.items(), key=lambda item: -item[1]):
            table.add_row(
                name,
                number(value, "s"),
                f"{value / total:.1%}",
                Text("█" * round(40 * value / total), style="cyan" if terms is compute else "red"),
            )
        table.add_section()
    table.add_row("total", number(total, "s"), "100.0%", "")
    return titled(f"One step: {number(total, 's')}  (mean over ranks, {result.step.engine} engine)", table)


def memory_table(result: TrainingEstimate) -> RenderableType:
    """Memory of the worst rank term by term."""
    use, limit = result.step.memory, result.memory_limit_bytes
    verdict = "fits" if result.fits else "does not fit"
    sizes = f"{use.peak_bytes / GIB:.1f} GiB of {limit / GIB:.1f} GiB usable"
    title = f"Memory of the worst rank ({use.rank}): {sizes}: {verdict}"
    table = new_table("term", "size", "share")
    for name, value in sorted(use.terms.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value / GIB:.2f} GiB", f"{value / use.peak_bytes:.1%}")
    table.add_section()
    table.add_row("total", f"{use.peak_bytes / GIB:.2f} GiB", "100.0%")
    return titled(title, table)


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


def checks_view(checks: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What was stated against what is reached, group by group."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for check in checks:
        groups.setdefault(check["group"], []).append(check)
    parts: list[RenderableType] = []
    for group, members in groups.items():
        if group == "runs":
            parts.append(_runs_table(members))
            continue
        rows = [
            (
                check["name"],
                number(check["expected"], check["unit"]),
                number(check["reached"], check["unit"]),
                _tolerance(check),
                {True: "ok", False: "MISSED", None: ""}[check["ok"]],
                check["source"],
            )
            for check in members
        ]
        held = sum(check["ok"] is True for check in members)
        judged = sum(check["ok"] is not None for check in members)
        parts.append(
            pairs_table(
                f"{group}: {held} of {judged} hold", rows, "name", "expected", "reached", "within", "", "source"
            )
        )
    missed = [check["name"] for check in checks if check["ok"] is False]
    held = sum(check["ok"] is True for check in checks)
    parts.append(Text(f"{held} checks hold" + (f"; missed: {'; '.join(missed)}" if missed else "")))
    return Group(*parts)


def _tolerance(check: Mapping[str, Any]) -> str:
    """How far the reached number may be from the expected one."""
    if check["rule"] == "in range":
        low, high = check["range"]
        return f"{low:.3g} to {high:.3g}"
    if check["rule"] != "near":
        return str(check["rule"])
    return "" if check["tolerance"] is None else f"± {number(check['tolerance'], check['unit'])}"


def _runs_table(checks: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Predictions against published runs."""
    rows = [
        (
            check["name"],
            number(check["reached"], check["unit"]),
            number(check["expected"], check["unit"]),
            f"{check['error_percent']:+.1f} %",
            check["source"],
        )
        for check in checks
    ]
    return pairs_table("Predictions against published runs", rows, "name", "predicted", "published", "error", "source")


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


def pairs_table(title: str, rows: Sequence[tuple[str, ...]], *heads: str) -> RenderableType:
    """A plain table of texts."""
    table = new_table(*heads)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return titled(title, table)


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


def _headline(result: TrainingEstimate) -> RenderableType:
    scenario = result.scenario
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    cluster, training, counts, flop = scenario.cluster, scenario.training, result.counts, result.flop
    tokens = number(training.tokens + sum(phase.tokens for phase in training.phases), "").replace(" ", "")
    rows = {
        "run": [f"{tokens} tokens on {cluster.accelerators} x {cluster.profile.name}, stack {cluster.stack_name}"],
        "cost": [
            f"[bold]{result.gpu_hours:,.0f} GPU-hours[/bold] = {result.days:,.1f} days",
            f"= {result.cost_usd:,.0f} USD at {result.price_usd_per_hour:g} USD/h",
        ],
        "speed": [
            f"{result.tokens_per_s_per_accelerator:,.1f} tokens/s per accelerator;",
            f"{result.step_time_s:.3f} s per step of {training.steady_batch_sequences} sequences",
        ],
        "utilisation": [
            f"MFU {result.mfu:.1%} causal, {result.mfu_noncausal:.1%} non-causal; HFU {result.hfu:.1%}",
            f"(of {number(result.peak_flop_per_s, 'FLOP/s')} BF16)",
        ],
        "model": [
            f"{number(counts.total.total, '')} parameters, {number(counts.active.total, '')} active;",
            f"{number(flop.model_flop_per_token, 'FLOP')} per token causal,",
            f"{number(flop.model_flop_per_token_noncausal, 'FLOP')} non-causal",
        ],
    }
    for name, parts in rows.items():
        table.add_row(name, " ".join(parts))
    return titled(scenario.name, table)


def _routing_line(result: TrainingEstimate) -> RenderableType:
    load = result.step.load
    if load is None:
        return Text("routing: dense model")
    tiers = ", ".join(f"{number(size, 'B')} over {name}" for name, size in result.all_to_all_bytes.items()) or "none"
    lost = ""
    if load.dropped_fraction:
        profile, tenth = load.drop_profile, 100 // len(load.drop_profile)
        lost = f" ({profile[0]:.1%} in the first {tenth} % of a capacity group, {profile[-1]:.1%} in the last; "
        lost += f"{load.lost_fraction:.2%} of the tokens lose all their experts)"
    return Text(
        f"routing: the busiest expert is assigned {load.max_over_mean:.2f} x the mean, the busiest rank computes "
        f"{load.rank_max_over_mean:.2f} x; dropped {load.dropped_fraction:.2%}{lost}; "
        f"padding {load.padding_fraction:.1%}; all-to-all per token: {tiers}"
    )


def _idle(name: str) -> bool:
    return name.startswith("exposed_") or name in ("waiting", "waiting_replicas", "bubble")


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
