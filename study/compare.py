"""Paired comparisons over seeds, and the protocol's verdict on each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pandas as pd
from choose import SEEDS
from scipy import stats

from nmflow.experiments.report.statistics import Paired, holm, paired, summary

POWER = 0.8
LEAST = len(SEEDS)
"""The least number of shared seeds for a verdict; a cell with fewer is shown alone."""


@dataclass(frozen=True)
class Cell:
    """One setup at one pattern against a rival, in one figure of which more is better.

    Attributes:
        setup: what is compared.
        pattern: its pattern.
        rival: what it is compared with.
        mean: the setup's own mean over seeds.
        difference: to the rival, paired by seed.
        p: adjusted by Holm over the family.
        detectable: the difference that as many seeds would have shown (power 80 %).
    """

    setup: str
    pattern: str
    rival: str
    mean: float
    difference: Paired
    p: float
    detectable: float

    @property
    def better(self) -> bool:
        """Whether the setup is above its rival, by Holm's p."""
        return self.p < 0.05 and self.difference.mean > 0

    @property
    def worse(self) -> bool:
        """Whether it is below, by Holm's p."""
        return self.p < 0.05 and self.difference.mean < 0

    def verdict(self, claimed: float | None = None) -> str:
        """The protocol's word; `claimed` is the gain of the paper, in the figure's unit."""
        d = self.difference
        decided = "confirmed" if d.mean > 0 else "reversed"
        word = decided if self.p < 0.05 else "undecided"
        if claimed is not None and d.high is not None and d.high < claimed and word != "reversed":
            word += ", below the paper's size"
        return word


def by_seed(frame: pd.DataFrame, setup: str, pattern: str | None, metric: str) -> dict[int, float]:
    """The figure of every seed; a dense network has it at every pattern."""
    rows = frame[frame["setup"] == setup]
    if pattern is not None:
        rows = rows[rows["pattern"] == pattern]
    return {int(seed): float(value) for seed, value in zip(rows["seed"], rows[metric], strict=True)}


def family(
    frame: pd.DataFrame,
    pairs: Iterable[tuple[str, str, str, str | None]],
    metric: str,
    least: int = LEAST,
) -> list[Cell]:
    """Compare (setup, pattern) with (rival, its pattern), all of one family.

    Args:
        frame: a row a run, with the columns `setup`, `pattern`, `seed` and the figure.
        pairs: setup, its pattern, the rival, the rival's pattern (None: any).
        metric: the column; more is better.
        least: seeds that a pair must share to be judged.
    """
    found = []
    for setup, pattern, rival, rival_pattern in pairs:
        mine = by_seed(frame, setup, pattern, metric)
        theirs = by_seed(frame, rival, rival_pattern, metric)
        difference = paired(mine, theirs)
        if difference is not None and difference.p is not None and difference.n >= least:
            shared = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
            found.append(
                (setup, pattern, rival, summary(list(mine.values())).mean, difference, shared)
            )
    adjusted = holm([d.p or 0.0 for *_, d, _ in found])
    return [
        Cell(setup, pattern, rival, mean, d, p, detectable(shared))
        for (setup, pattern, rival, mean, d, shared), p in zip(found, adjusted, strict=True)
    ]


def joined(families: dict[str, list[Cell]]) -> dict[str, list[Cell]]:
    """The same cells, adjusted by Holm as one family."""
    adjusted = iter(holm([c.difference.p or 0.0 for cells in families.values() for c in cells]))
    return {name: [replace(c, p=next(adjusted)) for c in cells] for name, cells in families.items()}


def detectable(differences: list[float]) -> float:
    """(t₀.₉₇₅ + t₀.₈)·s/√n: what a paired test of as many seeds shows with 80 % power.

    Example:
        >>> round(detectable([0.0, 1.0, 2.0]), 2)
        3.1
    """
    s = summary(differences)
    freedom = s.n - 1
    t = stats.t.ppf(0.975, freedom) + stats.t.ppf(POWER, freedom)
    return float(t) * (s.sd or 0.0) / math.sqrt(s.n)
