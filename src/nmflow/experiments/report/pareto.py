"""Quality against cost: a point per recipe and setting, and the points on the front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nmflow.experiments.report.compare import LESS_IS_BETTER
from nmflow.experiments.report.settings import Cell, Group
from nmflow.experiments.report.statistics import Summary, interval
from nmflow.experiments.report.times import Times

# The costs of a result, and the measured time, each with its label in plots.
AXES: Mapping[str, str] = {
    "training_flops": "training FLOPs of the whole run",
    "inference_flops": "inference FLOPs of one example",
    "bytes": "bytes of values and index",
    "time_us": "measured inference time",
}
COUNTED = {
    "training_flops": "run_training_flops",
    "inference_flops": "flops",
    "bytes": "bytes",
}


@dataclass(frozen=True, eq=False)
class Point:
    """One recipe in one setting.

    Attributes:
        cell: the recipe and setting.
        label: the keys of its setting that differ from others; empty if none do.
        quality: the headline figure over seeds.
        low, high: the 95 % interval of its mean; None for one seed.
        costs: the known and positive costs, by the names of `AXES`.
    """

    cell: Cell
    label: str
    quality: Summary
    low: float | None
    high: float | None
    costs: Mapping[str, float]


def points(group: Group, times: Times) -> list[Point]:
    """A point for each recipe and setting of a group; a family's dense runs count once."""
    out = []
    for cell in group.cells():
        values = list(cell.recipe.values(group.headline).values())
        low, high = interval(values) or (None, None)
        label = group.label(cell.setting, cell.dense, short=True)
        quality = cell.recipe.summary(group.headline)
        out.append(Point(cell, label, quality, low, high, _costs(cell, times)))
    return out


def front(found: Sequence[Point], axis: str, less: bool) -> list[Point]:
    """The points that no other point beats in one of cost and quality and equals in the other.

    Args:
        found: the points; those without a cost on this axis are left out.
        axis: a name of `AXES`.
        less: whether less of the headline figure is better.

    Returns:
        The front by means, from low to high cost.
    """
    sign = -1.0 if less else 1.0
    held = [(p.costs[axis], sign * p.quality.mean, p) for p in found if axis in p.costs]
    held.sort(key=lambda one: (one[0], -one[1]))
    out: list[tuple[float, float, Point]] = []
    for cost, good, point in held:
        beaten = out and (good < out[-1][1] or (good == out[-1][1] and cost > out[-1][0]))
        if not beaten:
            out.append((cost, good, point))
    return [point for _, _, point in out]


def rows(group: Group, times: Times) -> Iterable[dict[str, Any]]:
    """The rows of `pareto.csv`."""
    found = points(group, times)
    less = group.headline in LESS_IS_BETTER
    fronts = {axis: front(found, axis, less) for axis in AXES}
    for point in found:
        cell = point.cell
        timed = times.of(cell)
        yield {
            "task": group.title,
            "setting_hash": cell.setting.hash,
            **group.place(cell),
            "recipe": cell.recipe.title,
            "metric": group.headline,
            "n": point.quality.n,
            "mean": point.quality.mean,
            "mean_low": point.low,
            "mean_high": point.high,
            **{axis: point.costs.get(axis) for axis in AXES},
            "time_us_q10": timed.timing.q10 if timed else None,
            "time_us_q90": timed.timing.q90 if timed else None,
            "time_way": timed.way if timed else None,
            **{f"front_{axis}": point in fronts[axis] for axis in AXES},
        }


def _costs(cell: Cell, times: Times) -> dict[str, float]:
    runs = [run["cost"] for run in cell.recipe.runs.values()]
    costs = {
        axis: math.fsum(cost[key] for cost in runs) / len(runs) for axis, key in COUNTED.items()
    }
    if timed := times.of(cell):
        costs["time_us"] = timed.timing.median
    return {axis: cost for axis, cost in costs.items() if cost > 0}
