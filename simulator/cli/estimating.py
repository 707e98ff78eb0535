"""Verbs about one scenario: its estimate, one step of it, one of its numbers opened, and all of it on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulator import errors
from simulator.cli.options import Engine, EngineOption, JsonOption, ScenarioArgument, SetOption, load
from simulator.cli.studies import over_training
from simulator.report.terminal import note, print_json, show, working, writing


def estimate(
    scenario: ScenarioArgument, set_: SetOption = None, json_: JsonOption = False, engine: EngineOption = Engine.events
) -> None:
    """Estimate a training run: GPU-hours, days, dollars, memory, and every term of the step."""
    with working(f"estimating {scenario}"):
        from simulator.campaign import estimate as run

        loaded = load(scenario, set_)
        result = run(loaded, engine.reader)
    if json_:
        print_json(result.as_dict())
    else:
        from simulator.report.estimate_view import estimate_view
        from validation.accuracy import against_published

        published = against_published(Path(scenario).stem, result)
        show(estimate_view(result, published))
    for text in result.warnings if json_ else ():
        note(f"warning: {text}")
    raise typer.Exit(0 if result.fits else 1)


def step(
    scenario: ScenarioArgument,
    set_: SetOption = None,
    json_: JsonOption = False,
    engine: EngineOption = Engine.events,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write the timeline for Perfetto: as Chrome JSON, .json.gz compressed, or .pftrace (extra `trace`)."
        ),
    ] = None,
    over_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**9,
            metavar="N",
            help="Simulate no step: show the expert load at training steps 0 to N under each balancing strategy.",
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="With --over-steps: also draw the load, on one self-contained HTML page.")
    ] = None,
) -> None:
    """Simulate one training step and show where its time goes; or show the expert load over many steps."""
    if over_steps is not None:
        if trace is not None:
            raise errors.invalid("needs a simulated step; leave --over-steps out", path="--trace")
        over_training(load(scenario, set_), over_steps, json_, figure)
        return
    if figure is not None:
        raise errors.invalid("draws the expert load over training steps; add --over-steps N", path="--figure")
    if trace is not None and trace.suffix == ".pftrace":
        from simulator.report.protobuf import require

        require()
    with working(f"simulating one step of {scenario}"):
        from simulator.campaign import simulate_step

        result = simulate_step(load(scenario, set_), engine.reader)
        if trace is not None:
            from simulator.report.trace import write_trace

            writing(
                trace,
                lambda: write_trace(result.timeline, trace, schedule=result.schedule, memory=result.memory_curves),
            )
    from simulator.report import step_view

    if json_:
        print_json({**step_view.step_values(result), "trace": str(trace) if trace else None})
        return
    show(step_view.step_view(result))
    if trace is not None:
        note(f"wrote {trace}")


def explain(
    scenario: ScenarioArgument,
    term: Annotated[
        str | None, typer.Argument(help="A key of the estimate or a term of a breakdown; default: list them.")
    ] = None,
    set_: SetOption = None,
    json_: JsonOption = False,
    engine: EngineOption = Engine.events,
) -> None:
    """Open a number into its terms, with meaning, formula and source."""
    from simulator.report import glossary

    if term is not None and glossary.meaning_of(term) is None:
        raise errors.invalid(errors.one_of(term, glossary.known_terms(), "term"), path="explain")
    with working(f"estimating {scenario}"):
        from simulator.campaign import estimate as run

        values = run(load(scenario, set_), engine.reader).as_dict()
    from simulator.report import explanation

    entries = [explanation.explained(name, values) for name in ([term] if term else glossary.known_terms())]
    if json_:
        print_json(entries[0] if term else entries)
    elif term is None:
        show(explanation.explanations_table(f"{values['name']}: numbers that can be opened", entries))
    else:
        show(explanation.explanation_view(entries[0]))


def report(
    scenario: ScenarioArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")] = Path("report.html"),
    set_: SetOption = None,
    engine: EngineOption = Engine.events,
) -> None:
    """Write one self-contained HTML page: cost, timeline, memory, expert load, sweep."""
    with working(f"writing the report of {scenario}"):
        from simulator import study
        from simulator.campaign import estimate as run
        from simulator.report.html import write_html
        from validation.accuracy import against_published

        loaded = load(scenario, set_)
        result = run(loaded, engine.reader)
        rows = study.sweep(loaded) if len(study.points(loaded)) > 1 else []
        published = against_published(Path(scenario).stem, result)
        writing(
            out,
            lambda: write_html(
                result, out, rows=[row.as_dict() for row in rows if row.error is None], published=published
            ),
        )
    note(f"wrote {out}")
