"""Run the study's second part, as far as its tables and the seconds go.

    python study/pretrained_runs.py cola mrpc sst2-minilm --workers 16 --seconds 300

Sweeps of several tasks share the workers; a sweep that is finished is tabled, and the sweeps that
its table allows are written to configs/study and join. Where the seconds end, runs at work are
stopped: the same command goes on. On one GPU, start NVIDIA's MPS before; forward and backward are
CUDA graphs there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from choose import results, write
from pretrained import sweeps
from pretrained_setups import TASKS
from tables import there

from nmflow.experiments import files, sweep_table
from nmflow.experiments import sweep as experiments
from nmflow.experiments.config import Run
from nmflow.experiments.run_folder import RunFolder


def work(todo: Any, done: Any, eager: bool) -> None:
    """A worker: trains the runs that it is given, and says what became of each."""
    import torch
    import widened
    from graphed import Graphed
    from remembered import Remembered

    from nmflow.errors import NMFlowError
    from nmflow.experiments.training import train

    torch.set_num_threads(1)
    mixins: tuple[type, ...] = () if eager else (Graphed,)
    if not torch.cuda.is_available():
        mixins = (Remembered,)
        if widened.slow():
            widened.widen()
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():  # a driver that is killed stops nobody
        try:
            store, text = todo.get(timeout=5.0)
        except queue.Empty:
            continue
        run = Run.model_validate_json(text)
        start = time.monotonic()
        folder = RunFolder(Path(store) / run.id)
        try:
            try:
                train(run, folder, None, *mixins)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if Graphed not in mixins:
                    raise
                sys.stdout.write(f"{run.id} once more with eager steps: {error}\n")
                train(run, folder, None)
            said = f"{time.monotonic() - start:.1f} s"
        except (NMFlowError, RuntimeError) as error:
            said = f"failed: {error}"
        done.put((run.id, said))


class Plan:
    """The sweeps that are known so far, and the runs that wait, in their turns."""

    def __init__(self, tasks: list[str], parts: list[str] | None = None) -> None:
        self.tasks, self.parts = tasks, parts
        self.known: dict[str, tuple[int, experiments.Sweep]] = {}
        self.tabled: set[str] = set()
        self.given: set[str] = set()
        self.failed: set[str] = set()

    def look(self) -> None:
        """Table what is finished, and learn which sweeps that allows."""
        while self._table() or not self.known:
            for task in self.tasks:
                for turn, part, about, axes in sweeps(task):
                    if (name := f"{task}-{part}") not in self.known:
                        self.known[name] = turn, _read(task, part, about, axes)

    def _table(self) -> bool:
        """Write the tables that are due; whether there were any."""
        before = len(self.tabled)
        for name, (_, sweep) in self.known.items():
            if name not in self.tabled and len(made(sweep)) == len(sweep.cells):
                table(sweep)
                self.tabled.add(name)
        return len(self.tabled) > before

    def next(self) -> tuple[str, str] | None:
        """The store and the text of the next run, seeds before setups; None while there is none."""
        for _, sweep in sorted(self.known.values(), key=lambda pair: pair[0]):
            if sweep.name in self.tabled or not self._wanted(sweep.name):
                continue
            ended = made(sweep)
            for run in sorted(sweep.runs, key=lambda one: one.seed):
                if run.id not in self.given and run.id not in ended and _taught(run):
                    self.given.add(run.id)
                    return str(sweep.store), run.model_dump_json()
        return None

    def _wanted(self, name: str) -> bool:
        parts = self.parts
        return parts is None or any(f"-{name}".endswith(f"-{part}") for part in parts)

    def table_what_is_there(self) -> None:
        """Table main runs that lack seeds: a search is tabled whole or not at all."""
        for name, (_, sweep) in self.known.items():
            search = "rates" in name or "options" in name
            if name not in self.tabled and not search and sweep.finished:
                table(sweep)


def made(sweep: experiments.Sweep) -> set[str]:
    """Runs that are finished in their folders, or have a row in the kept table.

    A table outlives the folders: these may be on another machine, or gone. A teacher, whose weights
    others load, must have its folder.
    """
    finished = {cell.run.id for cell in sweep.finished}
    if sweep.name.endswith("teacher") or not there(sweep.name):
        return finished
    return {run.id for run in sweep.runs} & (finished | set(results(sweep.name)["cell"]))


def _taught(run: Run) -> bool:
    """Whether the teacher, if there is one, has been trained."""
    told = run.distill
    return told is None or told.teacher == "self" or any(Path(told.teacher).glob("*/result.json"))


def table(sweep: experiments.Sweep) -> None:
    """Write the table of a sweep; rows whose folders are gone stay as they are."""
    if not sweep.finished:
        return
    before = results(sweep.name) if there(sweep.name) else pd.DataFrame({"cell": []})
    order = {run.id: place for place, run in enumerate(sweep.runs)}
    rows: Any = pd.concat([sweep_table.table(sweep), before], ignore_index=True)
    rows = rows.drop_duplicates("cell")
    rows = rows[rows["cell"].isin(order)].sort_values("cell", key=lambda ids: ids.map(order))
    files.write(sweep.folder / "results.parquet", rows.to_parquet(index=False))
    files.write(sweep.folder / "results.csv", rows.to_csv(index=False, lineterminator="\n"))


def _read(task: str, part: str, about: str, axes: dict[str, Any]) -> experiments.Sweep:
    path = write(f"{task}-{part}", about, task, {"axes": axes}, script="study/pretrained_runs.py")
    if part.endswith("teacher") or part.startswith("general"):  # alone in a folder that others name
        text = path.read_text("utf-8").replace(f"study-{task}/cells", f"study-{task}/{part}")
        path.write_text(text, "utf-8")
    sweep = experiments.load(path)
    experiments.prepare(sweep)
    return sweep


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--parts",
        nargs="+",
        help="these alone, such as main-1-16 or cola-main-1-16; all by default",
    )
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    args = parser.parse_args()
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    workers = [
        context.Process(target=work, args=(todo, done, args.eager), daemon=True)
        for _ in range(args.workers)
    ]
    for one in workers:
        one.start()
    plan, busy, failed = Plan(args.tasks, args.parts), 0, 0
    plan.look()
    while time.monotonic() - start < args.seconds and any(one.is_alive() for one in workers):
        # Some wait in the queue, so that no worker does.
        while busy < args.workers + args.workers // 4 and (item := plan.next()) is not None:
            todo.put(item)
            busy += 1
        if not busy:
            break
        try:
            name, said = done.get(timeout=1.0)
        except queue.Empty:
            continue
        busy -= 1
        failed += said.startswith("failed")
        sys.stdout.write(f"{time.monotonic() - start:6.1f} {name} {said}\n")
        sys.stdout.flush()
        plan.look()
    for one in workers:
        one.terminate()
    plan.table_what_is_there()
    waiting = [name for name in plan.known if not there(name)]
    sys.stdout.write(f"{failed} runs failed; without a table: {', '.join(waiting) or 'none'}\n")


if __name__ == "__main__":
    main()
