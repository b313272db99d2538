"""Sentences about what several settings show and do not show, made from their figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nmflow.experiments.report.blocks import number
from nmflow.experiments.report.compare import LESS_IS_BETTER, PLACEMENT, Comparison, Setting
from nmflow.experiments.report.setting_words import PERCENT
from nmflow.experiments.report.settings import NONE, Cell, Group, survives
from nmflow.experiments.report.statistics import LEVEL

MOST = 12  # names in one sentence; the table has all


def holds(group: Group) -> str:
    """The axes of the page, and how they were crossed."""
    parts = []
    for key in group.keys:
        values = [group.values[s.hash][key] for s in group.settings]
        values = [v for v in dict.fromkeys(values) if v != NONE]
        parts.append(f"{key}: {some(values, '; ')}")
    seeds = sorted({seed for s in group.settings for seed in s.seeds})
    recipes = some([recipe.title for recipe in group.recipes])
    return (
        f"{group.title}: {len(group.settings)} settings, which differ in "
        f"{' / '.join(parts) or 'nothing that a run records'}. Recipes: {recipes}. "
        f"Seeds: {some(list(map(str, seeds)))}."
    )


def shown(groups: Sequence[Group], contest: Sequence[Comparison], baseline: str) -> list[str]:
    """What the comparisons of all settings show together."""
    out = []
    settings = [s for g in groups for s in g.settings if s.sparse]
    without = [s for s in settings if s.baseline is None]
    if without and len(without) == len(settings):
        out.append(
            f"No setting has a run of the baseline {baseline}, so no difference is computed "
            "(--baseline names another)."
        )
    elif without:
        out.append(
            f"{_settings(len(without))} without a run of the baseline {baseline}, so nothing is "
            f"compared there: {some(_names(groups, without))}."
        )
    if contest:
        out += _contest(groups, contest)
    elif any(c.comparison for g in groups for c in g.cells()):
        out.append(
            "No cell shares more than one seed with its baseline, so there is no interval and no "
            "test: the differences are single figures."
        )
    return out


def not_shown(groups: Sequence[Group]) -> list[str]:
    """What the overview's figures cannot show."""
    out = [
        "Differences between settings: they are not tested. Only the recipes of one setting are "
        "paired by seed.",
    ]
    for group in groups:
        steps = sorted({run["run"]["training"]["steps"] for s in group.settings for run in s.own})
        if len(steps) > 1:
            out.append(
                f"Quality at equal steps: runs on {group.settings[0].sample['data']['name']} took "
                f"from {steps[0]:,} to {steps[-1]:,} steps."
            )
        options = [key for key in group.keys if key.startswith("options.")]
        if options:
            out.append(
                f"Cost at equal examples: the settings differ in {' and '.join(options)}, so one "
                "example may be more work in one than in another."
            )
    return out


def unlike_dense(results: Iterable[Mapping[str, Any]], family: Any) -> str:
    """A warning if dense runs of one family and seed have different figures; otherwise empty."""
    seen: dict[tuple[str, int], set[float]] = {}
    for run in results:
        if run["run"]["recipe"]["name"] == "dense":
            key = (family(run), run["seed"])
            seen.setdefault(key, set()).add(run["test"][run["headline"]])
    seeds = sorted({seed for (_, seed), figures in seen.items() if len(figures) > 1})
    if not seeds:
        return ""
    return (
        "Dense runs of the same network and seed, which should have one outcome whatever the "
        f"pattern, differ for seed {some(list(map(str, seeds)))} (other machines or threads?); "
        "where a setting has its own it is shown, else the first."
    )


def some(names: Sequence[str], between: str = ", ") -> str:
    """A list of names; if there are many, the first ones and the number of the others."""
    said = between.join(names[:MOST])
    return f"{said} and {len(names) - MOST} more" if len(names) > MOST else said


def lent(setting: Setting) -> str:
    """The setting that a setting's dense runs come from, if it is another; otherwise empty."""
    sources = sorted({run["pattern"] for run in setting.lent})
    if not setting.lent:
        return ""
    seeds = some([str(seed) for seed in sorted({run["seed"] for run in setting.lent})])
    return (
        f"The dense runs of seed {seeds} were made beside another placement "
        f"({some(sources, '; ')}), on which a dense run does not depend."
    )


def _contest(groups: Sequence[Group], contest: Sequence[Comparison]) -> list[str]:
    cells = [(g, c) for g in groups for c in g.cells() if c.comparison and survives(c.comparison)]
    alone = [c for c in contest if c.difference.differs]
    many = len(contest)
    say = "comparison is" if many == 1 else "comparisons are"
    out = [
        f"{many} {say} made in the headline figures of this page, one for each sparse recipe and "
        f"setting with an interval, and all count as one family: {len(alone)} of the {PERCENT} "
        f"intervals leave{'s' if len(alone) == 1 else ''} zero out, where about "
        f"{many * (1 - LEVEL):.1f} would by chance if nothing differed; after Holm's adjustment "
        f"over all {many}, {len(cells) or 'none'} remain{'s' if len(cells) < 2 else ''}."
    ]
    for better in (True, False):
        said = [_cell(g, c) for g, c in cells if c.comparison and c.comparison.better == better]
        if said:
            word = "Better" if better else "Worse"
            out.append(f"{word} than the baseline of the same setting: {some(said, '; ')}.")
    if len(cells) < many:
        out.append(
            f"{_rest(many - len(cells), many)} no difference is shown after the adjustment, which "
            "does not show equality."
        )
    return out


def _rest(left: int, many: int) -> str:
    if left == many:
        return {1: "For it", 2: "For both"}.get(many, f"For all {many}")
    return f"For the other {left}" if left > 1 else "For the other one"


def _cell(group: Group, cell: Cell) -> str:
    c = cell.comparison
    label = group.label(cell.setting, short=True)
    amount = number(c.difference.mean if c else None, 3, True)
    return f"{cell.recipe.title}{f' at {label}' if label else ''} ({amount} in {group.headline})"


def lacking(group: Group) -> list[str]:
    """The cells without a seed that others have."""
    seeds = {seed for s in group.settings for r in s.sparse for seed in r.runs}
    said = []
    for cell in group.cells():
        lacks = sorted(seeds - set(cell.recipe.runs))
        if lacks:
            label = group.label(cell.setting, cell.dense, short=True)
            at = f" at {label}" if label else ""
            said.append(f"{cell.recipe.title}{at} (seed {some(list(map(str, lacks)))})")
    return said


def _names(groups: Sequence[Group], settings: Sequence[Setting]) -> list[str]:
    at = {s.hash: g for g in groups for s in g.settings}
    return [at[s.hash].label(s, short=True) or at[s.hash].title for s in settings]


def _settings(count: int) -> str:
    return "1 setting is" if count == 1 else f"{count} settings are"


def better(metric: str) -> str:
    """A phrase: whether more or less of a figure is better."""
    return "less is better" if metric in LESS_IS_BETTER else "more is better"


def placed(keys: Sequence[str]) -> bool:
    """Whether the settings differ in the placement of sparsity."""
    return any(key in PLACEMENT for key in keys)
