"""Verbs about many scenarios: one beside another, a sweep of one, and its expert load over many training steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulator import errors
from simulator.cli.options import Engine, EngineOption, JobsOption, JsonOption, ScenarioArgument, SetOption, load
from simulator.report.terminal import counting, note, print_json, ready, show, working, writing

if TYPE_CHECKING:
    from simulator.spec import Scenario
    from simulator.study import Row


def compare(
    scenarios: Annotated[list[str], typer.Argument(help="One scenario with variants, or several scenarios.")],
    set_: SetOption = None,
    json_: JsonOption = False,
    engine: EngineOption = Engine.events,
    jobs: JobsOption = None,
) -> None:
    """Compare scenarios, or the variants of one, term by term."""
    from simulator import study

    loaded = [(name, load(name, set_)) for name in scenarios]
    if len(loaded) == 1:
        base = loaded[0][1]
        if not base.variants:
            raise errors.invalid(
                "has no variants; give a second scenario", path="variants", origin=errors.Origin(scenarios[0])
            )
        with counting(1 + len(base.variants)) as advance:
            rows = study.variants(base, engine.reader, jobs=jobs, finished=advance)
    else:
        with counting(len(loaded)) as advance:
            rows = study.compare(loaded, engine.reader, jobs=jobs, finished=advance)
    _show_rows(rows, json_, terms=True)


def sweep(
    scenario: ScenarioArgument,
    set_: SetOption = None,
    json_: JsonOption = False,
    engine: EngineOption = Engine.max_plus,
    jobs: JobsOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Append finished rows to this JSON-lines file; a later run resumes from it.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw the rows, on one self-contained HTML page.")] = None,
) -> None:
    """Run the variants and the sweep axes of a scenario: one row each, against the base."""
    from simulator import study

    loaded = load(scenario, set_)
    points = study.points(loaded)
    if len(points) == 1:
        raise errors.invalid("has neither sweep nor variants", path="sweep", origin=errors.Origin(scenario))
    if figure is not None:
        ready(figure)
    done: list[Row] = []
    try:
        with counting(len(points)) as advance:

            def finished(row: Row) -> None:
                done.append(row)
                advance(row)

            rows = study.sweep(loaded, engine.reader, jobs=jobs, store=out, finished=finished)
    except KeyboardInterrupt:
        if done:
            _show_rows(sorted(done, key=lambda row: row.kind != "base"), json_, terms=False)
        note(f"interrupted: {len(done)} of {len(points)} rows are finished; --out FILE keeps them for a later run")
        raise typer.Exit(130) from None
    _show_rows(rows, json_, terms=False)
    if figure is not None:
        from simulator.report.study_pages import write_sweep

        writing(figure, lambda: write_sweep(loaded, rows, figure))
        note(f"wrote {figure}")


def over_training(scenario: Scenario, last: int, json_: bool, figure: Path | None) -> None:
    """Expert load at training steps from 0 to ``last``, as a table or JSON and as a page."""
    from simulator.study.balancing import about_nine, load_over_steps

    if figure is not None:
        ready(figure)
    with working(f"following the expert load over {last:,} training steps"):
        rows = load_over_steps(scenario, about_nine(last))
    if json_:
        print_json({"rows": [row.as_dict() for row in rows]})
    else:
        from simulator.report.study_tables import load_table

        show(load_table(scenario.name, rows))
    if all(row.max_violation < 1e-9 for row in rows):
        note("routing.load is even by itself: there is nothing to balance")
    if figure is not None:
        from simulator.report.study_pages import write_over_steps

        writing(figure, lambda: write_over_steps(scenario, rows, figure))
        note(f"wrote {figure}")


def _show_rows(rows: Sequence[Row], json_: bool, *, terms: bool) -> None:
    if json_:
        print_json({"rows": [row.as_dict() for row in rows]})
        return
    from simulator.report.study_tables import rows_table, terms_table

    show(rows_table(rows))
    if terms:
        show(terms_table(rows))
