"""The figures of the study."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from compare import Cell, by_seed
from matplotlib.axes import Axes
from tables import PAGES

from nmflow.experiments.files import write
from nmflow.experiments.report import setting_plots as plots
from nmflow.experiments.report.statistics import summary


def by_pattern(frame: pd.DataFrame, patterns: list[str], path: Path) -> None:
    """Mean of every setup over patterns, the dense network as a line."""
    setups = list(dict.fromkeys(frame["setup"]))

    def paint(axes: list[Axes]) -> None:
        ax = axes[0]
        for place, setup in enumerate(setups):
            if setup == "Dense":
                values = list(by_seed(frame, setup, None, "points").values())
                ax.axhline(summary(values).mean, label=setup, color="#000000", lw=1)
                continue
            xs, ys = [], []
            for x, pattern in enumerate(patterns):
                values = list(by_seed(frame, setup, pattern, "points").values())
                if values:
                    xs.append(x)
                    ys.append(summary(values).mean)
            ax.plot(xs, ys, label=setup, lw=1.4, markersize=4.5, **plots.style(place))
        ax.set_xticks(range(len(patterns)), patterns)
        ax.set_xlabel("pattern (weights kept : of)")
        ax.set_ylabel("test figure, points")

    write(path, plots.draw(paint, height=4.2))


def curves(spread: pd.DataFrame, dense: float, name: str) -> str:
    """A figure that falls over training, a row of `spread` a line; returns the Markdown for it."""

    def paint(axes: list[Axes]) -> None:
        ax = axes[0]
        ax.axhline(dense, label="Dense, as it is", color="#000000", lw=1)
        for place, (label, row) in enumerate(spread.iterrows()):
            xs = [float(tokens) / 1e6 for tokens in spread.columns]
            ax.plot(xs, row.to_list(), label=label, lw=1.4, markersize=4.5, **plots.style(place))
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("tokens of training, millions")
        ax.set_ylabel("held-out perplexity")

    write(PAGES / "figures" / f"{name}.svg", plots.draw(paint, height=4.2))
    return f"![Perplexity over tokens](figures/{name}.svg)"


def forest(cells: list[Cell], name: str, where: list[str] | None = None) -> str:
    """Differences with their intervals, a row a comparison; returns the Markdown that shows it."""
    places = where or [c.pattern for c in cells]
    labels = [f"{c.setup}, {p} − {c.rival}" for c, p in zip(cells, places, strict=True)]

    def paint(axes: list[Axes]) -> None:
        ax = axes[0]
        for y, c in enumerate(cells):
            d = c.difference
            low, high = d.low or d.mean, d.high or d.mean
            filled = "#0072B2" if c.p < 0.05 else "white"
            ax.plot([low, high], [y, y], color="#0072B2", lw=1.6)
            ax.plot(d.mean, y, "o", color="#0072B2", markerfacecolor=filled)
        ax.axvline(0.0, color="#000000", lw=1)
        ax.set_yticks(range(len(cells)), labels)
        ax.set_ylim(len(cells) - 0.5, -0.5)
        ax.set_xlabel("difference in points (95 % interval; filled: Holm's p below 0.05)")

    write(PAGES / "figures" / f"{name}.svg", plots.draw(paint, height=0.9 + 0.28 * len(cells)))
    return f"![Differences with intervals](figures/{name}.svg)"
