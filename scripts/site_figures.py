"""The drawings of the README and of the site, each from its source: `make figures`.

    python scripts/site_figures.py

`gain` is made from the tables of the study and of the benchmarks, `recipes` from the schedules
themselves, `panels` and `idea` from nothing but `nmflow.mask` and these lines.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from drawing import BLUE, FAINT, GREEN, INK, ORANGE, Axes, Drawing

import nmflow
from nmflow.experiments.report.statistics import summary
from nmflow.recipes import RECIPES

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
RESULTS = ROOT / "docs" / "study" / "results"
KERNELS = ROOT / "docs" / "benchmarks" / "data" / "kernels-f32.csv"

PATTERNS = ("1:4", "1:8", "1:16", "1:32")
WIDTH = 256
"""Of the feed-forward layers of the study's network; a narrower one has a share of it."""
TOKENS = 197
NETWORKS = ROOT / "docs" / "benchmarks" / "end_to_end.md"


def mean_points(frame: pd.DataFrame, setup: str, column: str = "test_accuracy") -> float:
    """Mean test figure of a setup over its seeds, in points."""
    return 100 * summary(frame.loc[frame["setup"] == setup, column].tolist()).mean


def int8_times() -> float:
    """How many times as fast as the best dense way torch's int8 runs ViT-Base."""
    section = NETWORKS.read_text("utf-8").partition("## ViT-Base")[2].partition("\n## ")[0]
    found = re.search(r"^\| int8 dynamic \(torch\) \|.*\| ([0-9.]+) \|  \|  \|$", section, re.M)
    assert found is not None, f"{NETWORKS} has no row of int8"
    return float(found[1])


def results(name: str) -> pd.DataFrame:
    """A table of the study."""
    return pd.read_parquet(RESULTS / name / "results.parquet")


