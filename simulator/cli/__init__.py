"""The command line ``moesim``: verbs only. Results on stdout, progress and warnings on stderr.

Exit codes: 0 ok, 1 the result does not fit or is out of tolerance, 2 the input is invalid. Rooms are imported inside
the verbs, so that ``moesim --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from simulator import errors
from simulator.cli.authoring import check, init, schema
from simulator.cli.calibrating import calibrate
from simulator.cli.catalogue import models, profiles
from simulator.cli.estimating import estimate, explain, report, step
from simulator.cli.judging import validate
from simulator.cli.studies import compare, sweep
from simulator.report.terminal import note

app = typer.Typer(
    name="moesim",
    help="What training a Mixture-of-Experts language model costs, and why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for verb in (
    estimate,
    step,
    compare,
    sweep,
    check,
    explain,
    init,
    models,
    profiles,
    schema,
    report,
    calibrate,
    validate,
):
    app.command()(verb)


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
