"""The answer of ``moesim estimate`` in a terminal: the numbers first, then their terms, then what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from simulator.campaign import TrainingEstimate
from simulator.report.evidence_tables import published_table
from simulator.report.tables import GIB, new_table, number, stacked, titled


def estimate_view(result: TrainingEstimate, published: Sequence[Mapping[str, Any]] = ()) -> RenderableType:
    """The whole answer of ``moesim estimate``."""
    parts: list[RenderableType] = [_headline(result)]
    if published:
        parts.append(published_table(published))
    parts += [step_table(result), memory_table(result), _routing_line(result), assumptions_list(result.assumptions)]
    parts += [Text(f"warning: {text}", style="yellow") for text in result.warnings]
    return stacked(parts)


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
    likely = result.gpu_hours_interval
    if likely is not None:
        low, high = likely
        rows["interval"] = [f"80 %: {low:,.0f} to {high:,.0f} GPU-hours, by the errors of published runs"]
    for name, parts in rows.items():
        table.add_row(name, " ".join(parts))
    return titled(scenario.name, table)


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


def assumptions_list(assumptions: Sequence[str]) -> RenderableType:
    """What the answer takes for granted, one assumption after another."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for text in assumptions:
        table.add_row("-", Text(text))
    return titled("Assumptions", table)


def _idle(name: str) -> bool:
    return name.startswith("exposed_") or name in ("waiting", "waiting_replicas", "bubble")
