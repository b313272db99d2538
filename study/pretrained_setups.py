"""What the study's second part runs: tasks, recipes, settings, rates, as the protocol says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import choose

MAIN = ("sr-ste", "mdgf-exponential", "settling")
OTHERS = ("one-shot", "gradual", "sdgf-stepwise", "maxq")
TITLES = {**choose.TITLES, "maxq": "MaxQ"}


class Task(NamedTuple):
    """A task of this part: its title, the figure that it is judged by, the patterns of its runs.

    `wide`: panels and attention run on it, too. `long`: it runs at four times the steps, too.
    """

    title: str
    metric: str
    groups: Mapping[str, tuple[str, ...]]
    patterns: tuple[str, ...] = ()
    wide: bool = False
    long: bool = True


PATTERNS = ("1:16", "1:4", "2:4", "1:32", "1:128")
SPARSEST = ("1:32", "1:128")
TASKS = {
    "cola": Task(
        "CoLA",
        "matthews",
        {"": MAIN, "-others": OTHERS},
        PATTERNS,
        True,
    ),
    "mrpc": Task("MRPC", "score", {"": MAIN}, long=False),
    "sst2-minilm": Task("SST-2", "accuracy", {"": MAIN}),
}
RATES, DENSE_RATES = [2e-4, 4e-4, 8e-4], [1e-4, 2e-4, 4e-4]
PATTERN = "1:8"
RATE = "training.learning_rate"
PANELS = ("1:8@4", "1:8@16", "1:8@64")
PERMUTED = ", units in order"
LONG = {"training.steps": 3200, "training.eval_every": 3200, "training.save_every": 3200}
MORE = range(5, 10)
NOISY = 2.5
"""Points: a greater paired standard deviation gets the seeds `MORE`."""
CONVENTIONAL, TAUGHT = "SR-STE", ", distilled"
STARTED = ", from the dense network"
LONG_TAUGHT = " by the longer dense one"
GENERAL = {
    "options.tasks": ["sst2"],
    "training.steps": 2400,
    "training.eval_every": 2400,
    "training.save_every": 2400,
    "training.save_model": True,
    "distill": {"teacher": "self", "task": 0.0, "logits": 0.0, "hidden": 1.0},
}
"""The encoder made sparse on other sentences first: it learns its own dense hidden states."""
SPARSE_FIRST = f"Sparse encoder first{TAUGHT}"
NARROWER, SHALLOWER = f"Dense, FF 192{TAUGHT}", f"Dense, 3 layers{TAUGHT}"
CUTS = {NARROWER: {"model.keep_units": 192}, SHALLOWER: {"model.fields.num_hidden_layers": 3}}
"""The rivals of a network at 1:8 in FF: the same FLOPs in FF, and half of the layers."""
_DECAYING = [
    {"gradient": "masked", "finetune": 0.2},
    {"gradient": "masked", "finetune": 0.4},
    {"gradient": "straight-through", "finetune": 0.2},
]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sr-ste": [{"lam": lam} for lam in (2e-3, 2e-4, 2e-2)],
    "mdgf-exponential": _DECAYING,
    "settling": [{"pull": pull, "finetune": 0.2} for pull in (3.0, 0.3, 1.0)],
    "one-shot": [{"dense": dense} for dense in (0.15, 0.0, 0.5)],
    "gradual": [
        {"gradient": "masked", "finetune": 0.2},
        {"gradient": "masked", "finetune": 0.5},
        {"gradient": "straight-through", "finetune": 0.2},
    ],
    "sdgf-stepwise": _DECAYING,
    "maxq": [{"finetune": 0.2}, {"finetune": 0.4}, {"lam": 2e-3, "finetune": 0.2}],
}
"""Three settings for every recipe: the first with three rates, the others at the best of them."""
