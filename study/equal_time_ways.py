"""Page b's second part: the ways that are compared at equal time, and the phases of their runs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
from choose import RESULTS

from nmflow.experiments.specs import RecipeSpec
from nmflow.flow.sparse_steps import DENSEST
from nmflow.pattern import Pattern
from nmflow.recipes.base import Recipe

NAME, MORE_NAME, TASK = "sst2-minilm-time", "sst2-minilm-time-more", "sst2-minilm"
DENSE_STEPS = 240
RATE = 2e-4
PHASES = {"dense": 0.05, "finetune": 0.7}
PATTERN, PANELS = "1:8", "1:8@16"
COSTS, SPENT, ORDERS = (
    {name: RESULTS / name / f"{file}.csv" for name in (NAME, MORE_NAME)}
    for file in ("step_seconds", "cpu_seconds", "order_seconds")
)
"""By sweep: CPU seconds of a step of each way and phase, of each run, and of ordering the units."""


class Way(NamedTuple):
    """A recipe and how it runs.

    Attributes:
        recipe: its entry in a configuration.
        sparse: whether it steps on kept places where it can.
        pattern: its pattern.
        permute: whether the hidden units are put in order before.
        like: the way whose steps it has; itself where it is empty.
    """

    recipe: dict[str, Any]
    sparse: bool = True
    pattern: str = PATTERN
    permute: bool = False
    like: str = ""


DENSE, HELD = "Dense", "Settling, dense products"
_DENSE = Way({"name": "dense"}, sparse=False)
_MDGF = {"name": "mdgf-exponential", "gradient": "masked", **PHASES}
_SETTLING = {"name": "settling", "pull": 1.0, **PHASES}
WAYS = {
    DENSE: _DENSE,
    "SR-STE": Way({"name": "sr-ste", "lam": 2e-3}, sparse=False),
    "MDGF-Exponential": Way(_MDGF),
    "Settling": Way(_SETTLING),
    "One-shot": Way({"name": "one-shot", "dense": 0.15}),
    HELD: Way(_SETTLING, sparse=False, like="Settling"),
}
"""What is compared at equal time; the last has as many steps as settling, and more time."""
WHOLE, ORDERED, GROWING = "Panels", "Panels, units in order", "Panels that grow"
AS_LONG = "MDGF-Exponential, the steps of SR-STE"
MORE = {
    DENSE: _DENSE,
    "SDGF-Stepwise": Way({"name": "sdgf-stepwise", "gradient": "masked", **PHASES}),
    "Gradual": Way({"name": "gradual", **PHASES}),
    WHOLE: Way(_MDGF, pattern=PANELS),
    ORDERED: Way(_MDGF, pattern=PANELS, permute=True, like=WHOLE),
    GROWING: Way(
        {"name": "sdgf-panels", "gradient": "masked", "dense": 0.15, "finetune": 0.5},
        pattern=PANELS,
    ),
    AS_LONG: Way(_MDGF, like="SR-STE"),
}
"""What was added; the dense way is timed again, and not run again."""
SHARED = {
    "include": ["ff", "attn"],
    "freeze_mask": True,
    "training.precision": "fp32",
    "training.device": "cpu",
    "training.log_every": 1000,
    "training.trainer": {
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
    },
}
WIDTH = 384
"""The network's width: groups lie along it, or along four times it."""


def setups(ways: Mapping[str, Way], steps: Mapping[str, int]) -> list[dict[str, Any]]:
    """A sweep's setups."""
    return [_setup(title, way, steps[way.like or title]) for title, way in ways.items()]


def _setup(title: str, way: Way, steps: int) -> dict[str, Any]:
    found = {
        "label": title,
        "recipe": {**way.recipe, "label": title},
        "sparse_steps": "on" if way.sparse else "off",
        "training.learning_rate": RATE,
        "training.steps": steps,
        **SHARED,
    }
    if way.pattern != PATTERN:
        found["pattern"] = way.pattern
    return {**found, "permute": True} if way.permute else found


def solved(costs: pd.DataFrame) -> dict[str, int]:
    """The steps of every way that was timed, in the time of the dense one's."""
    weighed = (costs["share"] * costs["cpu_seconds"]).groupby(costs["way"], sort=False)
    whole = dict(weighed.sum())
    return {way: round(DENSE_STEPS * whole[DENSE] / seconds) for way, seconds in whole.items()}


def phases(way: Way, recipe: Recipe, steps: int) -> list[str]:
    """What each step of a run is, as far as its time goes.

    A mask that is held is "frozen". A binary one that is taken at every step is "kept N:M" where
    the layer steps on kept places, and "masked" where its products are dense.
    """
    final, found = Pattern(way.pattern), []
    for k in range(steps):
        stage = recipe.stage(k, steps, final, WIDTH)
        if stage.pattern is None:
            found.append("dense")
        elif way.sparse and stage.phase != "decay":
            found.append("frozen")
        elif way.sparse and stage.delta == 0 and stage.pattern.density <= DENSEST:
            found.append(f"kept {stage.pattern}")
        else:
            found.append("masked")
    return found


def shares(way: Way) -> dict[str, float]:
    """The share of a run that each phase takes."""
    steps = 1000
    counted = Counter(phases(way, _recipe(way), steps))
    return {phase: count / steps for phase, count in counted.items()}


def _recipe(way: Way, **fields: int) -> Recipe:
    given = RecipeSpec.model_validate(way.recipe)
    lengths = {key: steps for key, steps in fields.items() if key in given.options}
    return dataclasses.replace(given.build(), **lengths)


def shortest(way: Way, least: int) -> tuple[Recipe, list[str]]:
    """The recipe of the shortest run with `least` steps of each phase, and its steps' phases."""
    wanted = shares(way)
    recipe = _recipe(way, dense=least, finetune=least)
    order: list[str] = []
    steps = least * len(wanted)
    while min(Counter(order)[phase] for phase in wanted) < least:
        order = phases(way, recipe, steps)
        steps += 1
    return recipe, order
