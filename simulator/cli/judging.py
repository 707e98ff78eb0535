"""The verb that holds the simulator against what is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from simulator import errors
from simulator.cli.options import Engine, JsonOption
from simulator.report.terminal import note, print_json, ready, show, working

Checks = list[dict[str, Any]]
Judged = tuple[Checks, dict[str, Any]]
"""Checks, and their summaries by kind."""


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
    if figure is not None and not calibration:
        raise errors.invalid("draws recorded timings; add --calibration", path="--figure")
    if profile is not None and not live:
        raise errors.invalid("is that of this machine; add --live", path="--profile")
    if ablation and only:
        raise errors.invalid("judges all complete runs: leave out --only", path="--ablation")
    of_runs = runs or ablation or bool(only)
    asked = {"routing": routing, "events": events, "runs": of_runs, "calibration": calibration, "live": live}
    judges: dict[str, Callable[[], Judged]] = {
        "routing": _routing,
        "events": _events,
        "runs": lambda: _runs(only or (), engine, close=close, write=write, ablation=ablation),
        "calibration": lambda: _calibration(figure),
        "live": lambda: _live(scenario, profile),
    }
    checks: Checks = []
    summaries: dict[str, Any] = {}
    for kind, judged in judges.items():
        if asked[kind] or (kind != "live" and not any(asked.values())):
            found, summed = judged()
            checks += found
            summaries |= summed
    _show(checks, summaries, json_=json_)


def _show(checks: Checks, summaries: dict[str, Any], *, json_: bool) -> None:
    """All that was checked; exit code 1 if anything does not hold."""
    from simulator.report.evidence_tables import checks_view
    from simulator.report.runs_view import runs_view

    of_runs = [check for check in checks if check["group"] in ("runs", "contrasts")]
    others = [check for check in checks if check not in of_runs]
    if json_:
        print_json({"checks": checks, "summary": summaries})
    elif of_runs:
        show(runs_view(of_runs, summaries["runs"], summaries.get("ablation", {})))
    if others and not json_:
        show(checks_view(others))
    raise typer.Exit(1 if any(check["ok"] is False for check in checks) else 0)


def _routing() -> Judged:
    """Routers, loads and traffic."""
    from validation.routing import judge

    with working("checking the routing"):
        return _counted("routing", judge())


def _events() -> Judged:
    """Schedules and DeepSeek-V3's step."""
    from validation.events import judge

    with working("checking the events"):
        return _counted("events", judge())


def _counted(kind: str, checks: Checks) -> Judged:
    from validation.checks import summary

    return checks, {kind: summary(checks)}


def _runs(only: Sequence[str], engine: Engine | None, *, close: bool, write: bool, ablation: bool) -> Judged:
    """Published runs, and where they are written down."""
    from validation.ablation import ablations
    from validation.accuracy import judge
    from validation.evidence import sources
    from validation.families import summary

    known = [source.name for source in sources()]
    for name in only:
        if name.split("/")[0] not in known:
            raise errors.invalid(errors.one_of(name, known, "published run"), path="--only")
    if write and (only or close):
        raise errors.invalid("the page holds all but the runs set aside: leave out --only and --close", path="--write")
    with working("judging published runs"):
        parts = ablations() if ablation or write else {}  # the page holds it too
        found = judge(only, engine.reader if engine else None, test=close)
    if write:
        from validation.accuracy_page import write as write_page

        for path in write_page(found, summary(found), parts):
            note(f"wrote {path}")
    return found, {"runs": summary(found), **({"ablation": parts} if parts else {})}


def _calibration(figure: Path | None) -> Judged:
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
    return _counted("calibration", found)


def _live(scenario: str, profile: str | None) -> Judged:
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
        found = judge_live(
            load_scenario(scenario, changes, label="--profile"),
            read(recorded) if recorded.exists() else None,
        )
    return _counted("live", found)
