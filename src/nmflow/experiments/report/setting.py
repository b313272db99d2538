"""The sections of one setting: tables, drawings, and sentences made from their figures."""

from __future__ import annotations

from collections.abc import Sequence

from nmflow.experiments.report import setting_details as details
from nmflow.experiments.report import setting_plots as plots
from nmflow.experiments.report import setting_words as words
from nmflow.experiments.report.blocks import (
    Block,
    Figure,
    Points,
    Section,
    Table,
    Text,
    difference,
    mean_sd,
    number,
)
from nmflow.experiments.report.compare import Recipe, Setting
from nmflow.experiments.report.setting_words import Page
from nmflow.experiments.report.statistics import summary


def sections(setting: Setting, page: Page, costs: Sequence[Section] = ()) -> list[Section]:
    """All sections about a setting, in reading order.

    Args:
        setting: the setting.
        page: the rest of the page.
        costs: the section on costs, if the page has this setting only.
    """
    made = [
        Section("What the figures show", _results(setting)),
        Section("What they do not show", [Points(words.not_shown(setting, page))]),
        *costs,
        Section("Curves", _curves(setting)),
        Section("Gradient noise", _noise(setting)),
        Section("Audit of every final network", details.audited(setting, layers=page.alone)),
        Section("Parameters, bytes and FLOPs", details.cost(setting)),
        Section("Every seed's raw figure", details.raw(setting)),
        Section("How it was made", details.made(setting)),
    ]
    return [section for section in made if section.blocks]


def title(setting: Setting) -> str:
    """A line that identifies the setting."""
    run = setting.sample["run"]
    network = run["model"]["kind"] or run["model"]["load"]
    on = f"{run['task']} on {setting.sample['data']['name']}, {network}"
    if not setting.sparse:
        return f"{on}, dense"
    include = run["include"] if isinstance(run["include"], str) else ", ".join(run["include"])
    return f"{on}, {setting.sample['pattern']} in {include}"


def _results(setting: Setting) -> list[Block]:
    shown = [m for m in setting.metrics if m in ("loss", setting.headline)]
    base = setting.baseline if setting.comparisons else None
    head = ["recipe"] + [f"test {m}, mean ± sd" for m in shown]
    if base is not None:
        for m in shown:
            head += [f"{m} − {base.title} [95\u00a0%]", "p (Holm)"]
    head.append("seeds")
    rows = []
    for recipe in setting.recipes:
        row = [recipe.title] + [mean_sd(recipe.summary(m)) for m in shown]
        if base is not None:
            for m in shown:
                found = setting.comparison(recipe, m)
                row += [difference(found.difference) if found else "–"]
                row += [number(found.adjusted if found else None, 3)]
        rows.append([*row, str(len(recipe.runs))])
    caption = "Test figures after finalize"
    if setting.sparse:
        caption += ", on the exactly N:M network"
    if base is not None:
        caption += (
            ". Differences are paired: same seed, same initial weights, same batches as "
            f"{base.title}; 95 % interval of their mean by Student's t. p is adjusted for all "
            "comparisons (Holm); "
            "dense is a bound, not a contestant, and is left out of the adjustment"
        )
    blocks: list[Block] = [Points(said)] if (said := words.shown(setting)) else []
    if many := words.multiplicity(setting):
        blocks.append(Text(many))
    return [*blocks, Table(caption + ".", head, rows)]


def forest(setting: Setting) -> Figure | None:
    """Every sparse recipe's differences to the baseline; None if nothing is compared."""
    base = setting.baseline if setting.comparisons else None
    if base is None or all(r is base for r in setting.sparse):
        return None
    return Figure(
        "differences",
        plots.differences(setting),
        f"Differences of every recipe to {base.title} with 95 % intervals",
        f"Differences to {base.title}. Small marks are seeds, large marks their mean, bars its "
        "95 % interval. A bar across the line shows no difference.",
    )


def _curves(setting: Setting) -> list[Block]:
    caption = (
        "Mean over seeds, the band from the least to the greatest. Left: the training loss of the "
        "network as it is at that step"
    )
    if setting.sparse:
        caption += (
            ", with its fading weights. Right: the validation loss of the final N:M network that "
            "the masks of that step would give (dense: of the dense one). Below: δ multiplies the "
            "pruned weights (0: gone, 1: all there), and the share of the targets' weights that "
            "the current pattern keeps."
        )
    else:
        caption += ". Right: its validation loss."
    alt = "Losses over steps, a line a recipe" + (", and δ and density" if setting.sparse else "")
    return [Figure("curves", plots.curves(setting), alt, caption)]


def _noise(setting: Setting) -> list[Block]:
    blocks: list[Block] = []
    if not setting.sparse:  # nothing to compare, and nothing pruned
        return blocks
    if any(run["noise"] for run in setting.runs):
        steps = sorted({row["step"] for run in setting.runs for row in run["noise"]})
        rows = []
        for recipe in setting.recipes:
            for step in steps:
                cells = [
                    _spread([v[step] for v in _frozen(recipe, f"{key}_{part}") if step in v])
                    for part in ("kept", "pruned")
                    for key in ("snr", "noise")
                ]
                rows.append([recipe.title, f"{step:,}", *cells])
        head = ["recipe", "step"]
        for part in ("kept", "pruned"):
            head += [f"signal / noise, {part}", f"noise per weight, {part}"]
        batches = setting.sample["run"]["training"]["noise_batches"]
        caption = (
            f"Gradients of {batches} independent batches at frozen weights, mean ± sd over seeds. "
            "Noise is the variance over batches; signal is the squared mean, less what as many "
            "batches of pure noise would show, so that it may come out below 0."
        )
        blocks += [Text(words.NOISE), Table(caption, head, rows)]
    if any(run["tracked"] for run in setting.runs):
        name = "second moment of the gradient"
        blocks.append(
            Figure(
                "second-moment",
                plots.tracked(setting, "grad_second", name),
                f"{name} over steps for kept and pruned weights, a line a recipe",
                "Second moment across the weights of the batch's gradient as it reaches the dense "
                "weights, before the recipe's rule; mean over seeds, logarithmic. The weights that "
                "count as kept are those of the current pattern, of the final one while dense.",
            )
        )
    return blocks


def _frozen(recipe: Recipe, key: str) -> list[dict[int, float]]:
    return [{row["step"]: row[key] for row in run["noise"]} for run in recipe.runs.values()]


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    s = summary(values)
    return f"{s.mean:.3g} ± {s.sd:.1g}".replace("-", "−") if s.sd is not None else f"{s.mean:.3g}"
