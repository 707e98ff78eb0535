"""Laws of units: what is written reads back as the same float, and no text raises anything but UnitError."""

from __future__ import annotations

import contextlib
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.units import (
    BYTES,
    BYTES_PER_S,
    COUNT,
    FLOP_PER_S,
    SECONDS,
    USD_PER_HOUR,
    WATTS,
    Dimension,
    UnitError,
    parse,
    render,
)

DIMENSIONS = st.sampled_from([BYTES, BYTES_PER_S, COUNT, FLOP_PER_S, SECONDS, USD_PER_HOUR, WATTS])
NUMBERS = st.floats(min_value=0, allow_nan=False, allow_infinity=False) | st.integers(0, 10**20).map(float)
UNITS = st.sampled_from(["", "b", "B", "bit", "Gb/s", "TFLOPS", "s", "µs", "USD", "USD/h", "W", "T", "K", "/s", "e5"])
TEXTS = (
    st.text(max_size=30) | st.builds("{} {}".format, NUMBERS, UNITS) | st.from_regex(r"[-+.\d_eE]{1,20} ?[kMGi]?[bBs]?")
)


@given(NUMBERS, DIMENSIONS)
def test_render_and_parse_are_inverse(value: float, dimension: Dimension) -> None:
    assert parse(render(value, dimension), dimension) == value


@given(NUMBERS, DIMENSIONS)
def test_what_is_rendered_matches_the_grammar_that_editors_check(value: float, dimension: Dimension) -> None:
    assert re.search(dimension.pattern(), str(render(value, dimension)))


@given(TEXTS, DIMENSIONS)
def test_no_text_raises_anything_but_a_unit_error(text: str, dimension: Dimension) -> None:
    with contextlib.suppress(UnitError):
        assert math.isfinite(parse(text, dimension))


@given(TEXTS, DIMENSIONS)
def test_the_editors_grammar_accepts_what_the_loader_accepts(text: str, dimension: Dimension) -> None:
    try:
        value = parse(text, dimension)
    except UnitError:
        return
    written_negative = text.strip().startswith("-")
    assert written_negative or re.search(dimension.pattern(), text)
    assert written_negative or value >= 0


@given(st.none() | st.booleans() | st.lists(st.integers()) | st.binary() | st.dates(), DIMENSIONS)
def test_what_is_neither_text_nor_number_is_refused(value: object, dimension: Dimension) -> None:
    with pytest.raises(UnitError):
        parse(value, dimension)
