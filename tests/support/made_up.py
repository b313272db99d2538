"""Results of runs that nobody trained, for tests of the report."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nmflow.experiments.config import Run, set_key
from nmflow.experiments.report.page import write_report
from nmflow.pattern import Pattern

RECIPES = {"dense": "Dense", "sr-ste": "SR-STE", "mdgf-linear": "Linear", "sdgf-stepwise": "Steps"}


def cost(recipe: str, density: float) -> dict[str, float]:
    """What a run cost, in round figures."""
    return {
        "parameters": 1000,
        "remaining": round(1000 * density),
        "dense_bytes": 4000,
        "bytes": round(4000 * min(1.0, 1.25 * density)),
        "flops": round(1000 * density),
        "dense_flops": 1000,
        "run_training_flops": {"dense": 1e10, "sr-ste": 6e9}.get(recipe, 7e9),
        "run_dense_training_flops": 1e10,
    }


def result(
    recipe: str,
    seed: int,
    loss: float,
    accuracy: float,
    keys: Mapping[str, Any] | None = None,
    **extra: object,
) -> dict[str, Any]:
    """A run's result; `keys` sets keys of its configuration by their dotted names."""
    raw: dict[str, Any] = {
        "name": "made-up",
        "task": "language-modelling",
        "data": {"source": "pydoc"},
        "model": {"kind": "gpt2"},
        "training": {"steps": 40},
        "recipe": {"name": recipe, "label": RECIPES[recipe]},
        "seed": seed,
    }
    for key, value in (keys or {}).items():
        set_key(raw, key, value)
    run = Run.model_validate(raw)
    dense = recipe == "dense"
    patterns = [run.pattern] if isinstance(run.pattern, str) else [*run.pattern.values()]
    density = 1.0 if dense else Pattern(patterns[0]).density
    row = {
        "name": "h.0.weight",
        "shape": [32, 32],
        "pattern": run.pattern_text,
        "holds": not dense,
        "density": density,
        "nonzero": round(1024 * density),
        "total": 1024,
    }
    log = [
        {"step": k, "loss": 3 - k / 40, "learning_rate": 0.1, "delta": 1 - k / 40, "density": 0.5}
        for k in range(10, 50, 10)
    ]
    held_out = [{"step": k, "eval_loss": 3.5 - k / 40} for k in (20, 40)]
    moments = {f"grad_second_{part}": 1e-6 for part in ("kept", "pruned")}
    frozen = {"snr_kept": 0.5, "snr_pruned": 0.1, "noise_kept": 1e-8, "noise_pruned": 2e-8}
    dump = run.model_dump(mode="json")
    if run.training.budget is not None:  # solved by a run; MDGF's steps cost the most
        dump["training"]["steps"] = {"dense": 30, "sr-ste": 50}.get(recipe, 40)
    return {
        "run": dump,
        "steps": dump["training"]["steps"],
        "id": run.id,
        "recipe": run.recipe.title,
        "pattern": run.pattern_text,
        "seed": seed,
        "config_hash": run.hash,
        "setting_hash": run.setting_hash,
        "headline": "accuracy",
        "data": {
            "name": "made-up data",
            "sha256": "ab" * 32,
            "unit": "characters",
            "sizes": {"train": 8, "validation": 1, "test": 1},
            "split": "by hand",
            "notes": [],
        },
        "initial_sha256": f"start of {seed}",
        "test": {"loss": loss, "accuracy": accuracy},
        "validation": {"loss": loss, "accuracy": accuracy},
        "history": [*log, *held_out],
        "tracked": [{"step": k, **moments} for k in (0, 10, 20)],
        "noise": [{"step": k, **frozen} for k in (20, 40)],
        "audit": {"ok": not dense, "rows": [row]},
        "cost": cost(recipe, density),
        "versions": {"torch": "0"},
        "machine": {"device": "a <fast> machine", "threads": 1, "processes": 1},
        "train_seconds": 1.5,
        **extra,
    }


def save(folder: Path, found: Iterable[Mapping[str, Any]]) -> Path:
    """Write each result into a run folder of its own."""
    for one in found:
        place = folder / one["id"]
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(one))
    return folder


LINEAR, SRSTE, DENSE = "mdgf-linear", "sr-ste", "dense"
GAIN = {DENSE: 0.08, SRSTE: 0.0, LINEAR: 0.05, "sdgf-stepwise": 0.0}


def cell(
    recipe: str, keys: Mapping[str, Any] | None = None, seeds: int = 3, base: float = 0.4
) -> Iterator[dict[str, Any]]:
    """A recipe's runs in one setting; the linear one is better by 0.05, give or take little."""
    for seed in range(seeds):
        accuracy = base + GAIN[recipe] + 0.01 * seed
        accuracy += 0.002 * ((seed * 7 + len(recipe)) % 3) * (recipe != SRSTE)
        yield result(recipe, seed, 3 - accuracy, accuracy, keys, tracked=[])


def crossed(*recipes: str, key: str, values: list[Any], seeds: int = 3) -> list[dict[str, Any]]:
    """Every recipe at every value of a key; each further value is worse by 0.03."""
    return [
        run
        for place, value in enumerate(values)
        for recipe in recipes
        for run in cell(recipe, {key: value}, seeds, 0.4 - 0.03 * place)
    ]


def patterns(*values: str) -> list[dict[str, Any]]:
    """Two sparse recipes at three patterns; dense was run at the first alone."""
    chosen: list[Any] = list(values) or ["1:4", "1:8", "1:16"]
    sparse = crossed(SRSTE, LINEAR, key="pattern", values=chosen)
    return [*cell(DENSE, {"pattern": "1:4"}), *sparse]


def narrow(width: int) -> list[dict[str, Any]]:
    """Dense runs of another network."""
    return list(cell(DENSE, {"model.fields": {"n_inner": width}}, base=0.3))


def page(folder: Path, runs: list[dict[str, Any]]) -> str:
    """The HTML over runs, without its drawings; the report is in `folder / "report"`."""
    save(folder / "runs", runs)
    html = write_report([folder / "runs"], folder / "report").read_text()
    return re.sub(r'data:image/svg\+xml;base64,[^"]*', "", html)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    """A CSV file of the report."""
    with (folder / "report" / name).open() as file:
        return list(csv.DictReader(file))
