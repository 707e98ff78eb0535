"""Verbs that help to write a scenario: a start, the schema for an editor, and a check that runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from simulator import errors
from simulator.cli.options import JsonOption, SetOption, load
from simulator.report.terminal import note, print_json, writing


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
            loaded = load(name, set_)
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
