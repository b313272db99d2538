"""Page b's second part: what the same processor time buys, with steps on kept places.

    python study/equal_time.py measure [--more]            # CPU seconds of a step; writes the sweep
    python study/equal_time.py run [--more] [--seconds S]  # the runs that are missing, in order

A step's seconds are measured on the same batches for every phase of every way, with one thread. The
steps of a run are those that its way makes in the time of `DENSE_STEPS` dense ones. `--more` takes
the ways that were added later.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from choose import SEEDS, SWEEPS, write
from equal_time_ways import (
    COSTS,
    MORE,
    MORE_NAME,
    NAME,
    ORDERED,
    ORDERS,
    SPENT,
    TASK,
    WAYS,
    Way,
    setups,
    shares,
    shortest,
    solved,
)
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
from nmflow.permute import permute_hidden

BATCHES = 8
"""Batches of a measurement, the first ones of the tuning seed."""


def measure(name: str, ways: Mapping[str, Way]) -> pd.DataFrame:
    """CPU seconds of a step, phase by phase: the mean over batches of the better of two tries.

    The ways take turns, step by step, so that a slow moment meets all of them.
    """
    timed = {title: way for title, way in ways.items() if not way.like}
    fake = setups(timed, dict.fromkeys(timed, 3 * BATCHES))
    runs = _read(name, fake, [100]).runs
    problem = tasks.build(runs[0])
    order = list(ByLength(problem.train.lengths, runs[0].training.batch_size, 100))
    size = runs[0].training.batch_size
    rows = range(0, BATCHES * size, size)
    data: Any = problem.train
    batches = [problem.collate([data[i] for i in order[at : at + size]]) for at in rows]
    torch.manual_seed(100)
    steps = [
        _timed(title, way, run, problem.model().train(), batches)
        for (title, way), run in zip(timed.items(), runs, strict=True)
    ]
    spent: dict[tuple[str, str, int], float] = {}
    for turn in itertools.zip_longest(*steps):
        for step in filter(None, turn):
            spent[step[:3]] = min(step[3], spent.get(step[:3], float("inf")))
    found = []
    for title, way in timed.items():
        for phase, share in shares(way).items():
            mean = sum(spent[title, phase, i] for i in range(BATCHES)) / BATCHES
            found.append({"way": title, "phase": phase, "share": share, "cpu_seconds": mean})
    return pd.DataFrame(found)


def _timed(
    title: str, way: Way, run: Run, model: nn.Module, batches: list[dict[str, Any]]
) -> Iterator[tuple[str, str, int, float]]:
    """Way, phase, batch and CPU seconds of each step of a run as short as its phases allow.

    A phase sees every batch twice, and the first of them once more before, untimed: masks are taken
    together there.
    """
    least = 2 * len(batches) + 1
    recipe, order = shortest(way, least)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-6, weight_decay=run.training.weight_decay, fused=True,
    )  # fmt: skip
    nmflow.attach(
        model, optimizer, recipe, run.pattern, run.include, total_steps=len(order),
        freeze_mask=run.freeze_mask, sparse_steps=run.sparse_steps,
    )  # fmt: skip
    seen: Counter[str] = Counter()
    for phase in order:
        began = time.process_time()
        optimizer.zero_grad()
        model(**batches[seen[phase] % len(batches)]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.training.clip)
        optimizer.step()
        seconds = time.process_time() - began
        if 0 < seen[phase] < least:
            yield title, phase, seen[phase] % len(batches), seconds
        seen[phase] += 1


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


def _read(name: str, each: list[dict[str, Any]], seeds: list[int]) -> experiments.Sweep:
    axes = {"setup": each, "seed": seeds}
    about = "What equal processor time buys, on one thread of a CPU."
    path = write(name, about, TASK, {"axes": axes}, script="study/equal_time.py")
    return experiments.load(path)


def order_seconds() -> float:
    """CPU seconds that it takes to put the hidden units in order, the better of two tries."""
    sweep = experiments.load(SWEEPS / f"{MORE_NAME}.yaml")
    one = next(run for run in sweep.runs if run.permute)
    problem, spent = tasks.build(one), []
    for _ in range(2):
        model = problem.model()
        began = time.process_time()
        permute_hidden(model, problem.example, one.pattern, one.include, one.exclude)
        spent.append(time.process_time() - began)
    return min(spent)


def plan(name: str, costs: pd.DataFrame) -> experiments.Sweep:
    """The sweep's file, from what was measured."""
    if name == NAME:
        return _read(name, setups(WAYS, solved(costs)), SEEDS)
    first = experiments.load(SWEEPS / f"{NAME}.yaml")
    steps = {run.recipe.title: run.training.steps for run in first.runs} | solved(costs)
    added = {title: way for title, way in MORE.items() if title not in WAYS}
    return _read(name, setups(added, steps), SEEDS)


def run(name: str, seconds: float) -> None:
    """Make the runs that are missing, and write the tables after each."""
    began = time.monotonic()
    sweep = experiments.load(SWEEPS / f"{name}.yaml")
    experiments.prepare(sweep)
    for cell in sweep.cells:
        folder = RunFolder(sweep.store / cell.run.id)
        if folder.finished:
            continue
        if time.monotonic() - began > seconds:
            break
        train(cell.run, folder, None, Clocked)
        _note(name, sweep)
        sys.stdout.write(f"{time.monotonic() - began:6.0f} {cell.run.id}\n")
        sys.stdout.flush()


def _note(name: str, sweep: experiments.Sweep) -> None:
    write_table(sweep)
    spent = [
        {**cell.place, **pd.read_json(path, typ="series").to_dict()}
        for cell in sweep.finished
        for path in [sweep.store / cell.run.id / "cpu.json"]
        if path.is_file()
    ]
    pd.DataFrame(spent).to_csv(SPENT[name], index=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("stage", choices=("measure", "run"))
    parser.add_argument("--more", action="store_true", help="the ways that were added later")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    name, ways = (MORE_NAME, MORE) if args.more else (NAME, WAYS)
    if args.stage == "run":
        run(name, args.seconds)
        return
    costs = measure(name, ways)
    COSTS[name].parent.mkdir(parents=True, exist_ok=True)
    costs.to_csv(COSTS[name], index=False, float_format="%.4f")
    plan(name, costs)
    if args.more:
        orders = pd.DataFrame([{"way": ORDERED, "cpu_seconds": order_seconds()}])
        orders.to_csv(ORDERS[name], index=False)
    sys.stdout.write(f"{costs.to_string()}\n{solved(costs)}\n")


if __name__ == "__main__":
    main()
