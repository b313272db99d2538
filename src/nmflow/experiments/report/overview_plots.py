"""Drawings over several settings: quality by setting, quality against cost, density by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from nmflow.experiments.report.blocks import quantity
from nmflow.experiments.report.compare import LESS_IS_BETTER, PLACEMENT, Recipe, Setting
from nmflow.experiments.report.pareto import AXES, Point, front
from nmflow.experiments.report.setting_plots import draw, style
from nmflow.experiments.report.settings import Group
from nmflow.experiments.report.statistics import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def panels(group: Group) -> tuple[list[str], dict[str, list[Setting]]]:
    """How the settings of a group are laid out: the keys along the x axis, and one panel for each
    combination of the others, by its label.

    Along x go the patterns, or else the first key that differs; keys whose values come in fixed
    company (a placement sets pattern and include together) go along together.
    """
    sparse = [s for s in group.settings if s.sparse] or group.settings

    def choices(keys: Sequence[str]) -> set[tuple[str, ...]]:
        return {tuple(group.values[s.hash][k] for k in keys) for s in sparse}

    first = [key for key in group.keys if len(choices([key])) > 1][:1]
    along = list(first)
    for key in group.keys:
        together = len(choices([*first, key]))
        if key in group.usual or key in along:
            continue
        if together == max(len(choices(first)), len(choices([key]))):
            along.append(key)
    out: dict[str, list[Setting]] = {}
    for setting in sparse:
        values = group.values[setting.hash]
        others = [k for k in group.keys if k not in along and k not in group.usual]
        rest = ", ".join(f"{k} {values[k]}" for k in others)
        out.setdefault(rest, []).append(setting)
    return along, out


def by_setting(group: Group) -> str:
    """The headline figure over settings: one line a recipe with 95 % intervals, dense as a band."""
    along, found = panels(group)
    columns = min(len(found), 3)

    def paint(axes: list[Axes]) -> None:
        for ax, (name, settings) in zip(axes, found.items(), strict=False):
            _panel(ax, group, along, settings)
            ax.set_title(name.replace(", ", "\n"), fontsize=8)
        for ax in axes[len(found) :]:
            ax.set_visible(False)
        shown = axes[: len(found)]
        low, high = (pick(ax.get_ylim()[end] for ax in shown) for pick, end in ((min, 0), (max, 1)))
        for place, ax in enumerate(shown):
            ax.set_ylim(low, high)
            if place % columns == 0:
                ax.set_ylabel(f"test {group.headline}")
            else:
                ax.set_yticklabels([])

    return draw(paint, columns, 3.6, math.ceil(len(found) / columns))


def _panel(ax: Axes, group: Group, along: Sequence[str], settings: Sequence[Setting]) -> None:
    ordered = len(along) == 1  # only then does a line between two settings mean a thing
    titles = sorted({(r.place, r.title) for s in settings for r in s.sparse})
    for number, (place, title) in enumerate(titles):
        shift = (number - (len(titles) - 1) / 2) * min(0.1, 0.5 / len(titles))
        x, mean, bars = [], [], []
        for at, setting in enumerate(settings):
            recipe = next((r for r in setting.recipes if r.title == title), None)
            if recipe is not None:
                centre, below, above = _reach(recipe, group.headline)
                x.append(at + shift)
                mean.append(centre)
                bars.append((below, above))
        how = style(place) if ordered else {**style(place), "linestyle": "none"}
        spread = np.array(bars).T
        ax.errorbar(x, mean, yerr=spread, label=title, lw=1.4, ms=5, capsize=3, elinewidth=1, **how)
    for recipe in _dense(settings):
        centre, below, above = _reach(recipe, group.headline)
        colour = style(recipe.place)["color"]
        ax.axhline(centre, color=colour, lw=1.2, label=f"{recipe.title} (band)")
        ax.axhspan(centre - below, centre + above, color=colour, alpha=0.12, lw=0)
    names = [_wrapped(group, along, s) for s in settings]
    ax.set_xticks(range(len(settings)), names, fontsize=8 if len(settings) < 7 else 6.5)
    ax.set_xlim(-0.5, len(settings) - 0.5)
    ax.grid(visible=False, axis="x")


def _dense(settings: Sequence[Setting]) -> list[Recipe]:
    """The dense bound, where all settings share one: two networks have two."""
    if len({s.family for s in settings}) != 1:
        return []
    return [r for r in settings[0].recipes if r.name == "dense"]


def _wrapped(group: Group, along: Sequence[str], setting: Setting) -> str:
    values = group.values[setting.hash]
    return "\n".join(
        values[k] if k in PLACEMENT else f"{k.rpartition('.')[2]} {values[k]}" for k in along
    ).replace(", ", "\n")


def _reach(recipe: Recipe, metric: str) -> tuple[float, float, float]:
    values = list(recipe.values(metric).values())
    mean, ends = recipe.summary(metric).mean, interval(values)
    return (mean, mean - ends[0], ends[1] - mean) if ends else (mean, 0.0, 0.0)


def pareto(group: Group, found: Sequence[Point], axis: str, what: str = "") -> str:
    """Quality against one cost, logarithmic: a marker a recipe, the front as a step line."""
    held = [p for p in found if axis in p.costs]
    less = group.headline in LESS_IS_BETTER
    best = front(held, axis, less)

    def paint(axes: list[Axes]) -> None:
        (ax,) = axes
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
        right = max(costs)
        line = {"color": "#555555", "lw": 1.0, "ls": (0, (2, 2)), "zorder": 1}
        ax.step([*x, right], [*y, y[-1]], where="post", label="front of the means", **line)
        ax.margins(y=0.12)
        _ticks(ax, costs, axis)
        ax.set_xlabel(what or AXES[axis])
        ax.set_ylabel(f"test {group.headline}, better {'down' if less else 'up'}")
        _labels(ax, held, axis, less)

    return draw(paint, 1, 4.2)


def _ticks(ax: Axes, costs: Sequence[float], axis: str) -> None:
    low, high = ax.get_xlim()
    if max(costs) < 5 * min(costs):
        ax.xaxis.set_major_locator(FixedLocator(list(MaxNLocator(6).tick_values(low, high))))
    else:
        subs = (1.0, 2.0, 5.0) if max(costs) < 200 * min(costs) else (1.0,)
        ax.xaxis.set_major_locator(LogLocator(10, subs))
    ax.set_xlim(low, high)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda v, _: duration(v) if axis == "time_us" else quantity(v))


def duration(microseconds: float) -> str:
    """Microseconds as people read them: `1.5 ms`.

    Example:
        >>> duration(12.0), duration(1500.0), duration(2e6)
        ('12 µs', '1.5 ms', '2 s')
    """
    for limit, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= limit:
            return f"{microseconds / limit:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def _labels(ax: Axes, held: Sequence[Point], axis: str, less: bool) -> None:
    """Name each setting once, at its best point, if there is room to read it."""
    best: dict[str, Point] = {}
    for p in held:
        old = best.setdefault(p.label, p)
        gain = p.quality.mean - old.quality.mean
        if (gain < 0) if less else (gain > 0):
            best[p.label] = p
    best.pop("", None)
    width, height = 8.6 * 72 * 0.86, 4.2 * 72 * 0.7  # about what the axes have, in points
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
        if hits > 2:  # no room where it could be read; the tables have it
            continue
        names.append(box)
        ax.annotate(
            label, (p.costs[axis], p.quality.mean), (dx, dy), textcoords="offset points",
            fontsize=8, color="#333333",
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.6, "shrinkB": 3},
        )  # fmt: skip


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def densities(names: Sequence[str], columns: Mapping[str, Mapping[str, float]]) -> str:
    """Density by layer as shades: a row a weight, a column a setting; light is dense."""
    held = [[column.get(name, math.nan) for column in columns.values()] for name in names]

    def paint(axes: list[Axes]) -> None:
        (ax,) = axes
        ax.grid(visible=False)
        shades = np.ma.masked_invalid(np.array(held))
        norm = LogNorm(max(min(0.5, float(shades.min())), 1e-3), 1.0)
        how: Any = {"cmap": "cividis", "norm": norm, "aspect": "auto"}
        ax.imshow(shades, **how)
        size = 7.5 if len(columns) < 9 else 6
        for y, row in enumerate(held):
            for x, value in enumerate(row):
                said = "–" if math.isnan(value) else f"{value:.3g}"
                light = math.isnan(value) or norm(value) > 0.45
                ink = "#000000" if light else "#ffffff"
                ax.text(x, y, said, ha="center", va="center", fontsize=size, color=ink)
        ax.set_xticks(range(len(columns)), [c.replace(", ", "\n") for c in columns], fontsize=size)
        ax.set_yticks(range(len(names)), names, fontsize=7)

    return draw(paint, 1, 1.0 + 0.22 * len(names))
