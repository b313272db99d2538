"""Which cut a product of few tokens takes on a GPU: that of the nearest one that was timed.

What is taken was the fastest on an H200 (`cuda/cuts.csv`, which `scripts/gpu_page.py` writes).
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from typing import NamedTuple

from nmflow.kernels.gpu_plan import MOST_LOOKUP, Card, Plan, make, most_tokens, unit
from nmflow.kernels.layout import Shape


class Cut(NamedTuple):
    """How the work of a product was cut where that was timed; as `make` takes it.

    `int8`: whether it was timed with values of 8 bits; otherwise they had two bytes.
    """

    shape: Shape
    tokens: int
    warps: int
    slices: int
    rows: int
    shares: int
    stages: int
    kind: str = "decode"
    int8: bool = False


@functools.cache
def measured() -> tuple[Cut, ...]:
    """The best cut of every product that was timed, of those that were tried."""
    text = (files("nmflow.kernels") / "cuda" / "cuts.csv").read_text()
    rows = csv.DictReader(text.splitlines())
    return tuple(
        Cut(
            Shape.of(int(row["out"]), int(row["inputs"]), row["pattern"]),
            *(int(row[name]) for name in Cut._fields[1:-2]),
            kind=row["kind"],
            int8=row["int8"] == "True",
        )
        for row in rows
    )


def plan(shape: Shape, half: bool, tokens: int, card: Card, int8: bool = False) -> Plan | None:
    """The plan of the product that is nearest among those that were timed; None for a dense matrix.

    Where its plan does not fit into a block of this card, the inputs are shared out further, and
    then the next product's is tried.
    """
    if tokens > most_tokens(shape):
        return None
    return next(near(shape, half, tokens, card, int8), None)


def near(shape: Shape, half: bool, tokens: int, card: Card, int8: bool = False) -> Iterator[Plan]:
    """The plan that each product that was timed gives, the nearest product first."""
    most = -(-shape.inputs // unit(shape))
    # With values of 8 bits a panel's rows are looked up as others are.
    own = replace(shape, panel=1) if int8 and tokens <= MOST_LOOKUP else shape
    for cut in sorted(measured(), key=lambda cut: distance(cut, own, tokens, card, int8)):
        if cut.kind == "decode" and not _fits_registers(cut.warps, cut.rows, tokens):
            continue
        tiles = cut.warps // cut.slices * cut.rows  # of a block
        blocks = -(-shape.tiles // tiles) / -(-cut.shape.tiles // tiles)
        scale = round(math.log2(card.processors / Card().processors / blocks))
        shares = min(round(cut.shares * 2.0**scale), most // cut.slices) or 1
        while True:
            cut_as = (cut.warps, cut.slices, cut.rows, shares, cut.stages, cut.kind, int8)
            made = make(shape, half, tokens, card, *cut_as)
            if made is not None:
                yield made
            if made is not None or shares >= most:
                break
            shares = min(2 * shares, most)


def distance(cut: Cut, shape: Shape, tokens: int, card: Card, int8: bool = False) -> float:
    """How far a product is from one that was timed, in doublings of what it is made of."""
    theirs = _features(cut.shape, cut.tokens, Card(), cut.int8)
    own = _features(shape, tokens, card, int8)
    return sum(abs(a - b) for a, b in zip(theirs, own, strict=True))


def _features(shape: Shape, tokens: int, card: Card, int8: bool) -> tuple[float, ...]:
    return (
        *map(math.log2, (shape.n / shape.m, shape.tiles / card.processors, shape.inputs, tokens)),
        float(not int8),  # two bytes are one doubling
        9.0 * shape.shared,  # a panel is multiplied by other loops
    )


def _fits_registers(warps: int, rows: int, tokens: int) -> bool:
    """16 warps have 128 registers a thread, and the sums alone would take 64."""
    return warps * rows * min(tokens, 64) <= 1024
