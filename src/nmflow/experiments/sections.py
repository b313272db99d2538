"""The sections of one setting: figures in tables, drawings, and sentences that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nmflow.experiments import plots, words
from nmflow.experiments.blocks import Block, Figure, Points, Section, Table, Text, number
from nmflow.experiments.comparing import Recipe, Setting
from nmflow.experiments.statistics import Paired, summary


def sections(setting: Setting) -> list[Section]:
    """Everything that a report says of a setting, in reading order."""
    made: list[tuple[str, Callable[[Setting], list[Block]]]] = [
        ("What the figures show", _results),
        ("What they do not show", lambda s: [Points(words.not_shown(s))]),
        ("Curves", _curves),
        ("Gradient noise", _noise),
        ("Audit of every final network", _audit),
        ("Parameters, bytes and FLOPs", _cost),
        ("Every seed's raw figure", _raw),
        ("How it was made", _made),
    ]
    return [Section(title, blocks) for title, make in made if (blocks := make(setting))]


def title(setting: Setting) -> str:
    """One line that tells the setting from others."""
    run = setting.sample["run"]
    network = run["model"]["kind"] or run["model"]["load"]
    include = run["include"] if isinstance(run["include"], str) else ", ".join(run["include"])
    return (
        f"{run['task']} on {setting.sample['data']['name']}, {network}, "
        f"{setting.sample['pattern']} in {include}"
    )


def _results(setting: Setting) -> list[Block]:
    shown = [m for m in setting.metrics if m in ("loss", setting.headline)]
    base = setting.baseline
    head = ["recipe"] + [f"test {m}, mean ± sd" for m in shown]
    if base is not None:
        for m in shown:
            head += [f"{m} − {base.title} [95 %]", "p (Holm)"]
        head.append("seeds")
    rows = []
    for recipe in setting.recipes:
        row = [recipe.title] + [_mean(recipe, m) for m in shown]
        if base is not None:
            for m in shown:
                found = setting.comparison(recipe, m)
                row += [_interval(found.difference) if found else "–"]
                row += [number(found.adjusted if found else None, 3)]
        rows.append([*row, str(len(recipe.runs))] if base is not None else row)
    caption = "Test figures after finalize, on the exactly N:M network"
    if base is not None:
        caption += (
            ". Differences are paired: same seed, same initial weights, same batches as "
            f"{base.title}; 95 % interval of their mean by Student's t. p is adjusted for all "
            "comparisons (Holm); "
            "dense is a bound, not a contestant, and is left out of the adjustment"
        )
    blocks: list[Block] = [Points(words.shown(setting)), Text(words.multiplicity(setting))]
    blocks.append(Table(caption + ".", head, rows))
    if base is not None and len(setting.recipes) > 1:
        blocks.append(
            Figure(
                "differences",
                plots.differences(setting),
                f"Differences of every recipe to {base.title} with 95 % intervals",
                "Small marks are seeds, large marks their mean, bars its 95 % interval; a bar "
                "across the line shows no difference.",
            )
        )
    return blocks


def _curves(setting: Setting) -> list[Block]:
    return [
        Figure(
            "loss",
            plots.curves(setting),
            "Training and validation loss over steps, a line a recipe",
            "Mean over seeds, the band from the least to the greatest. Left: the loss of the "
            "network as it is at that step, with its fading weights. Right: the validation loss of "
            "the final N:M network that the masks of that step would give (dense: of the dense "
            "one).",
        ),
        Figure(
            "schedule",
            plots.schedule(setting),
            "δ and density over steps, a line a recipe",
            "Left: δ, by which pruned weights are multiplied (0: gone, 1: all there). Right: the "
            "share of the targets' weights that the current pattern keeps.",
        ),
    ]


def _noise(setting: Setting) -> list[Block]:
    blocks: list[Block] = []
    if any(run["noise"] for run in _all(setting)):
        steps = sorted({row["step"] for run in _all(setting) for row in run["noise"]})
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
    if any(run["tracked"] for run in _all(setting)):
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


def _audit(setting: Setting) -> list[Block]:
    rows, broken = [], []
    for recipe in setting.recipes:
        for seed, run in sorted(recipe.runs.items()):
            found = run["audit"]["rows"]
            held = sum(bool(row["holds"]) for row in found)
            nonzero, total = sum(r["nonzero"] for r in found), sum(r["total"] for r in found)
            share = f"{nonzero / total:.2%}" if total else "–"
            rows.append(
                [
                    recipe.title,
                    str(seed),
                    f"{held} of {len(found)}",
                    f"{nonzero:,}",
                    f"{total:,}",
                    share,
                ]
            )
            if recipe.name != "dense" and not run["audit"]["ok"]:
                broken.append(f"{recipe.title}, seed {seed}")
    verdict = (
        f"NOT N:M: {'; '.join(broken)}."
        if broken
        else f"Every weight of every sparse network holds {setting.sample['pattern']} exactly."
    )
    head = ["recipe", "seed", "weights that hold it", "non-zero", "of", "density"]
    table = Table(f"Targeted weights against {setting.sample['pattern']}.", head, rows, left=1)
    layers = [
        [
            row["name"],
            "×".join(map(str, row["shape"])),
            row["pattern"] or "–",
            f"{row['density']:.2%}",
        ]
        for row in _sparse_run(setting)["audit"]["rows"]
    ]
    which = f"{_sparse_run(setting)['recipe']}, seed {_sparse_run(setting)['seed']}"
    each = Table(f"Layer by layer: {which}.", ["weight", "shape", "pattern", "density"], layers)
    return [Text(verdict), table, each]


def _sparse_run(setting: Setting) -> dict[str, Any]:
    recipe = next((r for r in reversed(setting.recipes) if r.name != "dense"), setting.recipes[0])
    return next(iter(recipe.runs.values()))


def _cost(setting: Setting) -> list[Block]:
    from nmflow.experiments.costs import COLUMNS, NOTE, row

    rows = [[r.title, *row(next(iter(r.runs.values()))["cost"])] for r in setting.recipes]
    return [Text(NOTE), Table("One network of each recipe.", ["recipe", *COLUMNS], rows)]


def _raw(setting: Setting) -> list[Block]:
    rows = []
    for recipe in setting.recipes:
        for seed, run in sorted(recipe.runs.items()):
            figures = [number(run["test"].get(m), 4) for m in setting.metrics]
            seconds = f"{run['train_seconds']:.1f}"
            rows.append(
                [recipe.title, str(seed), *figures, number(run["validation"]["loss"], 4), seconds]
            )
    head = ["recipe", "seed", *(f"test {m}" for m in setting.metrics), "validation loss", "seconds"]
    return [Table("After finalize; seconds are of training, with its evaluations.", head, rows)]


def _made(setting: Setting) -> list[Block]:
    sample = setting.sample
    run, data, t = sample["run"], sample["data"], sample["run"]["training"]
    sizes = ", ".join(f"{name} {size:,}" for name, size in data["sizes"].items())
    recipes = [
        f"{r.title}: {r.name}, {_options(next(iter(r.runs.values())))}" for r in setting.recipes
    ]
    initial = {
        len({r.runs[s]["initial_sha256"] for r in setting.recipes if s in r.runs})
        for s in setting.seeds
    }
    paired = (
        "For each seed all recipes started from the same weights (their SHA-256 agree) and saw the "
        "same batches in the same order."
        if initial == {1}
        else "NOT PAIRED: for some seed the initial weights of the recipes differ."
    )
    versions = ", ".join(f"{name} {value}" for name, value in sample["versions"].items())
    machines = sorted(
        {f"{r['machine']['device']}, {r['machine']['threads']} thread(s)" for r in _all(setting)}
    )
    points = [
        f"Data: {data['name']}, {sizes} {data['unit']}; split: {data['split']}. SHA-256 "
        f"{data['sha256']}.",
        *data["notes"],
        f"Network: {run['model']['kind'] or run['model']['load']} of transformers, "
        f"{_fields(run['model']['fields'])}.",
        f"Training: {t['steps']:,} steps of {t['batch_size']} examples, {t['optimizer']}, learning "
        f"rate {t['learning_rate']:g}, weight decay {t['weight_decay']:g}, {t['schedule']} "
        f"schedule, clipped at {t['clip']:g}, {t['precision']}.",
        "Recipes: " + "; ".join(recipes) + ".",
        paired,
        f"Seeds {', '.join(map(str, setting.seeds))}. Setting {setting.hash[:16]}.",
        f"Versions: {versions}.",
        f"Machine: {'; '.join(machines)}.",
        f"Training time: {sum(r['train_seconds'] for r in _all(setting)):,.0f} s in all.",
    ]
    return [Points(points)]


def _options(run: dict[str, Any]) -> str:
    return _fields(run["run"]["recipe"]["options"]) or "its defaults"


def _fields(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _all(setting: Setting) -> list[dict[str, Any]]:
    return [run for recipe in setting.recipes for run in recipe.runs.values()]


def _mean(recipe: Recipe, metric: str) -> str:
    s = summary(list(recipe.values(metric).values()))
    return f"{number(s.mean)} ± {number(s.sd)}" if s.sd is not None else number(s.mean)


def _interval(d: Paired) -> str:
    if d.low is None or d.high is None:
        return f"{number(d.mean, 4, True)} (one seed)"
    return f"{number(d.mean, 4, True)} [{number(d.low, 4, True)}, {number(d.high, 4, True)}]"
