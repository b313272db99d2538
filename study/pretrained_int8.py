"""What 8-bit values cost networks that were fine-tuned sparse, on held-out rows.

    python study/pretrained_runs.py cola    # keeps the distilled networks
    python study/pretrained_int8.py cola    # docs/study/results/cola-int8/int8.parquet

Each network is packed three times: its values as they are, as int8 with a scale a row, and with
inputs rounded to 8 bits as well. The dense teacher stands beside, in float32 and after torch's
dynamic quantization.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from choose import RESULTS, SWEEPS
from pretrained_setups import PATTERN, TASKS
from torch import nn

import nmflow
from nmflow.bench.ways import int8_dynamic
from nmflow.experiments import sweep, tasks
from nmflow.experiments.config import Model, Run
from nmflow.experiments.run_folder import MODEL, RunFolder
from nmflow.experiments.trainer import trainer
from nmflow.experiments.training import quiet

PACKED = {
    "packed": {},
    "int8 values": {"values": "int8"},
    "int8 values and inputs": {"values": "int8", "activations": "int8"},
}


def ways(model: nn.Module, sparse: bool) -> dict[str, Any]:
    """The network as it is, and in 8 bits."""
    if not sparse:
        return {"float32": model, "int8, dynamic": int8_dynamic(model)}
    packed: dict[str, Any] = {"float32": model}
    for name, options in PACKED.items():
        packed[name] = nmflow.compress(model, PATTERN, "ff", measure=False, **options)
    return packed


def figures(run: Run, store: Path, metric: str) -> list[dict[str, Any]]:
    """A row for every way of running a saved network."""
    folder = RunFolder(store / run.id)
    saved = Model(load=str(folder.path / MODEL))
    exact = run.training.model_copy(update={"precision": "fp32", "device": "cpu"})
    rows = []
    with quiet():
        problem = tasks.build(run.model_copy(update={"model": saved}))
        sparse = run.recipe.name != "dense"
        for way, model in ways(problem.model().eval(), sparse).items():
            judge = trainer(run.model_copy(update={"training": exact}), folder, problem, model, [])
            found = {
                split: judge.evaluate(getattr(problem, split))[f"eval_{metric}"]
                for split in ("validation", "test")
            }
            rows.append({"recipe": run.recipe.title, "seed": run.seed, "way": way, **found})
    return rows


def main() -> None:
    """Evaluate every kept network of a task."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    task = parser.parse_args().task
    rows = []
    for part in ("teacher", "distilled-1-8"):
        plan = sweep.load(SWEEPS / f"{task}-{part}.yaml")
        kept = [cell.run for cell in plan.finished if (plan.store / cell.run.id / MODEL).exists()]
        sys.stdout.write(f"{part}: weights of {len(kept)} of {len(plan.cells)} runs are here\n")
        for run in kept:
            rows += figures(run, plan.store, TASKS[task].metric)
    place = RESULTS / f"{task}-int8"
    place.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(place / "int8.parquet", index=False)


if __name__ == "__main__":
    main()
