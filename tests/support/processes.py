"""Processes that are forked from a server, which has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import start_processes

multiprocessing.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "nmflow.experiments.training",
        "nmflow.experiments.tasks",
    ]
)
FORKS = multiprocessing.get_context("forkserver")


def launch(process: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Run `process(rank, *args)` once for each rank, and raise what one of them raised."""
    start_processes(process, args=args, nprocs=world, start_method="forkserver")


def context(kind: str) -> Any:
    """In place of `multiprocessing.get_context`: processes start at once, whatever the kind."""
    return FORKS
