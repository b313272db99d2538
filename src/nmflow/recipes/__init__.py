"""Recipes, a frozen dataclass each; the registry of their names."""

from __future__ import annotations

import dataclasses

from nmflow.errors import RecipeError
from nmflow.recipes.base import Recipe
from nmflow.recipes.baselines import SRSTE, STE, STEP, Dense, Gradual, OneShot
from nmflow.recipes.decaying import MDGF, SDGF, Hybrid, Settling

__all__ = [
    "DEFAULT",
    "MDGF",
    "RECIPES",
    "SDGF",
    "SRSTE",
    "STE",
    "STEP",
    "Dense",
    "Gradual",
    "Hybrid",
    "OneShot",
    "Recipe",
    "Settling",
    "describe",
    "resolve",
]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Dense(),
        OneShot(),
        STE(),
        SRSTE(),
        STEP(),
        Gradual(),
        MDGF("linear"),
        MDGF("exponential"),
        SDGF("stepwise"),
        SDGF("geometric"),
        Hybrid(),
        Settling(),
    )
}
"""Every recipe by its name, with its defaults."""

DEFAULT = Settling.name
"""The recipe where none is named."""


def resolve(recipe: str | Recipe) -> Recipe:
    """A recipe from its name, or the recipe itself.

    Raises:
        RecipeError: the name is unknown.

    Example:
        >>> resolve("mdgf-linear")
        MDGF(decay='linear', beta=None, gradient='masked', dense=0.0, finetune=0.2)
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise RecipeError(f"recipe is {recipe!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[recipe]


def describe(recipe: Recipe) -> dict[str, str | float | None]:
    """The recipe as plain types, for a saved state: its name and every field."""
    return {"name": recipe.name, **dataclasses.asdict(recipe)}
