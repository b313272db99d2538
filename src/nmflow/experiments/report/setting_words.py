"""Sentences about what a setting's figures show and do not show, made from the figures."""

from __future__ import annotations

from dataclasses import dataclass

from nmflow.experiments.report.blocks import number, quantity
from nmflow.experiments.report.compare import LESS_IS_BETTER, Comparison, Setting
from nmflow.experiments.report.statistics import LEVEL

NOISE = (
    "The paper explains the gain by less noise in the gradients. A second moment alone does not "
    "decide that: it adds signal and noise, and shrinks with any factor on the gradient. So the "
    "gradients of many independent batches are compared at frozen weights at every quarter of the "
    "run: their mean is signal, their variance noise. These figures go beside the losses; they "
    "do not prove a cause."
)
PERCENT = f"{LEVEL:.0%}".replace("%", "\u00a0%")


@dataclass(frozen=True)
class Page:
    """The rest of a setting's page, so that no sentence contradicts it.

    Attributes:
        alone: the page has this setting only.
        networks: the page has dense networks of other sizes.
        tuned: the keys of training with several values on the page.
        timed: inference was timed.
    """

    alone: bool = True
    networks: bool = False
    tuned: tuple[str, ...] = ()
    timed: bool = False


def shown(setting: Setting) -> list[str]:
    """What the figures show."""
    out = []
    if not setting.sparse:
        return []
    if setting.baseline is None:
        return ["Without the baseline recipe among the runs nothing is compared."]
    if len(setting.recipes) == 1:
        return [f"{setting.baseline.title} is the only recipe here: there is nothing to compare."]
    made = [
        c
        for metric in setting.metrics
        if metric in ("loss", setting.headline)
        for c in setting.comparisons
        if _contest(c, metric)
    ]
    out += [_sentence(setting, c) for c in made if c.difference.differs or c.difference.low is None]
    if null := [c for c in made if c.difference.low is not None and not c.difference.differs]:
        out.append(_no_difference(setting, null))
    if gap := _gap(setting):
        out.append(gap)
    return out


def multiplicity(setting: Setting) -> str:
    """The number of comparisons, and those that survive the adjustment."""
    family = [c for c in setting.comparisons if c.adjusted is not None]
    if not family:
        if not any(_contest(c, c.metric) for c in setting.comparisons):
            return ""
        return "With one seed there is no interval: the differences are single figures."
    alone = [c for c in family if c.difference.differs]
    kept = [c for c in family if _survives(c)]
    names = ", ".join(f"{c.recipe.title} in {c.metric}" for c in kept)
    return (
        f"This setting has {len(family)} comparisons, and each {PERCENT} interval stands alone. If "
        f"nothing differed, about {len(family) * (1 - LEVEL):.1f} of them would exclude zero by "
        f"chance; {len(alone)} do. After Holm's adjustment for all {len(family)}, "
        f"{_remain(len(kept))}{f': {names}' if kept else ''}."
    )


def _remain(count: int) -> str:
    return {0: "none remains", 1: "1 remains"}.get(count, f"{count} remain")


def not_shown(setting: Setting, page: Page | None = None) -> list[str]:
    """What these figures cannot show, on a page that may have others."""
    page, runs = page or Page(), setting.seeds
    order = "the order of recipes" if len(setting.recipes) > 1 else "a figure"
    out = [
        f"Anything beyond this task, this network and {_length(setting)}: {order} may change with "
        "the data, the size, the length of training and the pattern.",
        "The choice of the test data: a seed changes the initial weights and the order of "
        "batches, but not the split, so an interval is about training again on this split.",
    ]
    if setting.sparse:
        counted = "FLOPs and bytes are counted for an N:M implementation, not timed"
        timed = "; the page times saved networks, which it compressed for that"
        out.append(
            f"Speed: {counted}; these runs multiply dense tensors that hold zeros"
            f"{timed if page.timed else ''}."
        )
        if len(setting.recipes) > 1:
            out.append(_equal(setting))
        out.append(
            "Whether sparsity is worth it: dense networks of other sizes are in the plots of "
            "quality against cost, but no recipe here was paired with them."
            if page.networks
            else "Whether sparsity is worth it: a narrower dense network with as many parameters "
            "or FLOPs, the rival of every sparse one, was not trained here."
        )
    best = f"The best that each {'recipe' if setting.sparse else 'network'} can do: "
    if page.tuned:
        best += f"other settings of the page vary {' and '.join(page.tuned)}, and nothing else."
    elif len(setting.recipes) > 1:
        best += "no recipe was tuned; all share one learning rate and one schedule."
    else:
        best += "learning rate and schedule were not tuned here."
    out.append(best)
    if len(runs) < 5:
        few = f"{len(runs)} seeds are few, and the interval of a mean over so few is wide"
        none = "of one seed there is no interval at all"
        out.insert(0, f"Small differences: {few if len(runs) > 1 else none}.")
    return out


