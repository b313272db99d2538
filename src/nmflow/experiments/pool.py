"""Worker processes that train runs in parallel; if one dies, the other runs continue."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nmflow.errors import NMFlowError
from nmflow.experiments import stopping
from nmflow.experiments.config import Run
from nmflow.experiments.recorder import Notify, Progress
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.training import train

log = logging.getLogger("nmflow")

Failure = tuple[str, str]

RETRIES = 1
"""How often a run is retried after its worker was killed; it resumes from its checkpoint."""


class Pool:
    """Workers that train many runs each, since importing takes longer than a small run.

    Each has a pipe to its parent; it ends when the pipe breaks, so also if the parent is killed.

    Args:
        runs: the runs.
        folder: the folder of all runs.
        workers: processes.
        threads: threads of each.
        take: removes the next run from a list of them, and returns it.
        notify: called with the `Progress` of every run, from this process.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        folder: Path,
        workers: int,
        threads: int,
        take: Callable[[list[Run], Path], Run],
        notify: Notify | None,
    ) -> None:
        self.waiting, self.folder, self.take, self.notify = list(runs), folder, take, notify
        self.workers, self.threads = workers, threads
        self.failed: list[Failure] = []
        self.live: dict[Connection, tuple[Any, Run, int]] = {}
        self.killed: dict[str, int] = {}
        self.stopped: BaseException | None = None

    def run(self) -> list[Failure]:
        """Train all runs; returns those that failed, each with its error.

        Raises:
            Stopped: a signal asked to stop; the runs at work have saved a checkpoint.
        """
        try:
            for place in range(self.workers):
                self._start(place)
            while self.live:
                try:
                    self._hear_all()
                except (stopping.Stopped, KeyboardInterrupt) as stopped:
                    if self.stopped is not None:
                        raise
                    self._stop(stopped)
        except BaseException:
            for process, _, _ in self.live.values():
                process.kill()
            raise
        finally:
            for process, _, _ in self.live.values():
                process.join()
        if self.stopped is not None:
            raise self.stopped
        return self.failed

    def _hear_all(self) -> None:
        while self.live:
            for pipe in wait(list(self.live)):
                self._hear(pipe)  # type: ignore[arg-type]

    def _stop(self, stopped: BaseException) -> None:
        self.stopped = stopped
        self.waiting.clear()
        stopping.say()
        for process, _, _ in self.live.values():
            process.terminate()

    def _start(self, place: int) -> None:
        if not self.waiting or self.stopped is not None:
            return
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        work = (theirs, str(self.folder), self.threads, place, self.workers)
        process = context.Process(target=_work, args=work, daemon=True)
        try:
            with _without_interrupts():
                process.start()
        except OSError as error:
            self._not_started(error)
            return
        theirs.close()
        self._give(ours, process, place)

    def _not_started(self, error: OSError) -> None:
        """Leave the runs to the other workers; without any, the runs fail."""
        reason = f"no worker can be started ({error.strerror or error})"
        log.warning("%s: %d are at work", reason, len(self.live))
        if not self.live:
            self.failed += [(run.id, f"run {run.id}: {reason}") for run in self.waiting]
            self.waiting.clear()

    def _give(self, pipe: Connection, process: Any, place: int) -> None:
        run = self.take(self.waiting, self.folder)
        self.live[pipe] = (process, run, place)
        # If the worker is dead already, its pipe ends, which `_hear` handles.
        with contextlib.suppress(OSError):
            pipe.send(run.model_dump_json())

    def _hear(self, pipe: Connection) -> None:
        process, run, place = self.live[pipe]
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            process.join()
            del self.live[pipe]
            if self.stopped is None:
                self._died(run, process.exitcode)
                self._start(place)
            return
        if isinstance(message, Progress):
            if self.notify is not None:
                self.notify(message)
            return
        if message is not None:
            self.failed.append((run.id, message))
        if self.waiting:
            self._give(pipe, process, place)
        else:
            pipe.close()
            process.join()
            del self.live[pipe]

    def _died(self, run: Run, code: int | None) -> None:
        sentence = f"run {run.id} {_death(code)}"
        seen = self.killed[run.id] = self.killed.get(run.id, 0) + 1
        # A run that raised would raise again.
        if code is not None and code < 0 and seen <= RETRIES:
            log.warning("%s: it is tried once more", sentence)
            self.waiting.append(run)
        else:
            again = " again" if seen > 1 else ""
            self.failed.append((run.id, f"{sentence}{again}: start again to continue it"))


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name} (out of memory?)"
    return f"ended with exit code {code} and a traceback above"


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to all."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cores_of(place: int, workers: int, threads: int, cores: Sequence[int]) -> list[int]:
    """The cores of one worker: its own if the workers use all cores, otherwise all cores.

    With cores left over, a second sweep may run, whose workers would take the same ones.
    """
    if workers * threads < len(cores):
        return list(cores)
    return [cores[(place * threads + i) % len(cores)] for i in range(threads)]


def _work(pipe: Connection, folder: str, threads: int, place: int, workers: int) -> None:
    """A worker: trains runs until the pipe closes; sends progress, then None or an error."""
    import torch

    torch.set_num_threads(threads)
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores_of(place, workers, threads, cores))
    with contextlib.suppress(stopping.Stopped, BrokenPipeError), stopping.watched():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the worker
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
            stopping.check()
