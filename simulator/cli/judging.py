"""The verb that holds the simulator against what is known."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from simulator import errors
from simulator.cli.options import Engine, EngineOption, JsonOption
from simulator.report.terminal import print_json, show, working


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
            found = judge(only or (), engine.reader)
            checks += found
            summaries["runs"] = summary(found)
    if json_:
        print_json({"checks": checks, "summary": summaries})
    else:
        from simulator.report.evidence_tables import checks_view

        show(checks_view(checks))
    raise typer.Exit(1 if any(check["ok"] is False for check in checks) else 0)
