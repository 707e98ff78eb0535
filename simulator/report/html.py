"""One self-contained HTML page: headline numbers, where they come from, and everything needed to obtain them again.

plotly.js is written into the page once and a content security policy forbids every request, so that the page can be
mailed, archived and opened without a network. All text that comes from a user is escaped.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from simulator.campaign import TrainingEstimate
from simulator.campaign.result import simulator_version
from simulator.events import action_ledger, critical_path
from simulator.report import figures
from simulator.report.glossary import TERMS
from simulator.report.over_time import memory_over_time_figure
from simulator.report.page import bullets, details, figure, filled, save, section, table
from simulator.report.study_pages import study_section
from simulator.report.style import GIB, duration, readable, seconds, short

Row = Mapping[str, Any]


def write_html(
    estimate: TrainingEstimate,
    path: str | Path,
    rows: Sequence[Row] | None = None,
    published: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write the report of an estimate.

    ``rows``: a study's rows, mappings with ``changes`` and the keys of an estimate. ``published``: comparisons with the
    published run, mappings with ``quantity``, ``predicted``, ``published``, ``unit``, ``error_percent`` and ``source``.
    """
    save(path, page(estimate, rows or (), published or ()))


def page(estimate: TrainingEstimate, rows: Sequence[Row] = (), published: Sequence[Mapping[str, Any]] = ()) -> str:
    """The report as text."""
    sections = [
        _warnings(estimate.warnings),
        _headline(estimate),
        _published(published),
        _cost(estimate),
        _timeline(estimate),
        _memory(estimate),
        _experts(estimate),
        study_section(rows),
        section("Assumptions", "", bullets(estimate.assumptions)),
        _scenario(estimate),
    ]
    return filled(estimate.scenario.name, _subtitle(estimate), _footer(estimate), sections)


def _subtitle(estimate: TrainingEstimate) -> str:
    scenario = estimate.scenario
    cluster, training, counts = scenario.cluster, scenario.training, estimate.counts
    parts = [
        f"{scenario.model.name}: {short(counts.total.total)} parameters, {short(counts.active.total)} active",
        f"{short(training.tokens)} tokens in steps of {training.steady_batch_sequences:,.0f} sequences",
        f"{cluster.accelerators:,} × {scenario.profile_name}",
        f"{scenario.parallelism.schedule if isinstance(scenario.parallelism.schedule, str) else 'custom'} schedule",
    ]
    return " · ".join(escape(part) for part in parts)


def _headline(estimate: TrainingEstimate) -> str:
    """The numbers that the reader came for."""
    peak, limit = estimate.step.memory.peak_bytes / GIB, estimate.memory_limit_bytes / GIB
    speed = estimate.tokens_per_s_per_accelerator
    tiles = [
        ("Accelerator-hours", short(estimate.gpu_hours), f"for {short(estimate.scenario.training.tokens)} tokens"),
        ("Duration", duration(estimate.days), f"on {estimate.scenario.cluster.accelerators:,} accelerators"),
        ("Cost", f"{short(estimate.cost_usd)} USD", f"at {estimate.price_usd_per_hour:g} USD per accelerator-hour"),
        ("Step time", seconds(estimate.step_time_s), f"{short(speed)} tokens/s per accelerator"),
        ("MFU", f"{estimate.mfu:.1%}", f"causal; {estimate.mfu_noncausal:.1%} non-causal; HFU {estimate.hfu:.1%}"),
        ("Memory", f"{peak:.1f} GiB", f"of {limit:.1f} GiB usable: {'fits' if estimate.fits else 'does not fit'}"),
    ]
    cells = ""
    for name, value, note in tiles:
        look = "tile bad" if name == "Memory" and not estimate.fits else "tile"
        cells += f'<div class="{look}"><span>{name}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
    return f'<section class="tiles">{cells}</section>'


def _published(published: Sequence[Mapping[str, Any]]) -> str:
    if not published:
        return ""
    body = [
        (
            escape(str(row["quantity"])),
            escape(short(float(row["predicted"]))),
            escape(short(float(row["published"]))),
            escape(str(row["unit"])),
            f"{float(row['error_percent']):+.1f} %",
            escape(str(row["source"])),
        )
        for row in published
    ]
    heads = ("quantity", "predicted", "published", "unit", "error", "source")
    note = "The error is signed: positive when the simulator predicts more."
    return section("Against the published run", note, table(heads, "lrrlrl", body))


