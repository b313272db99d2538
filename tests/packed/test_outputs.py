"""Outputs that ought to be the same: what counts as far, wherever two networks are compared."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmflow.errors import CompressError
from nmflow.packed.onnx_files import agree
from nmflow.packed.outputs import check_near, distance
from nmflow.packed.proof import Ran, check_same

INF, NAN = math.inf, math.nan
# Everything that compares: two outputs, and how far they may be apart.
CHECKS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "an export": lambda a, b: agree([a], [b]),
    "the int8 network": lambda a, b: check_near([a], [b], 0.1, "this", "that", "mend it"),
    "a packed network": lambda a, b: check_same(Ran({}, [a]), Ran({}, [b])),
    "a packed int8 network": lambda a, b: check_same(Ran({}, [a]), Ran({}, [b]), True),
}
FAR = {
    "a NaN where there was a number": ([1.0, 2.0], [NAN, 2.0]),
    "a number where there was a NaN": ([NAN, 2.0], [1.0, 2.0]),
    "an infinity where there was a number": ([1.0, 2.0], [1.0, INF]),
    "the other infinity": ([-INF, 2.0], [INF, 2.0]),
    "far beside a mask": ([-INF, 1.0], [-INF, 5.0]),
    "far beside a NaN": ([NAN, 1.0], [NAN, 5.0]),
    "far beside an infinity": ([INF, 1.0], [INF, 5.0]),
    "another shape": ([1.0, 2.0], [[1.0, 2.0]]),
    "far": ([1.0, 2.0], [1.0, 3.0]),
}
NEAR = {
    "the same": ([1.0, -2.0], [1.0, -2.0]),
    "within rounding": ([1.0, 2.0], [1.0, 2.0001]),
    "masked alike": ([-INF, 1.0, NAN, INF], [-INF, 1.0, NAN, INF]),
    "nothing": ([], []),
    "tiny beside tiny": ([1e-12], [-1e-12]),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("what", FAR)
def test_what_differs_is_told(check: str, what: str) -> None:
    want, got = map(torch.tensor, FAR[what])
    with pytest.raises(CompressError, match=r"output 0 of .* differs from that of .*: \w+"):
        CHECKS[check](want.double(), got.double())


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("what", NEAR)
def test_what_agrees_passes(check: str, what: str) -> None:
    want, got = (torch.tensor(x, dtype=torch.float64) for x in NEAR[what])
    CHECKS[check](want, got)


def test_another_number_of_outputs_is_told() -> None:
    with pytest.raises(CompressError, match="this has 0 outputs and that 1: mend it"):
        check_near([torch.ones(1)], [], 0.1, "this", "that", "mend it")


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=8))
def test_the_distance_is_that_of_a_loop(pairs: list[tuple[float, float]]) -> None:
    want, got = (torch.tensor([p[i] for p in pairs], dtype=torch.float64) for i in (0, 1))
    some = sorted(abs(a) for a, _ in pairs if math.isfinite(a) and a)
    largest = min(some[-1], 30 * some[(len(some) - 1) // 2]) if some else 0.0
    far = 0.0
    for a, b in pairs:
        if a == b or (math.isnan(a) and math.isnan(b)):
            continue
        finite = math.isfinite(a) and math.isfinite(b)
        far = max(far, abs(a - b) / max(largest, abs(a), 1e-6) if finite else INF)
    assert distance(want, got) == pytest.approx(far)
