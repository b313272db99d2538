"""The tuning of the study: what won on the tuning seeds, and the sweeps that follow from it.

    python study/choose.py rates TASK     # whose best rate is at an edge; of lm, its -options
    python study/choose.py options TASK   # writes TASK-main-N-M.yaml, a file a pattern
    python study/choose.py dense TASK     # writes TASK-dense.yaml, the rivals that are not sparse

A choice is the least validation loss on the tuning seed, as the protocol says; the test figures
are never looked at. A task without a search of options of its own takes those of `lm`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tasks import BY_NAME

ROOT = Path(__file__).parents[1]
SWEEPS, RESULTS = ROOT / "configs" / "study", ROOT / "docs" / "study" / "results"
SEARCHED = "lm"
"""The task whose options are searched; the others take them."""
PATTERNS = ["2:4", "1:4", "1:8", "1:16", "1:32", "1:64"]
SEEDS = [0, 1, 2, 3, 4]

TITLES = {
    "dense": "Dense",
    "one-shot": "One-shot",
    "gradual": "Gradual",
    "sr-ste": "SR-STE",
    "step": "STEP",
    "mdgf-linear": "MDGF-Linear",
    "mdgf-exponential": "MDGF-Exponential",
    "sdgf-stepwise": "SDGF-Stepwise",
    "sdgf-geometric": "SDGF-Geometric",
    "hybrid": "Hybrid",
    "settling": "Settling",
}
_MDGF = [{"dense": 0.05, "gradient": g, "finetune": f}
         for g in ("straight-through", "masked") for f in (0.2, 0.4, 0.6)]  # fmt: skip
_SDGF = [{"gradient": g, "dense": d, "finetune": f}
         for g in ("straight-through", "masked")
         for d, f in ((0.05, 0.2), (0.05, 0.6), (0.25, 0.4))]  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "one-shot": [{"dense": d} for d in (0.15, 0.3, 0.5, 0.65, 0.8, 0.9)],
    "gradual": [
        {"gradient": g, "dense": d, "finetune": f}
        for g in ("masked", "straight-through")
        for d, f in ((0.05, 0.2), (0.05, 0.5), (0.25, 0.2))
    ],
    "sr-ste": [
        *({"dense": 0.05, "lam": lam} for lam in (0.0, 2e-4, 2e-3, 2e-2)),
        *({"dense": d, "lam": 2e-4} for d in (0.0, 0.25)),
    ],
    "step": [
        *({"dense": d, "lam": 2e-4} for d in (0.1, 0.25, 0.5, 0.75)),
        *({"dense": 0.25, "lam": lam} for lam in (0.0, 2e-3)),
    ],
    "mdgf-linear": _MDGF,
    "mdgf-exponential": _MDGF,
    "sdgf-stepwise": _SDGF,
    "sdgf-geometric": _SDGF,
    "hybrid": [
        {"dense": 0.05, "gradient": g, "finetune": f}
        for g in ("straight-through", "masked")
        for f in (0.2, 0.4, 0.6)
    ],
    "settling": [{"pull": p, "finetune": f} for p in (0.3, 1.0, 3.0) for f in (0.2, 0.4)],
}
"""Six settings for every recipe: the protocol's list."""


def results(name: str) -> pd.DataFrame:
    """The table of a finished sweep."""
    return pd.read_parquet(RESULTS / name / "results.parquet")


