"""Many runs on one machine, in worker processes with their own cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nmflow.errors import NMFlowError
from nmflow.experiments import stopping
from nmflow.experiments.config import Run
from nmflow.experiments.pool import Failure, Pool
from nmflow.experiments.recorder import Notify
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.training import train


def run_all(
    runs: Sequence[Run],
    folder: Path,
    workers: int = 0,
    threads: int = 0,
    notify: Notify | None = None,
) -> list[Failure]:
    """Train the unfinished runs; if one fails, the others still run.

    Args:
        runs: the runs; each has a folder of its own, `folder / run.id`.
        folder: the folder of all runs.
        workers: processes; 0 takes one per core, or a single one on a GPU or under torchrun.
        threads: threads of each; 0 divides the cores among the workers.
        notify: called with the `Progress` of every run, from this process.

    Returns:
        The id of every run that failed, with its sentence.

    Raises:
        Stopped: under `stopping.watched()`, a signal; runs in training have saved a checkpoint.
    """
    pending = unfinished(runs, folder)
    workers, threads = share(len(pending), workers, threads)
    if workers <= 1:
        return _here(pending, folder, threads, notify)
    return Pool(pending, folder, workers, threads, take, notify).run()


def unfinished(runs: Sequence[Run], folder: Path) -> list[Run]:
    """The runs without a result. Leftovers of killed writers in the others are removed."""
    places = {run.id: RunFolder(folder / run.id) for run in runs}
    done = {name for name, place in places.items() if place.finished}
    if os.environ.get("RANK", "0") == "0":
        for name in done:
            places[name].tidy_if_free()
    return [run for run in runs if run.id not in done]


def take(waiting: list[Run], folder: Path) -> Run:
    """Remove the next run from the list and return it: the first that no other process trains.

    Another sweep may train some. If all are taken, it is the first, whose lock is then waited for.
    """
    free = 0
    # All processes of torchrun must take the same run, which one of them holds.
    if "RANK" not in os.environ:
        places = (n for n, run in enumerate(waiting) if not RunFolder(folder / run.id).busy)
        free = next(places, 0)
    return waiting.pop(free)


def share(runs: int, workers: int, threads: int) -> tuple[int, int]:
    """The number of workers, and of threads in each, for the cores that this process may use.

    `OMP_NUM_THREADS` limits the default number of threads, as everywhere in torch, so that two
    commands with one thread each do not compete for cores.
    """
    import torch

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    alone = torch.cuda.is_available() or "RANK" in os.environ
    workers = workers or (1 if alone else cores)
    workers = max(1, min(workers, runs))
    wish = os.environ.get("OMP_NUM_THREADS", "")
    most = int(wish) if wish.isdecimal() and int(wish) else cores
    return workers, threads or max(1, min(cores // workers, most))


def _here(runs: Sequence[Run], folder: Path, threads: int, notify: Notify | None) -> list[Failure]:
    import torch

    before, failed = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        waiting = list(runs)
        while waiting:
            run = take(waiting, folder)
            try:
                train(run, RunFolder(folder / run.id), notify)
            except NMFlowError as error:
                failed.append((run.id, str(error)))
            stopping.check(f"after {run.id}")
    finally:
        torch.set_num_threads(before)
    return failed
