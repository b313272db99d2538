"""Patterns are parsed once, printed back, and refused with a sentence."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmflow
from nmflow.errors import NMFlowError, PatternError

numbers = st.tuples(st.integers(1, 8), st.integers(1, 256), st.integers(1, 128)).filter(
    lambda nmv: nmv[0] <= nmv[1]
)


@given(numbers)
def test_round_trip(numbers: tuple[int, int, int]) -> None:
    n, m, panel = numbers
    pattern = nmflow.Pattern(f"{n}:{m}@{panel}")
    assert (pattern.n, pattern.m, pattern.panel) == numbers
    assert str(pattern) == (f"{n}:{m}@{panel}" if panel > 1 else f"{n}:{m}")
    same = [
        nmflow.Pattern(str(pattern)),
        nmflow.Pattern(pattern),
        nmflow.Pattern.of(n, m, panel),
        eval(repr(pattern), {"Pattern": nmflow.Pattern}),
        copy.deepcopy(pattern),
        pickle.loads(pickle.dumps(pattern)),
    ]
    assert all(other == pattern and hash(other) == hash(pattern) for other in same)
    assert pattern.density == n / m
    assert pattern.sparsity == 1 - n / m


def test_panels_of_one_row_are_no_panels() -> None:
    assert nmflow.Pattern("1:4@1") == nmflow.Pattern("1:4")
    assert nmflow.Pattern("1:4@2") != nmflow.Pattern("1:4")


def test_patterns_are_frozen() -> None:
    with pytest.raises(AttributeError):
        nmflow.Pattern("1:4").n = 2  # type: ignore[misc]


BAD = ["0:4", "5:4", "1:0", "0:0", "a:b", "-1:4", "1:-4", "1.5:4", "1:4:8", "1/4", "", ":", "4"]
BAD += ["1:4@", "1:4@0", "1:4@-2", "1:4@a", "1 : 4 : @", "١:٤x", "0x1:4", "1e0:4", "1:4\n2:4"]


@pytest.mark.parametrize("text", BAD)
def test_bad_patterns_are_refused(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        nmflow.Pattern(text)
    assert isinstance(caught.value, NMFlowError)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert text in message or repr(text)[1:-1] in message
    assert "kept" in message or "panel" in message  # N is the number kept: said in the error


@pytest.mark.parametrize("value", [None, 4, 1.5, (1, 4), b"1:4", ["1:4"]])
def test_wrong_types_are_refused(value: object) -> None:
    with pytest.raises(PatternError):
        nmflow.Pattern(value)  # type: ignore[arg-type]


@given(st.text(max_size=12))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        pattern = nmflow.Pattern(text)
    except PatternError:
        return
    assert 1 <= pattern.n <= pattern.m
    assert pattern.panel >= 1
    assert nmflow.Pattern(str(pattern)) == pattern
