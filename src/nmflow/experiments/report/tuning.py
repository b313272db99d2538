"""Each recipe at its best among settings that differ in training, chosen on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmflow.experiments.report.blocks import Section, Table, difference, mean_sd
from nmflow.experiments.report.compare import LESS_IS_BETTER
from nmflow.experiments.report.settings import NONE, WATCHING, Cell, Group
from nmflow.experiments.report.statistics import paired

# Longer training is a cost, not a choice of tuning.
_COSTS = ("training.steps", "training.budget")


@dataclass(frozen=True)
class Best:
    """The best of a recipe's cells that differ only in tuned keys.

    Attributes:
        cell: the chosen one.
        rest: the values of the other keys, which all of them share.
        tried: the number of these cells.
        end: whether the choice is the least or the greatest value tried.
    """

    cell: Cell
    rest: tuple[str, ...]
    tried: int
    end: bool


def tuned(group: Group) -> list[str]:
    """The keys of a group that tuning may choose."""
    return [
        key
        for key in group.keys
        if key.startswith("training.") and key not in _COSTS and key not in WATCHING
    ]


def best(group: Group) -> list[Best]:
    """The best cell of each recipe, by its mean headline figure on validation data.

    Recipes with one cell are left out; the list is empty if nothing was tuned.
    """
    keys, sign = tuned(group), -1.0 if group.headline in LESS_IS_BETTER else 1.0
    tried: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    for cell in group.cells() if keys else ():
        rest = tuple(value for key, value in group.place(cell).items() if key not in keys)
        tried.setdefault((cell.recipe.title, rest), []).append(cell)
    out = []
    for (_, rest), cells in tried.items():
        if len(cells) > 1:
            means = [sign * c.recipe.summary(group.headline, "validation").mean for c in cells]
            chosen = means.index(max(means))
            # A group's settings are in the order of their values.
            end = len(keys) == 1 and chosen in (0, len(cells) - 1)
            out.append(Best(cells[chosen], rest, len(cells), end))
    return out


def section(group: Group, more: str = "") -> list[Section]:
    """The table of the best cells; empty if nothing was tuned."""
    found = best(group)
    if not found:
        return []
    keys = tuned(group)
    others = [key for key in group.keys if key not in keys]
    head = [*others, "recipe", *keys, "tried", f"validation {group.headline}"]
    head += [f"test {group.headline}", "difference to baseline [95\u00a0%]"]
    rows = []
    for one in found:
        recipe, place = one.cell.recipe, group.place(one.cell)
        values = [place[key] + (" (end)" if one.end else "") for key in keys]
        rows.append(
            [
                *one.rest,
                recipe.title,
                *values,
                str(one.tried),
                mean_sd(recipe.summary(group.headline, "validation")),
                mean_sd(recipe.summary(group.headline)),
                _against(one, found, group.headline),
            ]
        )
    caption = (
        f"Of the settings that differ in {' and '.join(keys)} alone, the one of each recipe whose "
        f"mean {group.headline} on validation data is best, with its test figure (mean ± sd). The "
        "difference is to the baseline at its own best, paired by seed; its interval is by itself, "
        "not adjusted, and knows nothing of the choice."
    )
    if any(one.end for one in found):
        caption += " (end): the last value tried on one side; a better one may lie beyond."
    table = Table(caption, head, rows, left=len(others) + 1)
    return [Section(f"Best settings by validation{more}", [table])]


def _against(one: Best, found: Sequence[Best], metric: str) -> str:
    base = one.cell.setting.baseline
    if base is None or one.cell.dense:
        return NONE
    if one.cell.recipe is base:
        return "baseline"
    rival = next(
        (b for b in found if b.cell.recipe.title == base.title and b.rest == one.rest), None
    )
    if rival is None:
        return NONE
    between = paired(one.cell.recipe.values(metric), rival.cell.recipe.values(metric))
    return difference(between) if between else NONE
