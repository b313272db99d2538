"""Plots of quality against cost: one panel per cost, with fronts as step lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from nmflow.experiments.report.blocks import quantity
from nmflow.experiments.report.compare import LESS_IS_BETTER
from nmflow.experiments.report.pareto import Point, front
from nmflow.experiments.report.setting_plots import draw, style
from nmflow.experiments.report.settings import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pareto(group: Group, found: Sequence[Point], axes_of: Mapping[str, str]) -> str:
    """Quality against log costs: a panel per cost, a marker per recipe, fronts as step lines.

    Args:
        group: the settings.
        found: their points.
        axes_of: the costs by their names in `AXES`, each with the label of its axis.
    """
    columns = min(2, len(axes_of))
    rows = math.ceil(len(axes_of) / columns)

    def paint(axes: list[Axes]) -> None:
        for ax, (axis, what) in zip(axes, axes_of.items(), strict=False):
            _cost_panel(ax, group, found, axis, columns)
            ax.set_xlabel(what)
        for ax in axes[len(axes_of) :]:
            ax.set_visible(False)
        for ax in axes[::columns]:
            less = group.headline in LESS_IS_BETTER
            ax.set_ylabel(f"test {group.headline}, better {'down' if less else 'up'}")

    return draw(paint, columns, 4.2 if columns == 1 else 3.6, rows)


def _cost_panel(ax: Axes, group: Group, found: Sequence[Point], axis: str, columns: int) -> None:
    held = [p for p in found if axis in p.costs]
    less = group.headline in LESS_IS_BETTER
    best = front(held, axis, less)
    ax.set_xscale("log")
    costs = [p.costs[axis] for p in held]
    room = max((max(costs) / min(costs)) ** 0.08, 1.05)
    ax.set_xlim(min(costs) / room, max(costs) * room)
    for point in sorted(held, key=lambda p: p.cell.recipe.place):
        recipe, mean = point.cell.recipe, point.quality.mean
        how = {**style(recipe.place), "linestyle": "none"}
        ends = [[0.0], [0.0]]
        if point.low is not None and point.high is not None:
            ends = [[mean - point.low], [point.high - mean]]
        ax.errorbar(
            point.costs[axis], mean, yerr=ends, label=recipe.title, ms=6, lw=1.2, capsize=2,
            alpha=0.9, **how,
        )  # fmt: skip
    x = [p.costs[axis] for p in best]
    y = [p.quality.mean for p in best]
    line = {"color": "#555555", "lw": 1.0, "ls": (0, (2, 2)), "zorder": 1}
    ax.step([*x, max(costs)], [*y, y[-1]], where="post", label="front of the means", **line)
    ax.margins(y=0.12)
    _ticks(ax, costs, axis, 6 if columns == 1 else 4)
    _labels(ax, held, axis, less, columns)


def _ticks(ax: Axes, costs: Sequence[float], axis: str, many: int) -> None:
    low, high = ax.get_xlim()
    if max(costs) < 5 * min(costs):
        ax.xaxis.set_major_locator(FixedLocator(list(MaxNLocator(many).tick_values(low, high))))
    else:
        subs = (1.0, 2.0, 5.0) if max(costs) < 200 * min(costs) and many > 4 else (1.0, 3.0)
        ax.xaxis.set_major_locator(LogLocator(10, subs))
    ax.set_xlim(low, high)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda v, _: duration(v) if axis == "time_us" else quantity(v))


def duration(microseconds: float) -> str:
    """Microseconds as readable text: `1.5 ms`.

    Example:
        >>> duration(12.0), duration(1500.0), duration(2e6)
        ('12 µs', '1.5 ms', '2 s')
    """
    for limit, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= limit:
            return f"{microseconds / limit:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def _labels(ax: Axes, held: Sequence[Point], axis: str, less: bool, columns: int) -> None:
    """Name each setting once, at its best point, if there is room to read it."""
    best: dict[str, Point] = {}
    for p in held:
        old = best.setdefault(p.label, p)
        gain = p.quality.mean - old.quality.mean
        if (gain < 0) if less else (gain > 0):
            best[p.label] = p
    best.pop("", None)
    width, height = (
        8.6 * 72 * 0.86 / columns,
        4.2 * 72 * 0.7,
    )  # about the size of the axes, in points
    (x0, x1), (y0, y1) = np.log(ax.get_xlim()), ax.get_ylim()

    def spot(p: Point) -> tuple[float, float]:
        x = (math.log(p.costs[axis]) - x0) / (x1 - x0) * width
        return x, (p.quality.mean - y0) / (y1 - y0) * height

    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in map(spot, held)]
    names: list[tuple[float, ...]] = []
    for label, p in best.items():
        x, y = spot(p)
        wide, tall = 4.6 * len(label), 11.0
        tries = []
        for dx, dy in ((7, 5), (-7 - wide, 5), (7, -14), (-7 - wide, -14), (-wide / 2, 14),
                       (-wide / 2, -24), (9, 20), (9, -30)):  # fmt: skip
            box = (x + dx, y + dy, x + dx + wide, y + dy + tall)
            out = box[0] < 0 or box[2] > width or box[1] < 0 or box[3] > height
            hits = sum(_meet(box, mark) for mark in marks)
            hits += 3 * (sum(_meet(box, name) for name in names) + out)
            tries.append((hits, len(tries), dx, dy, box))
        hits, _, dx, dy, box = min(tries)
        if hits > 2:  # no room for a readable label; the tables have the name
            continue
        names.append(box)
        ax.annotate(
            label, (p.costs[axis], p.quality.mean), (dx, dy), textcoords="offset points",
            fontsize=8, color="#333333",
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.6, "shrinkB": 3},
        )  # fmt: skip


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
