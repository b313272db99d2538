"""Page b's second part: what the same processor time buys, with steps on kept places.

    python study/equal_time.py measure            # CPU seconds of a step; writes the sweep's file
    python study/equal_time.py run [--seconds S]  # the runs that are missing, one after the other

A step's seconds are measured on the same batches for every phase of every way, with one thread. The
steps of a run are those that its way makes in the time of `DENSE_STEPS` dense ones.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from choose import RESULTS, SEEDS, SWEEPS, write
from torch import nn
from torch.utils.data import DataLoader, Subset

import nmflow
from nmflow.experiments import sweep as experiments
from nmflow.experiments import tasks
from nmflow.experiments.config import Run
from nmflow.experiments.files import write_json
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.sweep_table import write_table
from nmflow.experiments.tasks._text import ByLength
from nmflow.experiments.training import train

NAME, TASK = "sst2-minilm-time", "sst2-minilm"
DENSE, HELD = "Dense", "Settling, dense products"
DENSE_STEPS = 240
RATE = 2e-4
LONG = {"dense": 0.05, "finetune": 0.7}
WAYS: dict[str, dict[str, Any]] = {
    DENSE: {"name": "dense"},
    "SR-STE": {"name": "sr-ste", "lam": 2e-3},
    "MDGF-Exponential": {"name": "mdgf-exponential", "gradient": "masked", **LONG},
    "Settling": {"name": "settling", "pull": 1.0, **LONG},
    "One-shot": {"name": "one-shot", "dense": 0.15},
}
"""What is compared at equal time. All but the first two step on kept places in their last phase."""
DENSE_PRODUCTS = (DENSE, "SR-STE")
SHARED = {
    "include": ["ff", "attn"],
    "freeze_mask": True,
    "training.precision": "fp32",
    "training.device": "cpu",
    "training.log_every": 1000,
    "training.trainer": {
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
    },
}
BATCHES = 8
"""Batches of a measurement, the first ones of the tuning seed."""
COSTS = RESULTS / NAME / "step_seconds.csv"
SPENT = RESULTS / NAME / "cpu_seconds.csv"


def setups(steps: Mapping[str, int]) -> list[dict[str, Any]]:
    """The sweep's setups; the last is settling once more, as many steps with dense products."""
    found = [_setup(way, steps[way], way not in DENSE_PRODUCTS) for way in WAYS]
    return [*found, _setup("Settling", steps["Settling"], False, HELD)]


def _setup(way: str, steps: int, sparse: bool, label: str = "") -> dict[str, Any]:
    recipe = {**WAYS[way], "label": label or way}
    return {
        "label": label or way,
        "recipe": recipe,
        "sparse_steps": "on" if sparse else "off",
        "training.learning_rate": RATE,
        "training.steps": steps,
        **SHARED,
    }


def solved(costs: pd.DataFrame) -> dict[str, int]:
    """The steps of every way in the time of the dense one's."""
    whole = {way: _step(costs[costs["way"] == way]) for way in WAYS}
    return {way: round(DENSE_STEPS * whole[DENSE] / seconds) for way, seconds in whole.items()}


def _step(costs: pd.DataFrame) -> float:
    return float((costs["share"] * costs["cpu_seconds"]).sum())


def shares(way: str) -> dict[str, float]:
    """The share of a run that each phase takes."""
    recipe = WAYS[way]
    first = float(recipe.get("dense", 1.0 if way == DENSE else 0.0))
    last = float(recipe.get("finetune", 1 - first if way == "One-shot" else 0.0))
    found = {"dense": first, "masked": 1 - first - last, "frozen": last}
    return {phase: share for phase, share in found.items() if share > 1e-9}


def measure() -> pd.DataFrame:
    """CPU seconds of a step, phase by phase: the mean over batches of the better of two tries.

    The ways take turns, step by step, so that a slow moment meets all of them.
    """
    fake = setups(dict.fromkeys(WAYS, 3 * BATCHES))[: len(WAYS)]
    runs = _read(fake, [100]).runs
    problem = tasks.build(runs[0])
    order = list(ByLength(problem.train.lengths, runs[0].training.batch_size, 100))
    size = runs[0].training.batch_size
    rows = range(0, BATCHES * size, size)
    data: Any = problem.train
    batches = [problem.collate([data[i] for i in order[at : at + size]]) for at in rows]
    torch.manual_seed(100)
    steps = [_timed(run, problem.model().train(), batches) for run in runs]
    spent: dict[tuple[str, str, int], float] = {}
    for turn in itertools.zip_longest(*steps):
        for step in filter(None, turn):
            spent[step[:3]] = min(step[3], spent.get(step[:3], float("inf")))
    found = []
    for way in WAYS:
        for phase, share in shares(way).items():
            mean = sum(spent[way, phase, i] for i in range(BATCHES)) / BATCHES
            found.append({"way": way, "phase": phase, "share": share, "cpu_seconds": mean})
    return pd.DataFrame(found)


