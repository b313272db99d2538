"""The details of one setting: audit, costs, figures by seed, and how to reproduce it."""

from __future__ import annotations

from typing import Any

from nmflow.experiments.report import overview_words
from nmflow.experiments.report.blocks import Block, Points, Table, Text, number, quantity, threads
from nmflow.experiments.report.compare import Setting


def audited(setting: Setting, layers: bool) -> list[Block]:
    """Whether every final network holds its pattern; `layers` lists the weights of one network."""
    if not setting.sparse:
        return []
    pattern = setting.sample["pattern"]
    rows, broken = [], []
    for recipe in setting.recipes:
        for seed, run in sorted(recipe.runs.items()):
            if run["setting_hash"] != setting.hash:  # audited against another pattern
                continue
            found = run["audit"]["rows"]
            held = sum(bool(row["holds"]) for row in found)
            nonzero, total = sum(r["nonzero"] for r in found), sum(r["total"] for r in found)
            share = f"{nonzero / total:.2%}" if total else "–"
            kept = [f"{held} of {len(found)}", f"{nonzero:,}", f"{total:,}", share]
            rows.append([recipe.title, str(seed), *kept])
            if recipe.name != "dense" and not run["audit"]["ok"]:
                broken.append(f"{recipe.title}, seed {seed}")
    verdict = (
        f"NOT N:M: {'; '.join(broken)}."
        if broken
        else f"Every weight of every sparse network holds {pattern} exactly."
    )
    head = ["recipe", "seed", "weights that hold it", "non-zero", "of", "density"]
    out: list[Block] = [Text(verdict), Table(f"Targeted weights against {pattern}.", head, rows)]
    if layers:
        one = next(iter(setting.sparse[-1].runs.values()))
        each = [
            [r["name"], "×".join(map(str, r["shape"])), r["pattern"] or "–", f"{r['density']:.2%}"]
            for r in one["audit"]["rows"]
        ]
        caption = f"Layer by layer: {one['recipe']}, seed {one['seed']}."
        out.append(Table(caption, ["weight", "shape", "pattern", "density"], each))
    return out


def cost(setting: Setting) -> list[Block]:
    """Parameters, bytes and FLOPs of one network of each recipe."""
    from nmflow.experiments.costs import COLUMNS, NOTE, row

    rows = [[r.title, *row(next(iter(r.runs.values()))["cost"])] for r in setting.recipes]
    return [Text(NOTE), Table("One network of each recipe.", ["recipe", *COLUMNS], rows)]


def raw(setting: Setting) -> list[Block]:
    """The figures of each seed."""
    rows = []
    for recipe in setting.recipes:
        for seed, run in sorted(recipe.runs.items()):
            figures = [number(run["test"].get(m), 4) for m in setting.metrics]
            loss, seconds = number(run["validation"]["loss"], 4), f"{run['train_seconds']:.1f}"
            resumed = ", ".join(map(str, run.get("resumed_at", []))) or "–"
            rows.append([recipe.title, str(seed), *figures, loss, seconds, resumed])
    tests = [f"test {m}" for m in setting.metrics]
    head = ["recipe", "seed", *tests, "validation loss", "seconds", "resumed at step"]
    return [Table("After finalize; seconds are of training, with its evaluations.", head, rows)]


def made(setting: Setting) -> list[Block]:
    """What you need to reproduce the runs."""
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
        {f"{r['machine']['device']}, {threads(r['machine']['threads'])}" for r in setting.runs}
    )
    points = [
        f"Data: {data['name']}, {sizes} {data['unit']}; split: {data['split']}. SHA-256 "
        f"{data['sha256']}.",
        *data["notes"],
        f"Network: {run['model']['kind'] or run['model']['load']} of transformers, "
        f"{_fields(run['model']['fields'])}.",
        *_origins(sample),
        f"Training: {_length(t)} of {t['batch_size']} examples, {t['optimizer']}, learning "
        f"rate {t['learning_rate']:g}, weight decay {t['weight_decay']:g}, {t['schedule']} "
        f"schedule, clipped at {t['clip']:g}, {t['precision']}.",
        "Recipes: " + "; ".join(recipes) + ".",
        *([paired] if len(setting.recipes) > 1 else []),
        *([lent] if (lent := overview_words.lent(setting)) else []),
        f"Seeds {', '.join(map(str, setting.seeds))}. Setting {setting.hash[:16]}.",
        f"Versions: {versions}.",
        f"Machine: {'; '.join(machines)}.",
        f"Training time: {sum(r['train_seconds'] for r in setting.runs):,.0f} s in all.",
    ]
    return [Points(points)]


def _origins(sample: dict[str, Any]) -> list[str]:
    """The origins and licences of saved weights, and the teacher."""
    out = []
    if (source := sample.get("source")) is not None:
        out.append(f"Weights at first: {source['text']}, licence {source['licence']}.")
    if (teacher := sample.get("teacher")) is not None:
        weights = {k: v for k, v in sample["run"]["distill"].items() if k != "teacher"}
        out.append(
            f"Distilled from {teacher['text']} (SHA-256 {teacher['sha256'][:16]}), "
            f"{_fields(weights)}."
        )
    return out


def _options(run: dict[str, Any]) -> str:
    return _fields(run["run"]["recipe"]["options"]) or "its defaults"


def _fields(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _length(training: dict[str, Any]) -> str:
    if training.get("budget") is not None:
        return f"a budget of {quantity(training['budget'])} training FLOPs, in steps"
    return f"{training['steps']:,} steps"
