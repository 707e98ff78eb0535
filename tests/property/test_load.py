"""No text and no value makes the loader fail in any way but with messages for the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulator.errors import InvalidInput, MoesimError, NotSimulated, Origin
from simulator.spec import available, load_scenario, parse_assignment
from simulator.spec.document import read_text, read_value
from simulator.spec.tree import Document

TEXTS = [available("scenarios")[name].read_text() for name in ("deepseek-v3", "mixtral-8x7b")]
PRESET = available("models")["deepseek-v3"].read_text()
PATHS = [
    document.path_text(path)
    for document in (read_text(text, "scenario") for text in TEXTS)
    for path in document.origins
    if path
] + [
    "model.moe.experts",
    "model.moe.router.groups",
    "model.mixer.kind",
    "model.pattern",
    "cluster.profile.tiers.infiniband.bandwidth",
    "cluster.profile.kernels.gemm",
    "cluster.overrides",
    "training.phases",
    "routing.load.kind",
    "variants",
]

# Fragments from which YAML is made, and which a scenario may hold in the wrong place.
SYNTAX = (*"{}[]:,-?&*!|>'\"%#@`~ \t\n", "\r\n", ": ", "- ", "? ", "<<: ", "&a ", "*a", "---\n", "...\n", "%YAML 1.1\n")
TAGS = ("!!int ", "!!python/object:a ", "!a ")
WORDS = (
    "name",
    "model",
    "preset",
    "set",
    "kind",
    "deepseek-v3",
    "h800-sxm",
    "training:\n  tokens: 1T\n",
    "true",
    "null",
)
NUMBERS = ("1e400", ".nan", "-.inf", "0x", "-_", "9" * 50, "1_000", "14.8T", "400 Gb/s")
FRAGMENTS = st.sampled_from((*SYNTAX, *TAGS, *WORDS, *NUMBERS, "\x00", "\u2028", "é"))
YAML_TEXTS = st.lists(FRAGMENTS | st.text(max_size=3), max_size=40).map("".join)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2, 7, 10**9, 10**400, 0.5, 1e308, float("nan"), float("inf"), "auto", "model", "none"])
    | st.sampled_from(
        ["14.8T", "1 GB/s", "-1", "dualpipe", "zbv", "deepseek-v3", "a/b.yaml", "", ".", "\ud800", "\x00"]
    )
    | st.floats()
    | st.text(max_size=5)
)
KEYS = st.sampled_from(["kind", "preset", "set", "layers", "from", "to", "value", "a.b", "", "name"]) | st.text(
    max_size=3
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5
)


def is_for_the_user(error: MoesimError) -> None:
    """Every problem is one printable line of bearable length."""
    assert isinstance(error, InvalidInput | NotSimulated)
    lines = str(error).split("\n")
    assert all(line and line.isprintable() and len(line) < 1500 for line in lines)
    assert 1 <= len(lines) <= 20


def loads_or_says_why(source: Callable[[], Document | dict[str, Any]], overrides: dict[str, Any] | None = None) -> None:
    """A scenario that loads is the one that its resolved form loads to; one that does not says why."""
    try:
        read = source()
        scenario = load_scenario(read.tree if isinstance(read, Document) else read, overrides)
    except MoesimError as error:
        is_for_the_user(error)
        return
    resolved = scenario.as_dict()
    assert load_scenario(resolved).as_dict() == resolved


@settings(max_examples=300, deadline=None)
@given(YAML_TEXTS)
def test_any_text(text: str) -> None:
    loads_or_says_why(lambda: read_text(text, "scenario.yaml"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([*TEXTS, PRESET]), st.data())
def test_a_scenario_with_some_text_put_in_or_taken_out(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)), "start")
    length = data.draw(st.integers(0, 30), "taken out")
    text = text[:start] + data.draw(YAML_TEXTS, "put in") + text[start + length :]
    loads_or_says_why(lambda: read_text(text, "scenario.yaml"))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(PATHS), VALUES, min_size=1, max_size=2))
def test_a_scenario_with_any_value_at_any_path(overrides: dict[str, Any]) -> None:
    loads_or_says_why(lambda: read_text(TEXTS[0], "scenario.yaml"), overrides)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=12) | st.sampled_from(PATHS).map(lambda path: f"{path}.x"), VALUES, min_size=1, max_size=1
    )
)
def test_a_scenario_with_any_value_at_a_path_that_does_not_exist(overrides: dict[str, Any]) -> None:
    loads_or_says_why(lambda: read_text(TEXTS[0], "scenario.yaml"), overrides)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_any_mapping(value: Any) -> None:
    loads_or_says_why(lambda: value if isinstance(value, dict) else {"name": value})


@settings(max_examples=200, deadline=None)
@given(YAML_TEXTS)
def test_any_assignment(text: str) -> None:
    """What is read has the path before the first = and the value that stands after it."""
    try:
        path, value = parse_assignment(text)
    except InvalidInput as error:
        is_for_the_user(error)
        return
    before, after = text.split("=", 1)
    assert path == before.strip() != ""
    assert repr(value) == repr(read_value(after.strip(), Origin("--set x")))
