"""The wheel carries its data: unpacked anywhere, it estimates a shipped scenario without the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the backend of pyproject.toml and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("moesim-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_shipped_file(unpacked: Path) -> None:
    for name in ("scenarios", "hardware_profiles"):
        source = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.is_file()}
        shipped = unpacked / "simulator" / "_data" / name
        assert {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()} == source
    assert (unpacked / "validation" / "published" / "deepseek-v3.yaml").exists()
    tables = unpacked / "validation" / "events" / "tables"
    assert {path.name for path in tables.iterdir()} >= {"torch_schedules.json", "torch_digests.csv"}


def test_the_wheel_estimates_from_another_folder(unpacked: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-c", "from simulator.cli import main; main()", "estimate", "quickstart", "--json"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["fits"] is True
