"""The first screen of a report: the best recipe, by how much, and what is not shown."""

from __future__ import annotations

from collections.abc import Sequence

from nmflow.experiments.report import overview_plots, setting
from nmflow.experiments.report.blocks import Block, Figure, Points, Section, number
from nmflow.experiments.report.compare import LESS_IS_BETTER, Comparison
from nmflow.experiments.report.overview_words import lacking, some
from nmflow.experiments.report.setting_words import PERCENT
from nmflow.experiments.report.settings import Cell, Group, survives
from nmflow.experiments.report.times import Times

MOST_ROWS = 60  # rows of the forest plot; the table has all


def verdict(
    groups: Sequence[Group],
    contest: Sequence[Comparison],
    unfinished: Sequence[str],
    times: Times,
) -> Section:
    """Three lines and a forest plot, from the comparisons in the headline figure.

    Args:
        groups: the settings of the page.
        contest: its comparisons with an interval, adjusted together.
        unfinished: the names of runs without a result.
        times: the inference times.
    """
    cells = [(g, c) for g in groups for c in g.cells() if c.comparison is not None]
    shown = [(g, c) for g, c in cells if survives(c.comparison)]
    won = [(g, c) for g, c in shown if c.comparison and c.comparison.better]
    lines = [_won(cells, shown, won, contest), *_by_how_much(won or shown)]
    lines.append(_not_shown(groups, contest, shown, unfinished, times))
    return Section("Verdict", [Points(lines), *_forests(groups)])


def _won(
    cells: Sequence[tuple[Group, Cell]],
    shown: Sequence[tuple[Group, Cell]],
    won: Sequence[tuple[Group, Cell]],
    contest: Sequence[Comparison],
) -> str:
    if not cells:
        return "Nothing is compared: there is no second sparse recipe beside the baseline."
    if not contest:
        return "Nothing is shown: with one seed a difference has no interval."
    bases = {c.setting.baseline.title for _, c in cells if c.setting.baseline}
    base = next(iter(bases)) if len(bases) == 1 else "the baseline"
    if not shown:
        return f"No recipe is shown to differ from {base}."
    places = {title: [] for title in dict.fromkeys(c.recipe.title for _, c in cells)}
    for g, c in won:
        places[c.recipe.title].append(g.label(c.setting, short=True))
    said = []
    for title, labels in places.items():
        of = sum(c.recipe.title == title for _, c in cells)
        if labels:
            said.append(title if of == 1 else f"{title} in {len(labels)} of {of} settings")
    worse = [c.recipe.title for _, c in shown if c.comparison and not c.comparison.better]
    text = f"Better than {base}: {some(said)}." if said else f"Nothing is better than {base}."
    return text + (f" Worse: {some(list(dict.fromkeys(worse)))}." if worse else "")


def _by_how_much(shown: Sequence[tuple[Group, Cell]]) -> list[str]:
    """The largest significant difference, and the dense network's figure."""
    if not shown:
        return []
    group, cell = max(shown, key=lambda one: abs(_mean(one[1])))
    c, base = cell.comparison, cell.setting.baseline
    assert c is not None
    assert base is not None
    d, name = c.difference, group.headline
    label = group.label(cell.setting, short=True)
    text = (
        f"The largest difference{f', at {label},' if label else ''} is "
        f"{number(d.mean, 4, True)} in test {name} ({PERCENT} interval "
        f"{number(d.low, 4, True)} to {number(d.high, 4, True)}): "
        f"{cell.recipe.title} {number(cell.recipe.summary(name).mean)}, "
        f"{base.title} {number(base.summary(name).mean)}"
    )
    dense = cell.setting.dense
    if dense is None:
        return [text + "."]
    bound = dense.summary(name).mean
    gap = bound - base.summary(name).mean
    gap = -gap if name in LESS_IS_BETTER else gap
    text += f", dense {number(bound)}"
    if gap > 0 and c.better:
        share = f"{abs(d.mean) / gap:.0%}".replace("%", "\u00a0%")
        text += f"; that is {share} of the gap to dense"
    return [text + "."]


def _not_shown(
    groups: Sequence[Group],
    contest: Sequence[Comparison],
    shown: Sequence[tuple[Group, Cell]],
    unfinished: Sequence[str],
    times: Times,
) -> str:
    said = []
    if rest := len(contest) - len(shown):
        many = f"{rest} of {len(contest)} comparisons" if len(contest) > 1 else "the comparison"
        said.append(f"any difference in {many}")
    seeds = {len(s.seeds) for g in groups for s in g.settings}
    if max(seeds) < 5:
        said.append("small differences, from so few seeds")
    if not times.entries:
        said.append("speed, which was not measured")
    said.append("other tasks, sizes and lengths of training")
    text = f"Not shown: {'; '.join(said)}."
    missing = [lacks for g in groups for lacks in lacking(g)]
    if missing:
        text += f" Missing seeds: {some(missing, '; ')}."
    if unfinished:
        many = "1 run is" if len(unfinished) == 1 else f"{len(unfinished)} runs are"
        text += f" {many} not finished and not on this page: {some(unfinished)}."
    return text


def _forests(groups: Sequence[Group]) -> list[Block]:
    if len(groups) == 1 and len(groups[0].settings) == 1:
        figure = setting.forest(groups[0].settings[0])
        return [figure] if figure else []
    out: list[Block] = []
    for place, group in enumerate(groups):
        cells = [c for c in group.cells() if c.comparison is not None]
        if not cells:
            continue
        rows = []
        for c in cells[:MOST_ROWS]:
            label = group.label(c.setting, short=True)
            assert c.comparison is not None
            name = f"{label}: {c.recipe.title}" if label else c.recipe.title
            rows.append((name, c.recipe, c.comparison.difference))
        more = f" The first {MOST_ROWS} of {len(cells)} rows." if len(cells) > MOST_ROWS else ""
        drawn = overview_plots.forest(rows, group.headline)
        alt = f"Differences to the baseline in test {group.headline}, a row a recipe and setting"
        caption = (
            f"{group.title}. Differences to the baseline of the same setting, paired by seed, with "
            f"{PERCENT} intervals. A bar across the line shows no difference.{more}"
        )
        out.append(Figure(f"forest-{place}", drawn, alt, caption))
    return out


def _mean(cell: Cell) -> float:
    return cell.comparison.difference.mean if cell.comparison else 0.0