def gain() -> Drawing:
    """Quality against size and time: sparse, narrower dense, int8 and dense."""
    dense = results("lm-dense")
    whole = mean_points(dense, "Dense")
    narrow = [(int(p.split(":")[1]), WIDTH // int(p.split(":")[1])) for p in PATTERNS]
    narrower = [(1 / m, mean_points(dense, f"Dense, FF {width}")) for m, width in narrow]
    settling = {}
    for p in PATTERNS:
        frame = results(f"lm-main-{p.replace(':', '-')}")
        settling[p] = mean_points(frame[frame["pattern"] == p], "Settling")
    kernels = pd.read_csv(KERNELS)
    kernels = kernels[kernels["tokens"] == TOKENS].groupby("way")
    size, speed = kernels["bytes_share"].mean(), kernels["times_best_dense"].mean()
    eight = pd.read_parquet(RESULTS / "lm-int8" / "int8.parquet")
    int8 = 100 * eight["int8_accuracy"].mean()

    made = Drawing(760, 340, "Test accuracy against bytes and against time")
    made.text(14, 22, "Quality against size and time", size=15, bold=True)
    made.text(
        14, 41, "Next-character accuracy of a small GPT-2 trained from scratch, five seeds; "
        "only its feed-forward weights are made smaller", size=11.5,
    )  # fmt: skip
    panels = (
        (62.0, "bytes of these weights", lambda p: size[p], 0.25),
        (430.0, "time of such weights in ViT-Base, one core", lambda p: 1 / speed[p],
         1 / int8_times()),
    )  # fmt: skip
    ticks = [(1.0, "1"), (0.5, "1/2"), (0.25, "1/4"), (0.125, "1/8"), (0.0625, "1/16"),
             (0.03125, "1/32")]  # fmt: skip
    for left, label, share, of_int8 in panels:
        axes = Axes(made, left, 62, 300, 196, (0.025, 1.25), (54.5, 63.0), True)
        axes.grid(ticks, [(y, f"{y}") for y in (56, 58, 60, 62)])
        made.text(left + 150, 292, f"{label}, dense = 1", size=11.5, anchor="middle")
        axes.plot(
            [(x, y) for x, y in [(1.0, whole), *narrower]], color=ORANGE, width=1.8, dash="5 3"
        )
        for x, y in narrower:
            made.dot(*axes.at(x, y), color=ORANGE, shape="s", size=4)
        line = [(share(p), settling[p]) for p in PATTERNS]
        axes.plot(line, color=BLUE, width=2.2)
        for p, (x, y) in zip(PATTERNS, line, strict=True):
            px, py = axes.at(x, y)
            made.dot(px, py, color=BLUE)
            made.text(px - 4, py - 9, p, size=11, color=BLUE, anchor="middle", bold=True)
        made.dot(*axes.at(of_int8, int8), color=GREEN, shape="d", size=5)
        made.dot(*axes.at(1.0, whole), color=INK, shape="s", size=4.5)
    made.text(26, 160, "accuracy, %", size=11.5, anchor="middle", turned=True)
    legend = (
        (70, INK, "s", "dense"),
        (150, GREEN, "d", "dense, int8"),
        (258, BLUE, "o", "sparse, trained with settling"),
        (468, ORANGE, "s", "dense, with a narrower feed-forward layer"),
    )
    for x, color, shape, said in legend:
        made.dot(x, 320, color=color, shape=shape)
        made.text(x + 11, 324, said, size=11.5)
    return made


def recipes() -> Drawing:
    """δ and the weights kept over the steps of each recipe, at 1:16."""
    steps, pattern = 400, nmflow.Pattern("1:16")
    shown = (
        ("one-shot", "sr-ste", "step"),
        ("gradual", "sdgf-stepwise", "sdgf-geometric"),
        ("mdgf-linear", "mdgf-exponential", "settling"),
        ("hybrid",),
    )
    names = [name for row in shown for name in row]
    made = Drawing(760, 616, "What each recipe does with a weight, over the steps")
    made.text(14, 22, "What a group of 16 goes through, over a run, at 1:16", size=15, bold=True)
    made.dot(20, 40, color=BLUE, shape="s")
    made.text(32, 44, "share of the weights that the mask keeps", size=11.5)
    made.dot(300, 40, color=ORANGE, shape="s")
    made.text(312, 44, "δ, the factor of the other weights (from 1 to 0)", size=11.5)
    for i, name in enumerate(names):
        left, top = 46 + 246 * (i % 3), 82 + 142 * (i // 3)
        axes = Axes(made, left, top, 196, 84, (0, steps), (0.0, 1.0))
        axes.grid([(0, "0"), (steps // 2, "½"), (steps, "K")], [(0, "0"), (1, "1")], size=10)
        made.text(left, top - 10, name, size=12, bold=True)
        recipe = RECIPES[name]
        stages = [recipe.stage(k, steps, pattern, 256) for k in range(steps + 1)]
        density = [(k, s.pattern.density if s.pattern else 1.0) for k, s in enumerate(stages)]
        delta = [(k, s.delta) for k, s in enumerate(stages)]
        if any(0 < d < 1 for _, d in delta):
            axes.plot(_corners(delta), color=ORANGE, width=2)
        axes.plot(_corners(density), color=BLUE, width=2)
        for line in _note(name):
            made.text(left + 190, top + 14 + 12 * line[0], line[1], size=10, anchor="end")
    for i, said in enumerate((
        "Each recipe has its defaults, over a run of K steps.",
        "A blue line at 1 is a dense network; at 1/16 each group keeps one weight.",
        "In each frame, hybrid fades the weights that the frame drops.",
        "Not shown: dense, ste, sdgf-panels (its density is constant), and",
        "maxq and s-ste, which also change the kept weights.",
    )):  # fmt: skip
        made.text(292, 530 + 18 * i, said, size=11.5)
    return made


def _note(name: str) -> list[tuple[int, str]]:
    """What the two curves do not show."""
    said = {
        "one-shot": ("the mask is", "taken once"),
        "sr-ste": ("pruned weights", "are pulled to 0"),
        "step": ("Adam's second", "moment is frozen"),
        "sdgf-geometric": ("one of 16, in groups", "of 128, 64, 32, 16"),
        "settling": ("W is drawn", "to W̃"),
    }
    return list(enumerate(said.get(name, ())))


def _corners(values: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """The points of a staircase or of a curve, without those inside of a level stretch."""
    kept: list[tuple[float, float]] = []
    for i, (x, y) in enumerate(values):
        before = values[i - 1][1] if i else None
        after = values[i + 1][1] if i + 1 < len(values) else None
        if y != before or y != after:
            if before is not None and y != before and abs(y - before) > 0.03:
                kept.append((x, before))
            kept.append((x, y))
    return kept


def panels() -> Drawing:
    """The kept weights of a small matrix, without panels and in panels of four rows."""
    torch.manual_seed(3)
    w = torch.randn(8, 16)
    made = Drawing(760, 236, "Kept weights at 1:4, with and without panels")
    cell = 19.0
    for left, pattern, said in (
        (30.0, "1:4", "1:4: each row keeps its own column of every four"),
        (420.0, "1:4@4", "1:4@4: four rows share their columns"),
    ):
        kept = nmflow.mask(w, pattern)
        made.text(left, 24, said, size=12.5, bold=True)
        for row in range(8):
            for column in range(16):
                x, y = left + column * cell, 38 + row * cell
                on = bool(kept[row, column])
                made.box(x + 1, y + 1, cell - 2, cell - 2, fill=BLUE if on else FAINT, radius=2)
        for group in range(1, 4):
            x = left + group * 4 * cell
            made.line([(x, 34), (x, 38 + 8 * cell + 4)], dash="3 3")
        if "@" in pattern:
            y = 38 + 4 * cell
            made.line([(left - 5, y), (left + 16 * cell + 5, y)], color=ORANGE, width=2)
        made.text(
            left, 38 + 8 * cell + 22, "inputs →, output rows ↓; dotted: groups of four", size=11
        )
    return made


def idea() -> Drawing:
    """Who owns which weights, and what happens in a step."""
    made = Drawing(760, 300, "The network owns the sparse weights, the optimizer the dense ones")
    for x, color, name, weight, lines in (
        (30, BLUE, "The network", "W̃",
         ("sparse: what every forward pass,", "checkpoint and compiler sees")),
        (490, ORANGE, "The optimizer", "W",
         ("dense: what is learned,", "kept in optimizer.state")),
    ):  # fmt: skip
        made.box(x, 36, 240, 156, fill=color, edge=color, radius=10, opacity=0.10)
        made.text(x + 120, 64, name, size=15, bold=True, anchor="middle", color=color)
        made.text(x + 120, 120, weight, size=36, anchor="middle", color=color)
        for i, said in enumerate(lines):
            made.text(x + 120, 152 + 17 * i, said, size=12, anchor="middle")
    made.arrow(276, 84, 484, 84)
    made.text(380, 66, "1. the gradient ∂L/∂W̃,", size=12, anchor="middle")
    made.text(380, 102, "2. changed by the recipe's rule", size=12, anchor="middle")
    made.arrow(484, 150, 276, 150)
    made.text(380, 141, "4. W̃ = W ⊙ (m + (1 − m)·δ)", size=12, anchor="middle")
    made.text(380, 170, "m and δ by the recipe's schedule", size=12, anchor="middle")
    made.text(610, 216, "3. optimizer.step() steps W, unchanged", size=12, anchor="middle")
    made.text(150, 216, "forward and backward run on W̃", size=12, anchor="middle")
    made.line([(30, 240), (730, 240)], color=FAINT)
    made.text(
        380, 264, "Nothing is wrapped: the same modules, the same parameter names, the same "
        "optimizer.", size=12.5, anchor="middle",
    )  # fmt: skip
    made.text(
        380, 284, "After the last step, finalize() leaves exact N:M weights and a clean optimizer.",
        size=12.5, anchor="middle",
    )  # fmt: skip
    return made


DRAWN: dict[str, Callable[[], Drawing]] = {
    "gain": gain,
    "idea": idea,
    "panels": panels,
    "recipes": recipes,
}


def main() -> None:
    """Write every drawing."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        (FIGURES / f"{name}.svg").write_text(str(draw()), encoding="utf-8")
        sys.stdout.write(f"{name}.svg: written\n")


if __name__ == "__main__":
    main()