def _cost(estimate: TrainingEstimate) -> str:
    terms, price = estimate.breakdown, estimate.price_usd_per_hour
    body = []
    for name, value in sorted(terms.items(), key=lambda item: -item[1]):
        meaning = TERMS[name].meaning if name in TERMS else ""
        body.append((escape(readable(name)), f"{value:.4f}", f"{value / terms.total:.2%}", escape(meaning)))
    body.append(("<b>step</b>", f"<b>{terms.total:.4f}</b>", "<b>100.00%</b>", ""))
    phases = [
        (escape(name), f"{estimate.phase_seconds[name] / 86400:,.2f}", f"{hours:,.0f}", f"{hours * price:,.0f}")
        for name, hours in estimate.phase_gpu_hours.items()
    ]
    return section(
        "Where the cost goes",
        "Time of one steady step, mean over pipeline ranks. The terms are what the compute stream of a rank does, "
        "and why it pauses; they sum to the step.",
        figure(figures.breakdown_figure(estimate), "breakdown"),
        details("All terms with their meaning", table(("term", "s", "share", "meaning"), "lrrl", body)),
        figure(figures.cost_figure(estimate), "cost"),
        table(("phase", "days", "accelerator-hours", "USD"), "lrrr", phases),
    )


def _timeline(estimate: TrainingEstimate) -> str:
    timeline = estimate.step.timeline
    path = critical_path(timeline)
    parts = [
        ("by kind of action", action_ledger(timeline, estimate.step.schedule)),
        ("along the critical path", path.terms),
    ]
    opened = [
        details(
            f"The step {name}",
            table(
                ("term", "s", "share"),
                "lrr",
                [
                    (escape(readable(term)), f"{value:.4f}", f"{value / timeline.step_s:.2%}")
                    for term, value in sorted(ledger.items(), key=lambda item: -item[1])
                ],
            ),
        )
        for name, ledger in parts
    ]
    return section(
        "Step timeline",
        "Above: the share of time in which each pipeline rank computes; the frame marks the window below. Below: every "
        "op of that window. A dispatch or combine that lies under compute costs nothing; a gap in a compute row is "
        "communication that nothing hides, waiting, or bubble. Hover names an op, drag zooms, double click returns.",
        figure(figures.step_figure(timeline), "step"),
        figure(figures.timeline_figure(timeline), "timeline"),
        *opened,
    )


def _memory(estimate: TrainingEstimate) -> str:
    use = estimate.step.memory
    note = f"Allocated bytes on the worst rank at its worst moment, with {use.in_flight:g} microbatches kept."
    return section(
        "Memory",
        note,
        figure(figures.memory_figure(estimate), "memory"),
        figure(memory_over_time_figure(estimate), "memory-over-time"),
    )


def _experts(estimate: TrainingEstimate) -> str:
    load = estimate.step.load
    if load is None:
        return section("Expert load", "A dense model: no token is routed.")
    body = [
        ("dropped expert assignments", f"{load.dropped_fraction:.2%}"),
        ("tokens that lose all their experts", f"{load.lost_fraction:.2%}"),
        ("padding of computed expert rows", f"{load.padding_fraction:.2%}"),
        ("busiest expert over the mean", f"{load.max_over_mean:.3f}"),
        ("busiest expert-parallel rank over the mean", f"{load.rank_max_over_mean:.3f}"),
        *(
            (f"all-to-all over {escape(tier)}, kB per token and step", f"{size / 1e3:,.1f}")
            for tier, size in estimate.all_to_all_bytes.items()
        ),
    ]
    experts, tokens = load.assigned.shape[-1], int(load.tokens.max())
    note = (
        f"Load of one expert group: {tokens:,} tokens per microbatch, top {load.top_k} of {experts:,} experts "
        f"on {load.ranks} ranks."
    )
    drawn = [figure(figures.load_figure(load), "load")]
    if load.dropped_fraction > 0.0:
        drawn.append(figure(figures.position_figure(load), "position"))
    return section("Expert load", note, *drawn, table(("quantity", "value"), "lr", body))


def _warnings(warnings: Sequence[str]) -> str:
    return f'<section class="warning">{bullets(warnings)}</section>' if warnings else ""


def _scenario(estimate: TrainingEstimate) -> str:
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 110
    yaml.dump(estimate.scenario.as_dict(), stream)
    text = f"<pre>{escape(stream.getvalue())}</pre>"
    return section(
        "Scenario",
        "Presets expanded and defaults filled in: this text is a scenario file.",
        details("Resolved scenario", text),
    )


def _footer(estimate: TrainingEstimate) -> str:
    step = estimate.step
    parts = (
        f"moesim {simulator_version()}",
        f"{step.engine} engine",
        f"seed {estimate.scenario.routing.seed}",
        f"{len(step.program):,} ops per step",
    )
    return " · ".join(escape(part) for part in parts)
