"""The verb that measures a machine and writes its hardware profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator import errors
from simulator.cli.options import JsonOption
from simulator.report.terminal import note, print_json, ready, show, working, writing

if TYPE_CHECKING:
    from validation.calibrate import Calibration


def calibrate(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Hardware profile to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes: about 3 minutes instead of 10.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Measure the GPU instead of one CPU core.")] = False,
    records: Annotated[
        Path | None,
        typer.Option(help="File of measurements; what it holds is not measured again. Default: OUT as .jsonl."),
    ] = None,
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Measure nothing: fit what RECORDS holds.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write even where one fixed MFU predicts whole layers better.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="Also draw fit and errors, on one HTML page.")] = None,
    import_trace: Annotated[
        Path | None, typer.Option(help="Measure nothing: time by piece of a PyTorch profiler trace (.json, .json.gz).")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure this machine with PyTorch and fit a hardware profile to it."""
    if import_trace is not None:
        _import(import_trace, json_)
        return
    if out is None:
        raise errors.invalid("name the profile to write, for example --out my-machine.yaml", path="--out")
    for path in (out, figure):
        if path is not None:
            ready(path)
    if quick and gpu:
        raise errors.invalid("is a suite of the CPU; leave it out with --gpu", path="--quick")
    file = records or out.with_suffix(".jsonl")
    from validation.calibrate import calibrated, measure
    from validation.profile_file import write
    from validation.records import read

    if not fit_only:
        note(f"measuring; every finished case is kept in {file}, and an interrupted run goes on from there")
        measure("gpu" if gpu else "quick" if quick else "full", file)
    with working("fitting the profile"):
        found = calibrated(read(file))
    better = found.beaten_by()
    if json_:
        print_json(found.as_dict())
    else:
        from simulator.report.calibration_view import calibration_view

        show(calibration_view(found.as_dict()))
    if figure is not None:
        draw([found], figure)
    if better and not force:
        note(
            f"{out} is not written: a simple rule predicts {', '.join(dict.fromkeys(better))} better; measure again on "
            "a quiet machine or without --quick, or add --force"
        )
        raise typer.Exit(1)
    writing(out, lambda: write(found, out))
    note(f"wrote {out}; next:")
    form = "fp32" if "fp32" in found.fitted.profile.kernels.grouped_gemm else "bf16"
    name = out if out.suffix in (".yaml", ".yml") and "/" in str(out) else f"./{out}"
    note(f"  moesim estimate small-transformer --set cluster.profile={name} --set training.precision={form}")
    note(f"  moesim validate --live --profile {name}")


def _import(path: Path, json_: bool) -> None:
    from validation.kineto import read_trace

    with working(f"reading {path}"):
        found = read_trace(path).as_dict()
    if json_:
        print_json(found)
        return
    from simulator.report.calibration_view import trace_view

    show(trace_view(found))


def draw(machines: list[Calibration], path: Path) -> None:
    """Write the page of one or several calibrated machines."""
    from simulator.report.calibration_page import write_calibration
    from validation.calibration_figures import figure_data

    data: list[dict[str, Any]] = [figure_data(machine) for machine in machines]
    writing(path, lambda: write_calibration(data, path))
    note(f"wrote {path}")


__all__ = ["calibrate", "draw"]
