"""Runs side by side: grouped by setting and recipe, summed up over seeds, paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmflow.experiments.statistics import Paired, Summary, holm, paired, summary
from nmflow.recipes import RECIPES

# Figures of which less is better; of all others more is.
LESS_IS_BETTER = ("loss", "perplexity")


@dataclass
class Recipe:
    """One recipe of a setting over its seeds; `runs` by seed."""

    title: str
    name: str
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def values(self, metric: str, split: str = "test") -> dict[int, float]:
        """The figure of every seed."""
        return {seed: run[split][metric] for seed, run in sorted(self.runs.items())}

    def summary(self, metric: str, split: str = "test") -> Summary:
        """Mean and deviation over seeds."""
        return summary(list(self.values(metric, split).values()))


@dataclass
class Comparison:
    """A recipe against the baseline in one figure, with the p adjusted over all of the setting."""

    recipe: Recipe
    metric: str
    difference: Paired
    adjusted: float | None = None

    @property
    def better(self) -> bool:
        """Whether the mean moves in the good direction."""
        return (self.difference.mean < 0) == (self.metric in LESS_IS_BETTER)

    @property
    def in_favour(self) -> int:
        """Seeds in which the recipe is better."""
        less = self.metric in LESS_IS_BETTER
        return self.difference.below if less else self.difference.above


@dataclass
class Setting:
    """All recipes of runs that differ in nothing else but the seed."""

    hash: str
    recipes: list[Recipe]
    headline: str
    baseline: Recipe | None
    comparisons: list[Comparison]

    @property
    def sample(self) -> dict[str, Any]:
        """Any run: what all share can be read off it."""
        return next(iter(self.recipes[0].runs.values()))

    @property
    def metrics(self) -> list[str]:
        """Loss first, then the headline, then the others."""
        return metrics(self.recipes, self.headline)

    @property
    def dense(self) -> Recipe | None:
        """The dense recipe, if there is one."""
        return next((r for r in self.recipes if r.name == "dense"), None)

    @property
    def seeds(self) -> list[int]:
        """Every seed of any recipe."""
        return sorted({seed for recipe in self.recipes for seed in recipe.runs})

    def comparison(self, recipe: Recipe, metric: str) -> Comparison | None:
        """A recipe's comparison in one figure."""
        found = (c for c in self.comparisons if c.recipe is recipe and c.metric == metric)
        return next(found, None)


def metrics(recipes: Sequence[Recipe], headline: str) -> list[str]:
    """The figures that every run has, loss first, then the headline."""
    runs = [run["test"] for recipe in recipes for run in recipe.runs.values()]
    shared = set(runs[0]).intersection(*runs[1:])
    first = [name for name in ("loss", headline) if name in shared]
    return list(dict.fromkeys([*first, *sorted(shared)]))


def settings(results: Sequence[Mapping[str, Any]], baseline: str) -> list[Setting]:
    """Group results; the recipes in the order of the registry."""
    groups: dict[str, dict[str, Recipe]] = {}
    headlines: dict[str, str] = {}
    for run in results:
        key, title = run["setting_hash"], run["recipe"]
        group = groups.setdefault(key, {})
        recipe = group.setdefault(title, Recipe(title, run["run"]["recipe"]["name"]))
        recipe.runs[run["seed"]] = dict(run)
        headlines[key] = run["headline"]
    order = {name: place for place, name in enumerate(RECIPES)}
    out = []
    for key, group in groups.items():
        recipes = sorted(group.values(), key=lambda r: (order.get(r.name, len(order)), r.title))
        against = next((r for r in recipes if baseline in (r.name, r.title)), None)
        compared = _compare(recipes, against, headlines[key])
        out.append(Setting(key, recipes, headlines[key], against, compared))
    return out


def _compare(recipes: list[Recipe], against: Recipe | None, headline: str) -> list[Comparison]:
    if against is None:
        return []
    out = []
    for metric in metrics(recipes, headline):
        for recipe in recipes:
            difference = paired(recipe.values(metric), against.values(metric))
            if recipe is not against and difference is not None:
                out.append(Comparison(recipe, metric, difference))
    # One family: every sparse recipe in every figure; the dense bound is not a contestant.
    family = [c for c in out if c.recipe.name != "dense" and c.difference.p is not None]
    for one, p in zip(family, holm([c.difference.p or 0.0 for c in family]), strict=True):
        one.adjusted = p
    return out
