"""Many runs on a Ray cluster: one task per run, in folders on shared storage."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmflow.errors import ConfigError, NMFlowError
from nmflow.experiments.config import Run
from nmflow.experiments.pool import Failure
from nmflow.experiments.recorder import Notify, Progress
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.runner import take, unfinished
from nmflow.experiments.training import train

RETRIES = 2  # of a run whose machine or process is lost; it resumes from its checkpoint


def run_on_ray(
    runs: Sequence[Run],
    folder: Path,
    workers: int = 0,
    threads: int = 0,
    notify: Notify | None = None,
) -> list[Failure]:
    """Train the unfinished runs as tasks of Ray; arguments and result are those of `run_all`.

    Ray connects to the cluster at `RAY_ADDRESS` or on this machine, or starts a local one. A task
    takes `threads` CPUs (0 takes one), and a GPU if the cluster has some and the run may use it.

    Raises:
        ConfigError: Ray is not installed.
    """
    ray = _ray()
    queues = importlib.import_module("ray.util.queue")
    waiting = unfinished(runs, folder)
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    failed: list[Failure] = []
    live: dict[Any, Run] = {}
    queue = queues.Queue(actor_options={"num_cpus": 0})
    task = ray.remote(max_retries=RETRIES)(_cell)
    gpus = bool(ray.cluster_resources().get("GPU"))
    cpus = threads or 1
    try:
        while waiting or live:
            while waiting and (not workers or len(live) < workers):
                run = take(waiting, folder)
                needs = {"num_cpus": cpus, "num_gpus": int(gpus and run.training.device == "auto")}
                where = (str(folder.resolve()), str(Path.cwd()))
                live[task.options(**needs).remote(run.model_dump_json(), *where, cpus, queue)] = run
            done, _ = ray.wait(list(live), timeout=0.5)
            _pass_on(queue, notify)
            for reference in done:
                run = live.pop(reference)
                try:
                    sentence = ray.get(reference)
                except ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[-1]
                    sentence = f"run {run.id} failed on Ray ({reason}): start again to continue it"
                if sentence is not None:
                    failed.append((run.id, sentence))
        _pass_on(queue, notify)
    finally:
        for reference in live:
            ray.cancel(reference, force=True)
        queue.shutdown(force=True)
        if ours:
            ray.shutdown()
    return failed


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError:
        raise ConfigError(
            "backend is 'ray': the package is not installed; install it with "
            "pip install 'nmflow[experiments,ray]'"
        ) from None


def _pass_on(queue: Any, notify: Notify | None) -> None:
    for now in queue.get_nowait_batch(queue.qsize()):
        if notify is not None:
            notify(Progress(*now))


def _cell(text: str, folder: str, cwd: str, threads: int, queue: Any) -> str | None:
    """Train one run on a machine of the cluster; returns None, or its error."""
    import torch

    os.chdir(cwd)  # the data's paths are relative to the folder in which the sweep started
    torch.set_num_threads(threads)
    run = Run.model_validate_json(text)
    try:
        train(run, RunFolder(Path(folder) / run.id), lambda now: queue.put(tuple(now)))
    except NMFlowError as error:
        return str(error)
    return None
