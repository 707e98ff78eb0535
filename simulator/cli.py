"""The command line ``moesim``: verbs only. Results on stdout, progress and warnings on stderr.

Exit codes: 0 ok, 1 the result does not fit or is out of tolerance, 2 the input is invalid. Rooms are imported inside
the verbs, so that ``moesim --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator import errors
from simulator.report.terminal import counting, note, print_json, ready, show, working, writing

if TYPE_CHECKING:
    from simulator.spec import EngineName, Scenario
    from simulator.study import Row

app = typer.Typer(
    name="moesim",
    help="What training a Mixture-of-Experts language model costs, and why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Engine(StrEnum):
    """How a step is evaluated."""

    events = "events"
    max_plus = "max-plus"


def _print_version(wanted: bool) -> None:
    if wanted:
        from simulator.campaign.result import simulator_version

        typer.echo(simulator_version())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What training a Mixture-of-Experts language model costs, and why."""


ScenarioArgument = Annotated[str, typer.Argument(help="Scenario: a YAML file or a shipped name such as deepseek-v3.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override by dotted path, e.g. --set routing.capacity_factor=1.25. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
EngineOption = Annotated[
    Engine, typer.Option(help="events: SimPy with shared links; max-plus: fast, links not shared.")
]


@app.command()
def estimate(
    scenario: ScenarioArgument, set_: SetOption = None, json_: JsonOption = False, engine: EngineOption = Engine.events
) -> None:
    """Estimate a training run: GPU-hours, days, dollars, memory, and every term of the step."""
    with working(f"estimating {scenario}"):
        from simulator.campaign import estimate as run

        loaded = _load(scenario, set_)
        result = run(loaded, _engine(engine))
    if json_:
        print_json(result.as_dict())
    else:
        from simulator.report import tables
        from validation.accuracy import against_published

        published = against_published(Path(scenario).stem, result)
        show(tables.estimate_view(result, published))
    for text in result.warnings if json_ else ():
        note(f"warning: {text}")
    raise typer.Exit(0 if result.fits else 1)


@app.command()
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
        _over_steps(_load(scenario, set_), over_steps, json_, figure)
        return
    if figure is not None:
        raise errors.invalid("draws the expert load over training steps; add --over-steps N", path="--figure")
    if trace is not None and trace.suffix == ".pftrace":
        from simulator.report.protobuf import require

        require()
    with working(f"simulating one step of {scenario}"):
        from simulator.campaign import simulate_step

        result = simulate_step(_load(scenario, set_), _engine(engine))
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


@app.command()
def compare(
    scenarios: Annotated[list[str], typer.Argument(help="One scenario with variants, or several scenarios.")],
    set_: SetOption = None,
    json_: JsonOption = False,
    engine: EngineOption = Engine.events,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
) -> None:
    """Compare scenarios, or the variants of one, term by term."""
    from simulator import study

    loaded = [(name, _load(name, set_)) for name in scenarios]
    if len(loaded) == 1:
        base = loaded[0][1]
        if not base.variants:
            raise errors.invalid(
                "has no variants; give a second scenario", path="variants", origin=errors.Origin(scenarios[0])
            )
        with counting(1 + len(base.variants)) as advance:
            rows = study.variants(base, _engine(engine), jobs=jobs, finished=advance)
    else:
        with counting(len(loaded)) as advance:
            rows = study.compare(loaded, _engine(engine), jobs=jobs, finished=advance)
    _show_rows(rows, json_, terms=True)


@app.command()
def sweep(
    scenario: ScenarioArgument,
    set_: SetOption = None,
    json_: JsonOption = False,
    engine: EngineOption = Engine.max_plus,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Append finished rows to this JSON-lines file; a later run resumes from it.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw the rows, on one self-contained HTML page.")] = None,
) -> None:
    """Run the variants and the sweep axes of a scenario: one row each, against the base."""
    from simulator import study

    loaded = _load(scenario, set_)
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

            rows = study.sweep(loaded, _engine(engine), jobs=jobs, store=out, finished=finished)
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


@app.command()
def check(
    files: Annotated[list[str], typer.Argument(help="Scenario files.")],
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Validate scenarios without running them; print what they resolve to."""
    from simulator.layout import resolve
    from simulator.program import schedule_of
    from simulator.study.variants import points, resolved

    found, problems = [], []
    for name in files:
        try:
            loaded = _load(name, set_)
            layout = resolve(loaded)
            schedule_of(loaded, layout)
            for point, outcome in resolved(loaded, points(loaded)):
                if isinstance(outcome, str):
                    note(f"{name}: sweep point {point.name}: {outcome}")
            found.append(
                {
                    "file": name,
                    "ok": True,
                    "scenario": loaded.as_dict(),
                    "data": layout.data,
                    "expert_data": layout.expert_data,
                    "microbatches": layout.microbatches,
                    "stages": [len(stage) for stage in layout.stages],
                }
            )
        except errors.MoesimError as error:
            problems.append(str(error))
            found.append({"file": name, "ok": False, "problems": str(error).splitlines()})
    if json_:
        print_json(found)
    else:
        for entry in found:
            if entry["ok"]:
                facts = ", ".join(f"{key} {entry[key]}" for key in ("data", "expert_data", "microbatches"))
                typer.echo(f"{entry['file']}: ok; {facts}")
    for text in problems:
        note(text)
    raise typer.Exit(2 if problems else 0)


@app.command()
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

        values = run(_load(scenario, set_), _engine(engine)).as_dict()
    entries = [glossary.explained(name, values) for name in ([term] if term else glossary.known_terms())]
    if json_:
        print_json(entries[0] if term else entries)
        return
    from simulator.report import tables

    if term is None:
        listed = [(entry["name"], entry["shown"], entry["meaning"]) for entry in entries]
        title = f"{values['name']}: numbers that can be opened"
        show(tables.pairs_table(title, listed, "name", "value", "meaning"))
    else:
        show(tables.explanation_view(entries[0]))


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="File to write.")],
    model: Annotated[str, typer.Option(help="Model preset.")] = "mixtral-8x7b",
    profile: Annotated[str, typer.Option(help="Hardware profile.")] = "h100-sxm",
    accelerators: Annotated[int, typer.Option(min=1, help="Chips.")] = 64,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Write a commented scenario to start from."""
    from simulator.report.starter import starter

    text = starter(model, profile, accelerators)
    if file.exists() and not force:
        raise errors.invalid("exists already; use --force to overwrite", origin=errors.Origin(str(file)))
    writing(file, lambda: file.write_text(text, encoding="utf-8"))
    note(f"wrote {file}; next: moesim estimate {file}")


@app.command()
def models(name: Annotated[str | None, typer.Argument(help="A preset.")] = None, json_: JsonOption = False) -> None:
    """List model presets: computed against published parameter counts."""
    from simulator.report import catalogue, tables
    from simulator.spec import available

    rows = [catalogue.model_row(preset) for preset in ([name] if name else available("models"))]
    if json_:
        print_json(rows)
    else:
        show(tables.models_table(rows))
        if name:
            show(
                tables.pairs_table(
                    f"{name}: parameters by family", catalogue.parameter_rows(name), "term", "total", "active"
                )
            )


@app.command()
def profiles(name: Annotated[str | None, typer.Argument(help="A profile.")] = None, json_: JsonOption = False) -> None:
    """List hardware profiles, or show every number of one with its source."""
    from simulator.report import catalogue, tables
    from simulator.spec import available, load_profile

    if name is None:
        rows = [catalogue.profile_row(profile) for profile in available("profiles")]
        if json_:
            print_json(rows)
        else:
            show(tables.pairs_table("Hardware profiles", [tuple(map(str, row.values())) for row in rows], *rows[0]))
        return
    if json_:
        print_json(load_profile(name).model_dump(mode="json", by_alias=True))
    else:
        show(
            tables.pairs_table(
                f"{name}: every number and its source",
                catalogue.profile_numbers(name),
                "path",
                "value",
                "kind",
                "error",
                "source",
            )
        )


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="scenario, model or profile.")] = "scenario",
    write: Annotated[
        bool, typer.Option("--write", help="Write all schemas and field tables into this checkout.")
    ] = False,
) -> None:
    """Print the JSON Schema that an editor can use."""
    from simulator.spec import schema as schemas

    if write:
        for path in schemas.write(Path.cwd()):
            note(f"wrote {path}")
        return
    makers: dict[str, Callable[[], Any]] = {
        "scenario": schemas.scenario_schema,
        "model": schemas.model_schema,
        "profile": schemas.profile_schema,
    }
    if kind not in makers:
        raise errors.invalid(errors.one_of(kind, makers, "schema"), path="schema")
    print_json(makers[kind]())


