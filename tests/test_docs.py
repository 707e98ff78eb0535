"""The README tells the truth: its output block is what the command prints, and its commands and code run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- output of: moesim (.+?) -->\n```text\n)(.*?)(```)", re.DOTALL)
SHOWN_LINES = 16

Run = Callable[..., tuple[int, str, str]]


def shown(output: str) -> str:
    """The part of an output that the README shows: its first lines, without trailing blanks."""
    return "\n".join(line.rstrip() for line in output.splitlines()[:SHOWN_LINES]).rstrip() + "\n"


def test_the_output_block_is_what_the_command_prints(moesim: Run) -> None:
    match = BLOCK.search(README.read_text("utf-8"))
    assert match is not None
    code, output, _ = moesim(*match[2].split())
    assert code == 0
    assert match[3] == shown(output), "run: python tests/test_docs.py"


def test_every_verb_that_the_readme_uses_exists(moesim: Run) -> None:
    verbs = set(re.findall(r"^moesim (\w+)", README.read_text("utf-8"), re.MULTILINE))
    _, output, _ = moesim("--help")
    assert {verb for verb in verbs if f" {verb} " not in output} == set()
    assert len(verbs) >= 10


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL))
def test_python_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "Ledger" in capsys.readouterr().out


@pytest.mark.parametrize("part", re.findall(r"```yaml\n(.*?)```", README.read_text("utf-8"), re.DOTALL))
def test_yaml_examples_are_parts_of_a_scenario(part: str) -> None:
    from ruamel.yaml import YAML

    from simulator import load_scenario

    assert load_scenario("quickstart", YAML(typ="safe").load(part)).routing.placement.redundant_experts == 8


def test_links_lead_somewhere() -> None:
    for page in (README, *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


if __name__ == "__main__":  # rewrite the block
    import subprocess

    text = README.read_text("utf-8")
    found = BLOCK.search(text)
    assert found is not None
    run = subprocess.run(
        [sys.executable, "-m", "simulator.cli", *found[2].split()], capture_output=True, text=True, check=True
    )
    README.write_text(BLOCK.sub(lambda m: m[1] + shown(run.stdout) + m[4], text), "utf-8")
