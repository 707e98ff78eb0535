"""Shared fixtures: the table of bad inputs, one test for each row."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _table(kind: str = "BAD_INPUTS") -> list[Any]:
    """Load tests/bad_inputs.py; under --import-mode=importlib the tests folder is not on the path."""
    name = "moesim_bad_inputs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "bad_inputs.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    rows: list[Any] = getattr(sys.modules[name], kind)
    return rows


@pytest.fixture
def bad_inputs() -> list[Any]:
    """Every bad input of tests/bad_inputs.py: ``name``, ``make(tmp_path) -> argument``, ``expected(argument)``."""
    return _table()


@pytest.fixture
def moesim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: ``moesim("estimate", "deepseek-v3")`` -> exit code, stdout, stderr."""
    from simulator import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moesim", *arguments])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        output, errors = capsys.readouterr()
        return code, output, errors

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``bad_input`` or ``bad_schedule`` once for each row of its table."""
    for name in ("bad_input", "bad_schedule"):
        if name in metafunc.fixturenames:
            rows = _table(f"{name.upper()}S")
            metafunc.parametrize(name, rows, ids=[row.name for row in rows])
