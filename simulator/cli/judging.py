"""The verb that holds the simulator against what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from simulator import errors
from simulator.cli.options import Engine, JsonOption
from simulator.report.terminal import note, print_json, ready, show, working


def validate(
    routing: Annotated[
        bool, typer.Option("--routing", help="Routers, loads, drops, balancing, placement and traffic.")
    ] = False,
    events: Annotated[
        bool,
        typer.Option("--events", help="Schedules, overlap, DeepSeek-V3's step by part, and what must be faster."),
    ] = False,
    runs: Annotated[bool, typer.Option("--runs", help="Published training runs.")] = False,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Recorded timings of layers and steps on shapes held out of the fit.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="One training step on this machine now, against the estimate by --profile.")
    ] = False,
    profile: Annotated[str | None, typer.Option(help="With --live: the profile that moesim calibrate wrote.")] = None,
    scenario: Annotated[str, typer.Option(help="With --live: the scenario whose step is run.")] = "small-transformer",
    figure: Annotated[Path | None, typer.Option(help="With --calibration: also draw fits and errors.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these published runs: a source, or source/row.")] = None,
    close: Annotated[
        bool, typer.Option("--close", help="With --runs: also the layouts set aside for the last prediction.")
    ] = False,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="With --runs and --ablation: write docs/accuracy.md and the errors behind intervals."
        ),
    ] = False,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="With --runs: errors without curves, overlap, skew and stack term.")
    ] = False,
    json_: JsonOption = False,
    engine: Annotated[
        Engine | None, typer.Option(help="With --runs; default: events for MoE, max-plus for dense runs.")
    ] = None,
) -> None:
    """Hold the simulator against what is known: papers, exact oracles, published runs; all when none is named."""
    runs = runs or ablation
    everything = not (routing or events or runs or only or calibration or live)
    if figure is not None and not calibration:
        raise errors.invalid("draws recorded timings; add --calibration", path="--figure")
    if profile is not None and not live:
        raise errors.invalid("is that of this machine; add --live", path="--profile")
    if ablation and only:
        raise errors.invalid("judges all complete runs: leave out --only", path="--ablation")
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
        parts: dict[str, dict[str, Any]] = {}
        with working("judging published runs"):
            if ablation or write:  # the page holds it too
                parts = _ablation()
            found = _runs(only or (), engine, close=close, write=write, ablation=parts)
        checks += found
        summaries["runs"] = _runs_summary(found)
        if parts:
            summaries["ablation"] = parts
    if calibration or everything:
        found = _calibration(figure)
        checks += found
        summaries["calibration"] = _counted(found)
    if live:
        found = _live(scenario, profile)
        checks += found
        summaries["live"] = _counted(found)
    if json_:
        print_json({"checks": checks, "summary": summaries})
    else:
        from simulator.report.evidence_tables import checks_view
        from simulator.report.runs_view import runs_view

        of_runs = [check for check in checks if check["group"] in ("runs", "contrasts")]
        if of_runs:
            show(runs_view(of_runs, summaries["runs"], summaries.get("ablation", {})))
        if others := [check for check in checks if check not in of_runs]:
            show(checks_view(others))
    raise typer.Exit(1 if any(check["ok"] is False for check in checks) else 0)


def _runs(
    only: Sequence[str],
    engine: Engine | None,
    *,
    close: bool,
    write: bool,
    ablation: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Published runs, and where they are written down."""
    from validation.accuracy import judge
    from validation.evidence import sources
    from validation.families import summary

    known = [source.name for source in sources()]
    for name in only:
        if name.split("/")[0] not in known:
            raise errors.invalid(errors.one_of(name, known, "published run"), path="--only")
    if write and (only or close):
        raise errors.invalid("the page holds all but the runs set aside: leave out --only and --close", path="--write")
    found = judge(only, engine.reader if engine else None, test=close)
    if write:
        from validation.accuracy_page import write as write_page

        for path in write_page(found, summary(found), ablation):
            note(f"wrote {path}")
    return found


def _ablation() -> dict[str, dict[str, Any]]:
    from validation.ablation import ablations

    return ablations()


def _runs_summary(checks: list[dict[str, Any]]) -> dict[str, Any]:
    from validation.families import summary

    return summary(checks)


def _counted(checks: list[dict[str, Any]]) -> dict[str, Any]:
    from validation.checks import summary

    return summary(checks)


def _calibration(figure: Path | None) -> list[dict[str, Any]]:
    """Recorded machines, and drops where PyTorch is installed."""
    from validation.calibration import calibration_of, judge, notices, recordings

    if figure is not None:
        ready(figure)
    with working("fitting recorded timings"):
        found = judge()
    for text in notices():
        note(text)
    if figure is not None:
        from simulator.cli.calibrating import draw

        machines = [calibration_of(path) for path in recordings()]
        if not machines:
            raise errors.invalid("there is no recording to draw", path="--figure")
        draw(machines, figure)
    return found


def _live(scenario: str, profile: str | None) -> list[dict[str, Any]]:
    """One real training step against the estimate."""
    from simulator.spec import load_profile, load_scenario
    from validation.calibration import judge_live
    from validation.records import read

    if profile is None:
        raise errors.invalid(
            "name the profile of this machine: moesim calibrate --out FILE writes it", path="--profile"
        )
    name = profile if "/" in profile else f"./{profile}"
    formats = load_profile(name).kernels.grouped_gemm
    form = "fp32" if "fp32" in formats else "bf16"
    changes = {"cluster.profile": name, "training.precision": form}
    recorded = Path(profile).with_suffix(".jsonl")
    with working("running training steps"):
        return judge_live(
            load_scenario(scenario, changes, label="--profile"),
            read(recorded) if recorded.exists() else None,
        )