@app.command()
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

        loaded = _load(scenario, set_)
        result = run(loaded, _engine(engine))
        rows = study.sweep(loaded) if len(study.points(loaded)) > 1 else []
        published = against_published(Path(scenario).stem, result)
        writing(
            out,
            lambda: write_html(
                result, out, rows=[row.as_dict() for row in rows if row.error is None], published=published
            ),
        )
    note(f"wrote {out}")


@app.command()
def validate(
    routing: Annotated[
        bool, typer.Option("--routing", help="Routers, loads, drops, balancing, placement and traffic.")
    ] = False,
    events: Annotated[
        bool,
        typer.Option("--events", help="Schedules, overlap, DeepSeek-V3's step by part, and what must be faster."),
    ] = False,
    runs: Annotated[bool, typer.Option("--runs", help="Published training runs.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only these published runs.")] = None,
    json_: JsonOption = False,
    engine: EngineOption = Engine.events,
) -> None:
    """Hold the simulator against what is known: papers, exact oracles, published runs; all when none is named."""
    everything = not (routing or events or runs or only)
    checks: list[dict[str, Any]] = []
    summaries: dict[str, Any] = {}
    if routing or everything:
        with working("checking the routing"):
            from validation.checks import summary as counted
            from validation.routing import judge as judge_routing

            found = judge_routing()
            checks += found
            summaries["routing"] = counted(found)
    if events or everything:
        with working("checking the events"):
            from validation.checks import summary as counted_events
            from validation.events import judge as judge_events

            found = judge_events()
            checks += found
            summaries["events"] = counted_events(found)
    if runs or only or everything:
        with working("judging published runs"):
            from validation.accuracy import judge, summary
            from validation.evidence import published_runs

            known = [run.scenario for run in published_runs()]
            for name in only or ():
                if name not in known:
                    raise errors.invalid(errors.one_of(name, known, "published run"), path="--only")
            found = judge(only or (), _engine(engine))
            checks += found
            summaries["runs"] = summary(found)
    if json_:
        print_json({"checks": checks, "summary": summaries})
    else:
        from simulator.report import tables

        show(tables.checks_view(checks))
    raise typer.Exit(1 if any(check["ok"] is False for check in checks) else 0)


def main() -> None:
    """Run the command line; every foreseeable error becomes one message and exit code 2."""
    try:
        app()
    except errors.MoesimError as error:
        note(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _load(scenario: str, assignments: Sequence[str] | None) -> Scenario:
    from simulator.spec import load_scenario, parse_assignment

    return load_scenario(scenario, dict(parse_assignment(text) for text in assignments or ()), label="--set")


def _engine(engine: Engine) -> EngineName:
    return "events" if engine is Engine.events else "max-plus"


def _over_steps(scenario: Scenario, last: int, json_: bool, figure: Path | None) -> None:
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


if __name__ == "__main__":
    main()
