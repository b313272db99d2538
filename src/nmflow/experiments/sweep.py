"""Sweeps: train the unfinished cells, then write a table of all finished ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from nmflow.errors import ConfigError
from nmflow.experiments.cells import Cell, Sweep, load
from nmflow.experiments.config import Run
from nmflow.experiments.files import check_writable, write_json
from nmflow.experiments.run_folder import SWEEP, RunFolder
from nmflow.experiments.sweep_table import write_table

if TYPE_CHECKING:
    from nmflow.experiments.pool import Failure
    from nmflow.experiments.recorder import Notify

__all__ = ["BACKENDS", "Backend", "Cell", "Sweep", "load", "prepare", "run"]

Backend = Literal["processes", "ray"]
BACKENDS: tuple[Backend, ...] = ("processes", "ray")


def run(
    sweep: Sweep,
    *,
    backend: Backend = "processes",
    workers: int | None = None,
    notify: Notify | None = None,
) -> list[Failure]:
    """Train the unfinished cells, then write the table of all finished ones.

    Args:
        sweep: the sweep.
        backend: `"processes"` on this machine, pinned to its cores, or `"ray"`.
        workers: cells that train at a time; 0 lets the backend choose, None takes the sweep's.
        notify: called with the `Progress` of every cell.

    Returns:
        The id of every run that failed, with its sentence.

    Raises:
        ConfigError: the backend is unknown or not installed, a folder cannot be written, or a
            network lacks a field. No cell has started then.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}: choose from {', '.join(BACKENDS)}")
    _check_networks(sweep.runs)
    if first := os.environ.get("RANK", "0") == "0":  # under torchrun one process writes
        prepare(sweep)
    many = sweep.workers if workers is None else workers
    try:
        if backend == "ray":
            from nmflow.experiments.ray_backend import run_on_ray

            return run_on_ray(sweep.runs, sweep.store, many, sweep.threads, notify)
        from nmflow.experiments.runner import run_all

        return run_all(sweep.runs, sweep.store, many, sweep.threads, notify)
    finally:
        if first and sweep.finished:
            with RunFolder(sweep.folder).lock():
                write_table(sweep)


def prepare(sweep: Sweep) -> None:
    """Check that both folders can be written, and list the cells for reports."""
    for folder in (sweep.store, sweep.folder):
        check_writable(folder)
    listed = [{"id": c.run.id, "config_hash": c.run.hash, **c.place} for c in sweep.cells]
    store = os.path.relpath(
        sweep.store, sweep.folder
    )  # relative, so that both can be moved together
    with (place := RunFolder(sweep.folder)).lock():
        place.tidy()
        write_json(sweep.folder / SWEEP, {"name": sweep.name, "cells_in": store, "cells": listed})


def _check_networks(runs: Sequence[Run]) -> None:
    from nmflow.experiments import models

    kinds: dict[str, dict[str, Any]] = {}
    for one in runs:
        if one.model.load is None:
            kinds.setdefault(str(one.model.kind), {}).update(one.model.fields)
    for kind, fields in kinds.items():
        models.check_fields(kind, fields)
