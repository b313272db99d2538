"""A run that is resumed with another number of steps: which schedule it follows."""

from __future__ import annotations

from nmflow.errors import StateError
from nmflow.recipes import Recipe


def planned(recipe: Recipe, begun: int, total_steps: int, k: int) -> int:
    """The number of steps by which the phases count, if a run of `begun` ends at another step.

    If the run of `total_steps` would have been the same up to step `k`, it is that run. Otherwise
    the phases continue as they began, and the steps added after them, or removed, are fine-tuning
    on the final masks. Either way, the phases so far do not change, δ never rises, and no pattern
    gets denser.

    Args:
        recipe: the recipe.
        begun: the number of steps by which the phases counted so far.
        total_steps: K, the number wanted now.
        k: the optimizer steps done.

    Raises:
        StateError: `total_steps` is before step `k`, or before the end of a phase that was begun.

    Example:
        >>> from nmflow import MDGF
        >>> recipe = MDGF(dense=0.2, finetune=0.2)
        >>> planned(recipe, 100, 200, k=19), planned(recipe, 100, 200, k=50)
        (200, 100)
    """
    if begun == total_steps or same_so_far(recipe, begun, total_steps, k):
        return total_steps
    dense, finetune = recipe.phases(begun)
    end = begun - finetune if recipe.decays else dense
    if total_steps < max(end, k):
        why = f"whose masks are final at step {end}" if end > k else f"that has done {k}"
        raise StateError(
            f"total_steps is {total_steps}, but the state is of step {k} of a run of {begun} "
            f"steps, {why}: give at least {max(end, k)}"
        )
    return begun


def same_so_far(recipe: Recipe, one: int, other: int, k: int) -> bool:
    """Whether runs of `one` and of `other` steps give the same network after 0, 1 … `k` steps."""
    if k > min(one, other):
        return False
    if not recipe.prunes:
        return True
    (d, f), (e, g) = recipe.phases(one), recipe.phases(other)
    if k < min(d, e):
        return True
    if d != e:
        return False
    # In between, a decay depends on how long it is; sparsity is sparsity until masks are held.
    return one - f == other - g or (not recipe.decays and k < min(one - f, other - g))
