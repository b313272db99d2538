"""Plots over several settings: quality by setting, a forest plot, density by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm

from nmflow.experiments.report.compare import PLACEMENT, Recipe, Setting
from nmflow.experiments.report.setting_plots import difference_axes, draw, style
from nmflow.experiments.report.settings import Group
from nmflow.experiments.report.statistics import Paired, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def panels(group: Group) -> tuple[list[str], dict[str, list[Setting]]]:
    """The layout of a group's settings: the keys along the x axis, and a panel per combination of
    the others, by its label.

    The x axis has the patterns, or else the first key that differs. Keys whose values always change
    together (a placement sets pattern and include) share it.
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
    """The headline figure over settings: a line per recipe with 95 % intervals, dense as a band."""
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
    ordered = len(along) == 1  # only then does a line between two settings mean anything
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
    """The dense bound, if all settings share one; two networks have two."""
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


def forest(rows: Sequence[tuple[str, Recipe, Paired]], headline: str) -> str:
    """Differences to the baseline as a forest plot: one row per recipe and setting."""

    def paint(axes: list[Axes]) -> None:
        (ax,) = axes
        for y, (_, recipe, d) in enumerate(reversed(rows)):
            how = style(recipe.place)
            ax.plot([d.mean], [y], marker=how["marker"], color=how["color"], ms=6, ls="")
            if d.low is not None and d.high is not None:
                ax.plot([d.low, d.high], [y, y], color=how["color"], lw=1.8)
        difference_axes(ax, headline, [name for name, _, _ in rows], 7)
        ax.tick_params(axis="y", labelsize=8)
        ax.grid(visible=False, axis="y")

    return draw(paint, height=0.9 + 0.24 * len(rows))


def densities(names: Sequence[str], columns: Mapping[str, Mapping[str, float]]) -> str:
    """Density by layer as shades: one row per weight, one column per setting; light is dense."""
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