def _length(setting: Setting) -> str:
    budget = setting.sample["run"]["training"].get("budget")
    if budget is not None:
        return f"a budget of {quantity(budget)} training FLOPs"
    return f"{setting.sample['run']['training']['steps']:,} steps"


def _equal(setting: Setting) -> str:
    first = {r.title: next(iter(r.runs.values())) for r in setting.recipes}
    if any(result["run"]["training"].get("budget") for result in first.values()):
        steps = ", ".join(f"{result['steps']:,} ({title})" for title, result in first.items())
        return (
            "Quality at equal steps: all were given the same training FLOPs, which pay for steps: "
            f"{steps}."
        )
    return (
        "Quality at equal cost: all took as many steps, whose training FLOPs are "
        f"{_flops(setting)} of the dense ones."
    )


def _flops(setting: Setting) -> str:
    shares = []
    for recipe in setting.recipes:
        cost = next(iter(recipe.runs.values()))["cost"]
        share = cost["run_training_flops"] / max(1, cost["run_dense_training_flops"])
        shares.append(f"{share:.0%} ({recipe.title})".replace("%", "\u00a0%"))
    return ", ".join(shares)


def _survives(c: Comparison) -> bool:
    return c.adjusted is not None and c.adjusted <= 1 - LEVEL


def _contest(comparison: Comparison, metric: str) -> bool:
    return comparison.metric == metric and comparison.recipe.name != "dense"


def _baseline(setting: Setting) -> str:
    return setting.baseline.title if setting.baseline else "the baseline"


def _sentence(setting: Setting, c: Comparison) -> str:
    d, base = c.difference, _baseline(setting)
    name = f"test {c.metric}"
    digits = 4 if abs(d.mean) < 0.01 else 3
    amount = number(d.mean, digits, sign=True)
    if d.low is None or d.high is None:
        return (
            f"{c.recipe.title} differs from {base} by {amount} in {name}, on one seed: no interval."
        )
    interval = f"{number(d.low, digits, True)} to {number(d.high, digits, True)}"
    agree = f"{c.in_favour} of {d.n} seeds are in its favour"
    verdict = "better" if c.better else "worse"
    lost = "" if _survives(c) else "; after the adjustment for all comparisons it is not shown"
    return (
        f"{c.recipe.title} is {verdict} than {base} in {name}: {amount}, {PERCENT} interval "
        f"{interval}; {agree}{lost}."
    )


def _no_difference(setting: Setting, null: list[Comparison]) -> str:
    """One line for each comparison whose interval contains zero."""
    said = []
    for c in null:
        d = c.difference
        digits = 4 if abs(d.mean) < 0.01 else 3
        ends = f"{number(d.low, digits, True)} to {number(d.high, digits, True)}"
        said.append(f"{c.recipe.title} in test {c.metric} ({number(d.mean, digits, True)}; {ends})")
    return f"Neither different from {_baseline(setting)} nor shown to be equal: {'; '.join(said)}."


def _gap(setting: Setting) -> str:
    dense, base = setting.dense, setting.baseline
    metric = setting.headline
    against = setting.comparison(dense, metric) if dense else None
    if base is None or against is None or not against.difference.mean:
        return ""
    gap = -against.difference.mean
    cost = gap if metric in LESS_IS_BETTER else -gap
    text = (
        f"On average {base.title} is {number(abs(gap))} {'worse' if cost > 0 else 'better'} than "
        f"the dense network in test {metric}"
    )
    best = max(
        (
            c
            for c in setting.comparisons
            if _contest(c, metric) and c.difference.differs and c.better and _survives(c)
        ),
        key=lambda c: abs(c.difference.mean),
        default=None,
    )
    if cost <= 0 or best is None:
        return text + "."
    share = abs(best.difference.mean) / cost
    return f"{text}; {best.recipe.title} closes {share:.0%} of that gap.".replace("%", "\u00a0%")
