"""Rows of a table that crosses several axes: the fast tests have every pair of values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes; those that no pair of values needs are slow.

    A row is fast if the places of its values add up to a multiple of the shortest axis's length.
    So any two values meet: some value of a third axis completes their sum.
    """
    least = min(map(len, axes))
    rows = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[i] for axis, i in zip(axes, places, strict=True)]
        names = [str(getattr(value, "id", value)).removeprefix("torch.") for value in values]
        marks = () if sum(places) % least == 0 else pytest.mark.slow
        rows.append(pytest.param(*values, id="-".join(names), marks=marks))
    return rows
