"""The page of the first look."""

from __future__ import annotations

from choose import results
from compare import by_seed, family
from tables import gain, heading, spread, table, there

from nmflow.experiments.report.statistics import summary

RIVALS = {"1:8": "Dense, FF 32", "1:16": "Dense, FF 16", "1:32": "Dense, FF 8"}
NARROW = "Dense, FF 16"
RECIPES = ("Settling", "SR-STE", "MDGF-Exponential")


def pilot() -> str:
    """A first look at our recipe, on seeds that nothing else uses."""
    return "\n".join(
        [
            *heading("A first look"),
            "This is not a result of the [protocol](protocol.md): it ran before the tuning, on "
            "seeds that nothing else uses. SR-STE and MDGF-Exponential have their best settings "
            "from the [search](search.md) on characters (λ = 0.02; fine-tune 0.4). Settling has "
            "its defaults. All have the same learning rate. The rival is a dense network of equal "
            "inference FLOPs, with an FF as narrow as the kept weights. A difference is settling "
            "minus the other, paired by seed, with its 95 % interval. Bold: Holm's p over the "
            "table is below 0.05.",
            "",
            *_task("lm-pilot", "Characters, GPT-2: accuracy of the next character, points", RIVALS),
            *_task("vit-pilot", "CIFAR-10, ViT, 2,000 steps: accuracy, points", {"1:16": NARROW}),
        ]
    )


def _task(name: str, title: str, rivals: dict[str, str]) -> list[str]:
    if not there(name):
        return []
    frame = results(name)
    frame = frame.assign(points=100 * frame["test_accuracy"], pattern="")

    def figures(setup: str) -> list[float]:
        return list(by_seed(frame, setup, None, "points").values())

    def names(pattern: str) -> list[str]:
        return [*(f"{recipe}, {pattern}" for recipe in RECIPES), rivals[pattern]]

    pairs = [(names(p)[0], "", against, None) for p in rivals for against in names(p)[1:]]
    found = {(c.setup, c.rival): c for c in family(frame, pairs, "points", least=2)}
    rows, differences = [], []
    for pattern in rivals:
        ours, *others = names(pattern)
        rows.append(
            [pattern, *(spread(summary(f)) if (f := figures(n)) else "–" for n in (ours, *others))]
        )
        cells = [found.get((ours, other)) for other in others]
        differences.append([pattern, *(gain(c) if c else "–" for c in cells)])
    dense = f"; dense {spread(summary(figures('Dense')))}" if figures("Dense") else ""
    seeds = ", ".join(str(seed) for seed in sorted(frame["seed"].unique()))
    return [
        f"## {title}",
        "",
        f"Test figures, mean ± standard deviation, seeds {seeds}{dense}:",
        "",
        table(["pattern", *RECIPES, "dense, as narrow"], rows),
        table(["pattern", *(f"− {r}" for r in RECIPES[1:]), "− dense, as narrow"], differences),
    ]