def _timed(
    run: Run, model: nn.Module, batches: list[dict[str, Any]]
) -> Iterator[tuple[str, str, int, float]]:
    """Way, phase, batch and CPU seconds of each step of a run as short as its phases allow.

    A phase sees every batch twice, and the first of them once more before, untimed: masks are taken
    together there.
    """
    way = run.recipe.title
    wanted, steps = list(shares(way)), 2 * len(batches) + 1
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-6, weight_decay=run.training.weight_decay, fused=True,
    )  # fmt: skip
    lengths = {"dense": steps if "dense" in wanted else 0, "finetune": steps}
    recipe = run.recipe.build()
    fields = {key: lengths[key] for key in lengths if key in run.recipe.options}
    recipe = type(recipe)(**{**run.recipe.options, **fields})
    nmflow.attach(
        model, optimizer, recipe, run.pattern, run.include, total_steps=steps * len(wanted),
        freeze_mask=run.freeze_mask, sparse_steps=run.sparse_steps,
    )  # fmt: skip
    for phase in wanted:
        for number in range(steps):
            began = time.process_time()
            optimizer.zero_grad()
            model(**batches[number % len(batches)]).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), run.training.clip)
            optimizer.step()
            if number:
                yield way, phase, number % len(batches), time.process_time() - began


class Clocked:
    """A mixin of `Trainer`: CPU seconds of its steps, and evaluation by length."""

    args: Any

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; the first one starts the clock."""
        if not hasattr(self, "_began"):
            self._began = time.process_time()
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """All steps."""
        found = super().train(*args, **kwargs)  # type: ignore[misc]
        spent = {"cpu_seconds": round(time.process_time() - self._began, 2)}
        write_json(Path(self.args.output_dir) / "cpu.json", spent)
        return found

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Rows in order of their lengths, so that little of a batch is padding."""
        lengths = getattr(eval_dataset, "lengths", None)
        if lengths is not None:
            eval_dataset = Subset(eval_dataset, lengths.argsort(kind="stable").tolist())
        return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]


def _read(each: list[dict[str, Any]], seeds: list[int]) -> experiments.Sweep:
    axes = {"setup": each, "seed": seeds}
    about = "What equal processor time buys, on one thread of a CPU."
    path = write(NAME, about, TASK, {"axes": axes}, script="study/equal_time.py")
    return experiments.load(path)


def run(seconds: float) -> None:
    """Make the runs that are missing, and write the tables after each."""
    began = time.monotonic()
    plan = experiments.load(SWEEPS / f"{NAME}.yaml")
    experiments.prepare(plan)
    for cell in plan.cells:
        folder = RunFolder(plan.store / cell.run.id)
        if folder.finished:
            continue
        if time.monotonic() - began > seconds:
            break
        train(cell.run, folder, None, Clocked)
        _note(plan)
        sys.stdout.write(f"{time.monotonic() - began:6.0f} {cell.run.id}\n")
        sys.stdout.flush()


def _note(plan: experiments.Sweep) -> None:
    write_table(plan)
    spent = [
        {**cell.place, **pd.read_json(path, typ="series").to_dict()}
        for cell in plan.finished
        for path in [plan.store / cell.run.id / "cpu.json"]
        if path.is_file()
    ]
    pd.DataFrame(spent).to_csv(SPENT, index=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("stage", choices=("measure", "run"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "run":
        run(args.seconds)
        return
    COSTS.parent.mkdir(parents=True, exist_ok=True)
    costs = measure()
    costs.to_csv(COSTS, index=False, float_format="%.4f")
    steps = solved(costs)
    _read(setups(steps), SEEDS)
    sys.stdout.write(f"{costs.to_string()}\n{steps}\n")


if __name__ == "__main__":
    main()
