"""The fast rows of a crossed table have every pair."""

from __future__ import annotations

import itertools

import pytest

from pairs import pairwise


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), (3, 2, 5), (4, 4, 4), (2, 3, 2, 7), (1, 3, 4), (6, 5, 5)]
)
def test_any_two_values_meet_in_a_fast_row(sizes: tuple[int, ...]) -> None:
    axes = [[f"{axis}.{i}" for i in range(size)] for axis, size in enumerate(sizes)]
    rows = pairwise(*axes)
    assert [row.values for row in rows] == list(itertools.product(*axes))
    fast = [set(row.values) for row in rows if not row.marks]
    for one, other in itertools.combinations(axes, 2):
        for pair in itertools.product(one, other):
            assert any(set(pair) <= values for values in fast), pair
    assert len(fast) <= -(-len(rows) // min(sizes))
