"""Plots of a setting as SVG: readable in print and for the colour-blind, and reproducible."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FuncFormatter, MaxNLocator

from nmflow.experiments.report.compare import LESS_IS_BETTER, Recipe, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, darkest first; each has a dash and a marker, for print in grey.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_FINE = ((0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (3, 3)))
DASHES = ("-", "--", (0, (9, 1)), "-.", *_FINE)
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")
STYLE: Any = {
    "svg.hashsalt": "nmflow",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e2e2",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def style(place: int) -> dict[str, Any]:
    """Colour, dash and marker of the recipe at a place of the page; no two places share all three.

    The first eight differ in each of them. For the next ones the markers shift, so that no pair of
    colour and marker repeats. From the 65th place on, the marker is the place's number.
    """
    turn, count = place // len(COLOURS), len(MARKERS)
    marker = MARKERS[(place + 3 * turn) % count] if turn < count else f"${place}$"
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[(place + turn) % len(DASHES)],
        "marker": marker,
    }


def _take_literally(figure: Figure) -> None:
    """Escape dollar signs in names, which start a formula in matplotlib."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        if own := ax.get_legend():
            texts += own.get_texts()
        for axis in (ax.xaxis, ax.yaxis):
            if isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter):
                texts += axis.get_ticklabels()
    for text in texts:
        text.set_parse_math(False)


def draw(
    paint: Callable[[list[Axes]], None], columns: int = 1, height: float = 3.4, rows: int = 1
) -> str:
    """Draw an SVG with this many axes; `height` is the height of one row of them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, height * rows))
        FigureCanvasSVG(figure)
        axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
        paint(axes)
        # One legend for all axes, below them, where it covers no line.
        found = [ax.get_legend_handles_labels() for ax in axes]
        named = {
            name: line for lines, names in found for line, name in zip(lines, names, strict=True)
        }
        if named:
            columns = min(6, max(1, int(620 / (45 + 4.4 * max(map(len, named))))))
            figure.legend(
                named.values(), named, loc="outside lower center", ncols=columns, fontsize=8
            )
        _take_literally(figure)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": "nmflow"})
    return sink.getvalue()


def line(place: int) -> dict[str, Any]:
    """`style` for a curve."""
    return {**style(place), "lw": 1.6, "markersize": 4, "markevery": 0.2}


def series(recipe: Recipe, key: str, log: str = "history") -> tuple[np.ndarray, np.ndarray]:
    """The steps of one entry of the runs' logs, and its values with one row per seed."""
    rows = [
        {entry["step"]: entry[key] for entry in run[log] if entry.get(key) is not None}
        for run in recipe.runs.values()
    ]
    steps = sorted(set(rows[0]).intersection(*rows[1:]))
    return np.array(steps), np.array([[row[step] for step in steps] for row in rows])


def curves(setting: Setting) -> str:
    """Curves over steps: the losses, and for sparse recipes δ and the share of kept weights."""

    def paint(axes: list[Axes]) -> None:
        held_out = "validation loss, N:M network" if setting.sparse else "validation loss"
        _loss(axes[0], setting, "loss", "training loss, as computed")
        _loss(axes[1], setting, "eval_loss", held_out)
        axes[0].set_ylabel("loss")
        for ax, key in zip(axes[2:], ("delta", "density"), strict=False):
            _schedule(ax, setting, key)
        for ax in axes[-2:]:
            ax.set_xlabel("optimizer step")

    return draw(paint, columns=2, height=2.9, rows=2 if setting.sparse else 1)


def _loss(ax: Axes, setting: Setting, key: str, title: str) -> None:
    top = 0.0
    for recipe in setting.recipes:
        steps, values = series(recipe, key)
        if not len(steps):
            continue
        mean, colour = values.mean(0), style(recipe.place)["color"]
        ax.plot(steps, mean, label=recipe.title, **line(recipe.place))
        ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.12, lw=0)
        # The first tenth is steep for all recipes, and would flatten the rest.
        late = mean[steps > 0.1 * steps[-1]]
        top = max(top, float(late.max()) if len(late) else 0.0)
    if top:
        ax.set_ylim(top=top * 1.02)
    ax.set_title(title, fontsize=10)


def _schedule(ax: Axes, setting: Setting, key: str) -> None:
    for recipe in setting.recipes:
        steps, values = series(recipe, key)
        if not len(steps):
            continue
        fades = key == "delta" and recipe.name.startswith(("mdgf", "hybrid", "settling"))
        drawn = "default" if fades else "steps-post"
        ax.plot(steps, values.mean(0), drawstyle=drawn, **line(recipe.place))
    if key == "delta":
        ax.set_title("δ, the factor of pruned weights", fontsize=10)
        ax.set_ylabel("δ")
        return
    ax.set_title("share of weights kept", fontsize=10)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(lambda v, _: f"1/{round(1 / v)}" if v < 1 else "1")


def differences(setting: Setting) -> str:
    """Each sparse recipe's difference to the baseline: seeds, mean and 95 % interval."""
    shown = [m for m in setting.metrics if m in ("loss", setting.headline)]

    def paint(axes: list[Axes]) -> None:
        baseline = setting.baseline
        rows = [r for r in setting.recipes if r is not baseline and r.name != "dense"]
        for ax, metric in zip(axes, shown, strict=True):
            for y, recipe in enumerate(reversed(rows)):
                found = setting.comparison(recipe, metric)
                if found is None or baseline is None:
                    continue
                how = style(recipe.place)
                base = baseline.values(metric)
                dots = [v - base[s] for s, v in recipe.values(metric).items() if s in base]
                ax.plot(
                    dots,
                    [y - 0.22] * len(dots),
                    ls="",
                    marker=how["marker"],
                    ms=4,
                    mfc="none",
                    mec=how["color"],
                )
                d = found.difference
                ax.plot([d.mean], [y], marker=how["marker"], color=how["color"], ms=8, ls="")
                if d.low is not None and d.high is not None:
                    ax.plot([d.low, d.high], [y, y], color=how["color"], lw=2)
            difference_axes(ax, metric, [r.title for r in rows], 5)
        for ax in axes[1:]:
            ax.set_yticklabels([])

    return draw(paint, columns=len(shown), height=1.2 + 0.45 * len(setting.recipes))


def difference_axes(ax: Axes, metric: str, names: Sequence[str], ticks: int) -> None:
    """Axes for differences in one figure: a line at zero, and a row per name from the top."""
    ax.axvline(0, color="#333333", lw=1)
    ax.xaxis.set_major_locator(MaxNLocator(ticks))
    better = "left" if metric in LESS_IS_BETTER else "right"
    ax.set_xlabel(f"test {metric}: difference, better to the {better}")
    ax.set_yticks(range(len(names)), names[::-1])
    ax.set_ylim(-0.6, len(names) - 0.4)


def tracked(setting: Setting, key: str, label: str) -> str:
    """A tracked measure of the gradient over steps, for kept and for pruned weights."""

    def paint(axes: list[Axes]) -> None:
        for ax, part in zip(axes, ("kept", "pruned"), strict=True):
            for recipe in setting.recipes:
                steps, values = series(recipe, f"{key}_{part}", "tracked")
                if len(steps):
                    ax.plot(steps, values.mean(0), label=recipe.title, **line(recipe.place))
            ax.set_title(f"{part} weights", fontsize=10)
            ax.set_xlabel("optimizer step")
            ax.set_yscale("log")
        axes[0].set_ylabel(label)

    return draw(paint, columns=2)