def means(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean validation loss over seeds, best first."""
    grouped = frame.groupby(by, sort=False)["validation_loss"].agg(["mean", "count"])
    return grouped.sort_values("mean").reset_index()


def best_rates(frame: pd.DataFrame) -> dict[str, float]:
    """The best learning rate of each recipe, by its title."""
    found = means(frame, ["recipe", "training.learning_rate"]).drop_duplicates("recipe")
    return dict(zip(found["recipe"], found["training.learning_rate"], strict=True))


def at_an_edge(frame: pd.DataFrame) -> dict[str, float]:
    """Recipes whose best rate is the least or greatest that they were tried at, and the next."""
    tried = frame.groupby("recipe")["training.learning_rate"]
    ends = {title: (rates.min(), rates.max()) for title, rates in tried}
    return {
        title: rate * 2 if rate == ends[title][1] else rate / 2
        for title, rate in best_rates(frame).items()
        if rate in ends[title]
    }


def options_sweep(task: str) -> dict[str, Any]:
    """The second half of the tuning, each recipe at its best rate."""
    rates = best_rates(results(f"{task}-rates"))
    setups = [
        {
            "label": f"{TITLES[name]}: " + ", ".join(f"{k} {v}" for k, v in options.items()),
            "recipe": {"name": name, **options},
            "training.learning_rate": rates[TITLES[name]],
        }
        for name, every in OPTIONS.items()
        for options in every
    ]
    return {"axes": {"setup": setups, "seed": [100]}}


def chosen(task: str) -> dict[str, dict[str, Any]]:
    """What each recipe runs with, by its title: the keys of the best of its settings."""
    rates = best_rates(results(f"{task}-rates"))
    found = means(results(f"{SEARCHED}-options"), ["setup"])
    found["title"] = found["setup"].str.partition(":")[0]
    best = dict(zip(*(found.drop_duplicates("title")[c] for c in ("title", "setup")), strict=True))
    sweep = yaml.safe_load((SWEEPS / f"{SEARCHED}-options.yaml").read_text())
    by_label = {setup["label"]: setup for setup in sweep["axes"]["setup"]}
    return {
        title: {"recipe": by_label[best[title]]["recipe"], "training.learning_rate": rates[title]}
        for title in TITLES.values()
        if title in rates and title != "Dense"
    }


def main_sweep(task: str, pattern: str, titles: Collection[str]) -> dict[str, Any]:
    """The main runs at one pattern: recipes as they were tuned, at every seed."""
    setups = [
        {"label": title, **keys, "recipe": {**keys["recipe"], "label": title}}
        for title, keys in chosen(task).items()
        if title in titles
    ]
    return {"axes": {"setup": setups, "pattern": [pattern], "seed": SEEDS}}


def dense_sweep(task: str, patterns: list[str]) -> dict[str, Any]:
    """The dense network, and narrower ones whose FLOPs are those of each pattern."""
    one = BY_NAME[task]
    found = means(results(f"{task}-dense-rates"), ["setup", "training.learning_rate"])
    own = found.drop_duplicates("setup").set_index("setup")["training.learning_rate"]
    setups: list[dict[str, Any]] = [
        {
            "label": "Dense",
            "recipe": "dense",
            "training.learning_rate": best_rates(results(f"{task}-rates"))["Dense"],
        }
    ]
    for pattern in patterns:
        width = one.narrower(pattern)
        setups.append(
            {
                "label": one.rival(pattern),
                "recipe": "dense",
                "training.learning_rate": float(own[one.rival(pattern)]),
                **one.narrow(pattern),
                # Nothing is pruned, but a pattern has to fit the weights.
                "pattern": f"1:{min(16, width & -width)}",
            }
        )
    return {"axes": {"setup": setups, "seed": SEEDS}}


def write(
    name: str, about: str, task: str, body: dict[str, Any], script: str = "study/choose.py"
) -> Path:
    """Write a sweep's file."""
    head = {"name": name, "base": f"{task}.yaml"}
    tail = {
        "output": "docs/study/results/" + name,
        "cells": f"runs/study-{task}/cells",
        "threads": 1,
    }
    text = yaml.safe_dump({**head, **body, **tail}, sort_keys=False, width=200, allow_unicode=True)
    path = SWEEPS / f"{name}.yaml"
    path.write_text(f"# {about}\n# Written by {script}.\n{text}", encoding="utf-8")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("rates", "options", "dense"))
    parser.add_argument("task")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="of the main runs")
    parser.add_argument(
        "--recipes", nargs="+", default=list(TITLES), choices=list(TITLES), help="of the main runs"
    )
    given = parser.parse_args()
    task = given.task
    if given.stage == "rates":
        frame = results(f"{task}-rates")
        for title, rate in at_an_edge(frame).items():
            sys.stdout.write(f"{title}: the best rate is at an edge; the protocol adds {rate:g}\n")
        about = "Tuning, second half: six settings of every recipe at its best learning rate."
        made = []
        if task == SEARCHED:
            made = [write(f"{task}-options", about, task, options_sweep(task))]
    elif given.stage == "dense":
        about = "The dense network, and narrower ones whose FLOPs are those of each pattern."
        made = [write(f"{task}-dense", about, task, dense_sweep(task, given.patterns))]
    else:
        about = "The main runs at one pattern: recipes as they were tuned, at every seed."
        titles = [TITLES[name] for name in given.recipes]
        made = [
            write(f"{task}-main-{p.replace(':', '-')}", about, task, main_sweep(task, p, titles))
            for p in given.patterns
        ]
    sys.stdout.writelines(f"{path}\n" for path in made)


if __name__ == "__main__":
    main()
