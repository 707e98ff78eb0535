"""Verbs about what is shipped: model presets and hardware profiles."""

from __future__ import annotations

from typing import Annotated

import typer

from simulator.cli.options import JsonOption
from simulator.report.terminal import print_json, show


def models(name: Annotated[str | None, typer.Argument(help="A preset.")] = None, json_: JsonOption = False) -> None:
    """List model presets: computed against published parameter counts."""
    from simulator.report import catalogue
    from simulator.spec import available

    rows = [catalogue.model_row(preset) for preset in ([name] if name else available("models"))]
    if json_:
        print_json(rows)
        return
    show(catalogue.models_table(rows))
    if name:
        show(catalogue.parameters_table(name))


def profiles(name: Annotated[str | None, typer.Argument(help="A profile.")] = None, json_: JsonOption = False) -> None:
    """List hardware profiles, or show every number of one with its source."""
    from simulator.report import catalogue
    from simulator.spec import available, load_profile

    if name is None:
        rows = [catalogue.profile_row(profile) for profile in available("profiles")]
        if json_:
            print_json(rows)
        else:
            show(catalogue.profiles_table(rows))
    elif json_:
        print_json(load_profile(name).model_dump(mode="json", by_alias=True))
    else:
        show(catalogue.profile_table(name))
