"""The page of the first look."""

from __future__ import annotations

from choose import results
from compare import by_seed, family
from tables import gain, spread, table

from nmflow.experiments.statistics import summary

RIVALS = {"1:8": "Dense, FF 32", "1:16": "Dense, FF 16", "1:32": "Dense, FF 8"}
RECIPES = ("SR-STE", "MDGF-Exponential", "Settling")


def pilot() -> str:
    """A first look at our recipe, on seeds that nothing else uses."""
    out = ["# A first look", ""]
    frame = results("lm-pilot")
    frame = frame.assign(points=100 * frame["test_accuracy"], pattern="")
    seeds = sorted(int(seed) for seed in frame["seed"].unique())
    dense = summary(list(by_seed(frame, "Dense", None, "points").values()))
    pairs = []
    for pattern, rival in RIVALS.items():
        ours = f"Settling, {pattern}"
        for against in (f"SR-STE, {pattern}", f"MDGF-Exponential, {pattern}", rival):
            pairs.append((ours, "", against, None))
    cells = family(frame, pairs, "points")
    rows, differences = [], []
    for number, (pattern, rival) in enumerate(RIVALS.items()):
        names = [*(f"{recipe}, {pattern}" for recipe in RECIPES), rival]
        figures = [list(by_seed(frame, name, None, "points").values()) for name in names]
        rows.append([pattern, *(spread(summary(f)) if f else "–" for f in figures)])
        differences.append([pattern, *(gain(c) for c in cells[3 * number : 3 * number + 3])])
    return "\n".join(
        [
            *out,
            "Not a result of the [protocol](protocol.md): its tuning is not done. `lm` on the "
            f"seeds {', '.join(map(str, seeds))}, which nothing else uses. SR-STE and "
            "MDGF-Exponential have what was best for them in the [search](search.md) (λ = 0.02; "
            "fine-tune 0.4), settling its defaults, all one learning rate. The rival is a dense "
            "network whose FF is as narrow as the kept weights, of equal inference FLOPs.",
            "",
            "Accuracy of the next character on test text, points, mean ± sd; dense "
            f"{spread(dense)}:",
            "",
            table(["pattern", *RECIPES, "dense, as narrow"], rows),
            f"Settling less each of them, paired by seed, 95 % interval; bold where Holm's p over "
            f"these {len(cells)} comparisons is below 0.05:",
            "",
            table(["pattern", "− SR-STE", "− MDGF-Exponential", "− dense, as narrow"], differences),
        ]
    )
