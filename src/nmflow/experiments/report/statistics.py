"""Statistics over seeds: mean, deviation, paired differences and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit  # scipy.stats takes a second to import

LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of one figure over seeds; `sd` is None for a single seed."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences with its 95 % interval, from Student's t.

    Attributes:
        n: pairs, which are the seeds that both have.
        mean: mean of (this - baseline).
        low, high: the interval; None for a single pair.
        p: two-sided p of a paired t-test; None for a single pair.
        below, above: pairs in which this is below or above the baseline.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    below: int
    above: int

    @property
    def differs(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def summary(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation.

    Example:
        >>> summary([1.0, 3.0])
        Summary(n=2, mean=2.0, sd=1.4142135623730951)
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Summary(n, mean, None)
    return Summary(n, mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean, from Student's t; None for a single value.

    Example:
        >>> low, high = interval([1.0, 2.0, 3.0])
        >>> round(low, 2), round(high, 2)
        (-0.48, 4.48)
    """
    s = summary(values)
    if s.sd is None:
        return None
    half = float(stdtrit(s.n - 1, (1 + LEVEL) / 2)) * s.sd / math.sqrt(s.n)
    return s.mean - half, s.mean + half


def paired(these: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """The paired difference; None if they share no seed.

    If all pairs have equal differences, the interval has no width.

    Example:
        >>> paired({0: 1.0, 1: 2.0, 2: 3.5}, {0: 1.5, 1: 2.5, 2: 3.5}).below
        2
    """
    differences = [these[seed] - baseline[seed] for seed in sorted(these) if seed in baseline]
    if not differences:
        return None
    below, above = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    s = summary(differences)
    if s.sd is None:
        return Paired(1, s.mean, None, None, None, below, above)
    error = s.sd / math.sqrt(s.n)
    half = float(stdtrit(s.n - 1, (1 + LEVEL) / 2)) * error
    if error > 0:
        p = float(2 * stdtr(s.n - 1, -abs(s.mean) / error))
    else:
        p = 1.0 if s.mean == 0 else 0.0
    return Paired(s.n, s.mean, s.mean - half, s.mean + half, p, below, above)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values, one per comparison.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    out, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = highest
    return out
