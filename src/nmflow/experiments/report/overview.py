"""The part of a page that compares its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nmflow.experiments.report import overview_plots as plots
from nmflow.experiments.report import overview_words as words
from nmflow.experiments.report import tuning
from nmflow.experiments.report.blocks import (
    Block,
    Figure,
    Points,
    Section,
    Table,
    difference,
    mean_sd,
    number,
)
from nmflow.experiments.report.compare import PLACEMENT, Comparison, family_hash
from nmflow.experiments.report.settings import NONE, Cell, Group, survives
from nmflow.experiments.report.statistics import Paired

MOST_LAYERS = 60  # rows of a drawing; the table has all


def overview(
    groups: Sequence[Group],
    contest: Sequence[Comparison],
    results: Sequence[Mapping[str, Any]],
    baseline: str,
) -> list[Section]:
    """All settings of each group: a table, a drawing, and sentences."""
    said = [words.holds(group) for group in groups]
    warning = words.unlike_dense(results, family_hash)
    found = words.shown(groups, contest, baseline) + ([warning] if warning else [])
    out = [Section("What this page holds", [Points(said)])]
    if found:
        out.append(Section("What the settings show together", [Points(found)]))
    for place, group in enumerate(groups):
        more = f": {group.title}" if len(groups) > 1 else ""
        blocks: list[Block] = [_table(group)]
        if len(group.settings) > 1 and any(s.sparse for s in group.settings):
            blocks.insert(0, _drawing(group, place))
        out.append(Section("Recipes and settings" + more, blocks))
        out += tuning.section(group, more)
        if layers := _layers(group, place):
            out.append(Section("Density by layer" + more, layers))
    out.append(Section("What the overview does not show", [Points(words.not_shown(groups))]))
    return out


def _drawing(group: Group, place: int) -> Figure:
    along, _ = plots.panels(group)
    band = ""
    if any(cell.dense for cell in group.cells()):
        band = "The band is the dense network, where one serves all settings of a panel. "
    return Figure(
        f"settings-{place}",
        plots.by_setting(group),
        f"Test {group.headline} over {' and '.join(along)}, a line a recipe with 95 % intervals",
        f"Mean over seeds of test {group.headline} with its 95 % interval (Student's t); "
        f"{words.better(group.headline)}. {band}Intervals are of each mean by itself; the "
        "differences in the table are paired by seed and mostly narrower.",
    )


def _table(group: Group) -> Table:
    cells = list(group.cells())
    compared = [c.comparison for c in cells]
    bases = {c.setting.baseline.title for c in cells if c.setting.baseline and c.comparison}
    base = next(iter(bases)) if len(bases) == 1 else "baseline"
    head = [*group.keys, "recipe", "seeds", f"test {group.headline}, mean ± sd"]
    if any(compared):
        head += [f"difference to {base} [95\u00a0%]", "p (Holm, page)", "shown"]
    rows = []
    for cell, c in zip(cells, compared, strict=True):
        row = [*group.place(cell).values(), cell.recipe.title, str(len(cell.recipe.runs))]
        row.append(mean_sd(cell.recipe.summary(group.headline)))
        if any(compared):
            row += [_against(cell, c.difference if c else None, len(bases) > 1)]
            row += [number(c.overall if c else None, 3), _verdict(c)]
        rows.append(row)
    caption = "Test figures after finalize, sparse ones on the exactly N:M network."
    if any(cell.dense for cell in cells):
        caption += (
            " A dense run does not depend on the placement of sparsity: it stands once for all "
            "settings that differ in that alone."
        )
    if any(compared):
        caption += (
            " Differences are to the baseline recipe of the same setting, paired by seed. p is "
            "adjusted (Holm) over every sparse recipe and setting of this page in its headline "
            "figure, one family; 'better' and 'worse' mark what survives that, '·' what does not: "
            "no difference is shown there."
        )
    return Table(caption, head, rows, left=len(group.keys) + 1)


def _against(cell: Cell, found: Paired | None, named: bool) -> str:
    if found is None:
        return "baseline" if cell.recipe is cell.setting.baseline else NONE
    base = cell.setting.baseline
    return difference(found) + (f" to {base.title}" if named and base else "")


def _verdict(c: Comparison | None) -> str:
    if c is None or c.overall is None:
        return NONE
    if not survives(c):
        return "·"
    return "better" if c.better else "worse"


def _layers(group: Group, place: int) -> list[Block]:
    """Density by layer for every setting with a sparse network, if the settings differ in it."""
    settings = [s for s in group.settings if s.sparse]
    shown: dict[str, dict[str, str]] = {}
    means: dict[str, dict[str, float]] = {}
    for setting in settings:
        label = group.label(setting, short=True, only=PLACEMENT) or setting.sample["pattern"]
        held: dict[str, list[float]] = {}
        for recipe in setting.sparse:
            for run in recipe.runs.values():
                for row in run["audit"]["rows"]:
                    held.setdefault(row["name"], []).append(row["density"])
        column = {n: _range(d) for n, d in held.items()}
        if column not in shown.values():
            if label in shown:  # same placement, another network
                label = group.label(setting, short=True)
            shown[label] = column
            means[label] = {n: sum(d) / len(d) for n, d in held.items()}
    names = list(dict.fromkeys(name for column in shown.values() for name in column))
    if not words.placed(group.keys) or not names:
        return []
    rows = [[name, *(column.get(name, NONE) for column in shown.values())] for name in names]
    table = Table(
        "Share of non-zero weights in each targeted weight after finalize, over all sparse recipes "
        "and seeds of a setting (a range where they differ); – is no target there. Settings with "
        "the same column as one before are left out.",
        ["weight", *shown],
        rows,
    )
    drawing = Figure(
        f"density-{place}",
        plots.densities(names[:MOST_LAYERS], means),
        "Density of every targeted weight in every setting, as shades",
        "The same as shades: dark is sparse, – is no target there"
        + (f"; the first {MOST_LAYERS} weights." if len(names) > MOST_LAYERS else "."),
    )
    return [drawing, table]


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2%}", f"{max(values):.2%}"
    return low if low == high else f"{low} to {high}"
