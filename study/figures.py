"""The figures of the study."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from compare import by_seed
from matplotlib.axes import Axes

from nmflow.experiments import plots
from nmflow.experiments.results import write
from nmflow.experiments.statistics import summary


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
