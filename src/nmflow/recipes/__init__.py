"""Recipes, a frozen dataclass each; the registry of their names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from nmflow.errors import RecipeError
from nmflow.pattern import Pattern, is_pattern
from nmflow.recipes.base import Recipe
from nmflow.recipes.baselines import SRSTE, SSTE, STE, STEP, Dense, Gradual, OneShot
from nmflow.recipes.decaying import MDGF, SDGF, Hybrid, MaxQ, Settling

__all__ = [
    "DEFAULT",
    "MDGF",
    "RECIPES",
    "SDGF",
    "SRSTE",
    "SSTE",
    "STE",
    "STEP",
    "Dense",
    "Gradual",
    "Hybrid",
    "MaxQ",
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
        SSTE(),
        STEP(),
        Gradual(),
        MDGF("linear"),
        MDGF("exponential"),
        SDGF("stepwise"),
        SDGF("geometric"),
        SDGF("panels"),
        Hybrid(),
        MaxQ(),
        Settling(),
    )
}
"""Every recipe by its name, with its defaults."""

DEFAULT = Settling.name
"""The recipe where none is named."""

_LATER = (("stairs", 0), ("scale", 1.0), ("lr_scale", 1.0))


def resolve(recipe: str | Recipe) -> Recipe:
    """A recipe from its name, or the recipe itself.

    Raises:
        RecipeError: the name is unknown.

    Example:
        >>> resolve("mdgf-linear") == MDGF("linear", gradient="masked")
        True
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str) and recipe in RECIPES:
        return RECIPES[recipe]
    raise RecipeError(f"recipe is {recipe!r}: {_meant(recipe)}choose one of {', '.join(RECIPES)}")


def _meant(given: object) -> str:
    """What was probably meant, as words of a sentence."""
    if isinstance(given, Pattern | Mapping) or (isinstance(given, str) and is_pattern(given)):
        said = f"'{given}'" if isinstance(given, Pattern) else repr(given)
        return f"did you mean pattern={said}? The recipe comes before it; "
    if isinstance(given, type) and issubclass(given, Recipe):
        return f"did you mean {given.__name__}(), with its arguments? Or "
    near = difflib.get_close_matches(given.lower(), RECIPES, 1) if isinstance(given, str) else []
    return f"did you mean {near[0]!r}? Or " if near else ""


def describe(recipe: Recipe) -> dict[str, str | float | None]:
    """The recipe as plain types, for a saved state: its name and every field.

    An option that came later is left out where it is off, so that older states can be resumed.
    """
    fields = dataclasses.asdict(recipe).items()
    return {"name": recipe.name} | {k: v for k, v in fields if (k, v) not in _LATER}
