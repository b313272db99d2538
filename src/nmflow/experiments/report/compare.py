"""Group runs by setting and recipe, summarize over seeds, and pair by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmflow.experiments.config import digest
from nmflow.experiments.report.statistics import Paired, Summary, holm, paired, summary
from nmflow.recipes import RECIPES

# Figures for which less is better; for all others, more is.
LESS_IS_BETTER = ("loss", "perplexity")
# Keys of sparsity, on which a dense run's outcome does not depend.
PLACEMENT = (
    "pattern",
    "include",
    "exclude",
    "remainder",
    "mask_interval",
    "freeze_mask",
    "permute",
    "sparse_steps",
)


@dataclass
class Recipe:
    """One recipe of a setting: its `runs` by seed, and its `place` among the page's recipes."""

    title: str
    name: str
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    place: int = 0

    def values(self, metric: str, split: str = "test") -> dict[int, float]:
        """The figure of each seed."""
        return {seed: run[split][metric] for seed, run in sorted(self.runs.items())}

    def summary(self, metric: str, split: str = "test") -> Summary:
        """Mean and deviation over seeds."""
        return summary(list(self.values(metric, split).values()))


@dataclass
class Comparison:
    """A recipe against the baseline in one figure.

    `adjusted` is p adjusted for all comparisons of the setting, `overall` for all headline
    comparisons of the page.
    """

    recipe: Recipe
    metric: str
    difference: Paired
    adjusted: float | None = None
    overall: float | None = None

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
    """All recipes whose runs differ only in recipe and seed.

    Dense runs may be `lent` by a setting of the same `family`, which differs only in the placement
    of sparsity.
    """

    hash: str
    recipes: list[Recipe]
    headline: str
    baseline: Recipe | None
    comparisons: list[Comparison]
    family: str = ""

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Every run, recipe by recipe."""
        return [run for recipe in self.recipes for run in recipe.runs.values()]

    @property
    def own(self) -> list[dict[str, Any]]:
        """The runs that were made in this setting, sparse ones first."""
        own = [run for run in self.runs if run["setting_hash"] == self.hash]
        return sorted(own, key=lambda run: run["run"]["recipe"]["name"] == "dense")

    @property
    def lent(self) -> list[dict[str, Any]]:
        """The dense runs that other settings lend to this one."""
        return [run for run in self.runs if run["setting_hash"] != self.hash]

    @property
    def sample(self) -> dict[str, Any]:
        """Any of its own runs, for the keys that all share."""
        return self.own[0]

    @property
    def sparse(self) -> list[Recipe]:
        """The recipes except dense."""
        return [r for r in self.recipes if r.name != "dense"]

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
    """The figures that all runs have: loss first, then the headline."""
    runs = [run["test"] for recipe in recipes for run in recipe.runs.values()]
    shared = set(runs[0]).intersection(*runs[1:])
    first = [name for name in ("loss", headline) if name in shared]
    return list(dict.fromkeys([*first, *sorted(shared)]))


def settings(results: Sequence[Mapping[str, Any]], baseline: str) -> list[Setting]:
    """Group results by setting; the recipes in the order of the registry.

    Settings that differ only in `PLACEMENT` are a family and share their dense runs. A setting with
    dense runs only is dropped if its family has others.
    """
    groups: dict[str, dict[str, Recipe]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for run in results:
        key, title = run["setting_hash"], run["recipe"]
        group = groups.setdefault(key, {})
        recipe = group.setdefault(title, Recipe(title, run["run"]["recipe"]["name"]))
        recipe.runs[run["seed"]] = dict(run)
        first.setdefault(key, run)
    families = {key: family_hash(run) for key, run in first.items()}
    groups = _lend(groups, families)
    order = {name: place for place, name in enumerate(RECIPES)}

    def rank(recipe: Recipe) -> tuple[int, str]:
        return order.get(recipe.name, len(order)), recipe.title

    ranks = {r.title: rank(r) for group in groups.values() for r in group.values()}
    places = {title: place for place, title in enumerate(sorted(ranks, key=lambda t: ranks[t]))}
    out = []
    for key, group in groups.items():
        recipes = sorted(group.values(), key=rank)
        for recipe in recipes:
            recipe.place = places[recipe.title]
        titled = [r for r in recipes if r.title == baseline]
        against = next((r for r in [*titled, *recipes] if baseline in (r.name, r.title)), None)
        headline = first[key]["headline"]
        compared = _compare(recipes, against, headline)
        out.append(Setting(key, recipes, headline, against, compared, families[key]))
    return out


def family_hash(result: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides a dense run's outcome, except its seed."""
    left_out = ("name", "recipe", "seed", *PLACEMENT)
    run = {key: value for key, value in result["run"].items() if key not in left_out}
    training = dict(run["training"])
    if training.get("budget") is not None:
        training.pop("steps", None)  # solved from the budget
    # The data's own hash tells a file that changed between two settings.
    return digest({**run, "training": training, "sha256": result["data"]["sha256"]})


def _lend(
    groups: dict[str, dict[str, Recipe]], families: Mapping[str, str]
) -> dict[str, dict[str, Recipe]]:
    """Give each setting its family's dense runs, and drop settings with nothing else."""
    dense: dict[str, dict[int, dict[str, Any]]] = {}
    titles: dict[str, str] = {}
    for key, group in groups.items():
        for recipe in group.values():
            if recipe.name == "dense":
                titles.setdefault(families[key], recipe.title)
                for seed, run in recipe.runs.items():
                    dense.setdefault(families[key], {}).setdefault(seed, run)
    sparse = {key for key, g in groups.items() if any(r.name != "dense" for r in g.values())}
    served = {families[key] for key in sparse}
    out: dict[str, dict[str, Recipe]] = {}
    for key, group in groups.items():
        family = families[key]
        if key not in sparse:
            if family in served:
                continue
            served.add(family)  # in a family without sparse runs, the first setting stays
        lent = dense.get(family, {})
        own = [recipe for recipe in group.values() if recipe.name == "dense"]
        if not own and lent:
            own = [group.setdefault(titles[family], Recipe(titles[family], "dense"))]
        if len(own) == 1:  # recipes with the same name cannot be lent
            own[0].runs = {**lent, **own[0].runs}
        out[key] = group
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
    # Every sparse recipe in every figure; the dense bound does not compete.
    family = [c for c in out if c.recipe.name != "dense" and c.difference.p is not None]
    for one, p in zip(family, holm([c.difference.p or 0.0 for c in family]), strict=True):
        one.adjusted = p
    return out
