"""Many runs on one machine: worker processes side by side, each on cores of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nmflow.errors import NMFlowError
from nmflow.experiments.config import Run
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.training import Progress, train

Failure = tuple[str, str]


def run_all(
    runs: Sequence[Run],
    folder: Path,
    workers: int = 0,
    threads: int = 0,
    notify: Callable[[Progress], None] | None = None,
) -> list[Failure]:
    """Train what is not finished; a run that fails does not keep the others from running.

    Args:
        runs: the runs; each has a folder of its own, `folder / run.id`.
        folder: the folder of all runs.
        workers: processes; 0 takes one a core, and one in all on a GPU or under torchrun.
        threads: threads of each; 0 divides the cores among the workers.
        notify: called with the `Progress` of every run, from this process.

    Returns:
        The id of every run that failed, with its sentence.
    """
    pending = [run for run in runs if not RunFolder(folder / run.id).finished]
    workers, threads = share(len(pending), workers, threads)
    if workers <= 1:
        return _here(pending, folder, threads, notify)
    return _Pool(pending, folder, workers, threads, notify).run()


def take(waiting: list[Run], folder: Path) -> Run:
    """Remove the next run and return it: the first that no other process is at work on.

    Another sweep may be; where all are taken it is the first, which is then waited for.
    """
    free = 0
    # All processes of torchrun have to take the same run, and one of them holds it.
    if "RANK" not in os.environ:
        places = (n for n, run in enumerate(waiting) if not RunFolder(folder / run.id).busy)
        free = next(places, 0)
    return waiting.pop(free)


def share(runs: int, workers: int, threads: int) -> tuple[int, int]:
    """Workers and threads of each, for as many runs on the cores that this process may use.

    `OMP_NUM_THREADS` bounds the threads that nobody asked for, as it does everywhere in torch: two
    commands side by side, each on one thread, must not spin on each other's cores.
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


def _here(
    runs: Sequence[Run], folder: Path, threads: int, notify: Callable[[Progress], None] | None
) -> list[Failure]:
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
    finally:
        torch.set_num_threads(before)
    return failed


class _Pool:
    """Worker processes that live through many runs, since importing takes longer than a small one.

    Each talks over a pipe: a worker whose parent was killed finds it broken and ends.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        folder: Path,
        workers: int,
        threads: int,
        notify: Callable[[Progress], None] | None,
    ) -> None:
        self.waiting, self.folder, self.notify = list(runs), folder, notify
        self.workers, self.threads = workers, threads
        self.failed: list[Failure] = []
        self.live: dict[Connection, tuple[Any, Run, int]] = {}

    def run(self) -> list[Failure]:
        try:
            for place in range(self.workers):
                self._start(place)
            while self.live:
                for pipe in wait(list(self.live)):
                    self._hear(pipe)  # type: ignore[arg-type]
        finally:
            for process, _, _ in self.live.values():
                process.terminate()
            for process, _, _ in self.live.values():
                process.join()
        return self.failed

    def _start(self, place: int) -> None:
        if not self.waiting:
            return
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        work = (theirs, str(self.folder), self.threads, place, self.workers)
        process = context.Process(target=_work, args=work, daemon=True)
        process.start()
        theirs.close()
        run = take(self.waiting, self.folder)
        ours.send(run.model_dump_json())
        self.live[ours] = (process, run, place)

    def _hear(self, pipe: Connection) -> None:
        process, run, place = self.live[pipe]
        try:
            message = pipe.recv()
        except EOFError:
            process.join()
            del self.live[pipe]
            self.failed.append((run.id, f"run {run.id} {_death(process.exitcode)}"))
            self._start(place)
            return
        if isinstance(message, Progress):
            if self.notify is not None:
                self.notify(message)
            return
        if message is not None:
            self.failed.append((run.id, message))
        if self.waiting:
            run = take(self.waiting, self.folder)
            pipe.send(run.model_dump_json())
            self.live[pipe] = (process, run, place)
        else:
            pipe.close()
            process.join()
            del self.live[pipe]


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name} (out of memory?): start again, and it goes on"
    return f"ended with exit code {code} and a traceback above: start again, and it goes on"


def cores_of(place: int, workers: int, threads: int, cores: Sequence[int]) -> list[int]:
    """The cores of one worker: its own where the workers take all, else any of them.

    Where some are left, another sweep may be at work, whose workers would take the same.
    """
    if workers * threads < len(cores):
        return list(cores)
    return [cores[(place * threads + i) % len(cores)] for i in range(threads)]


def _work(pipe: Connection, folder: str, threads: int, place: int, workers: int) -> None:
    """A worker: takes runs until the pipe closes; sends progress, then None or a sentence."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us; one traceback is enough
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores_of(place, workers, threads, cores))
    while True:
        try:
            run = Run.model_validate_json(pipe.recv())
        except EOFError:
            return
        try:
            train(run, RunFolder(Path(folder) / run.id), pipe.send)
            pipe.send(None)
        except NMFlowError as error:
            pipe.send(str(error))
        except BrokenPipeError:
            return
