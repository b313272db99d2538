"""A sweep's results as a table with a row per cell, and tables of measurements during training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from nmflow.experiments.files import write
from nmflow.experiments.run_folder import RunFolder

if TYPE_CHECKING:
    from nmflow.experiments.cells import Sweep

NAME = "results"
ALONG = ("tracked", "noise")
"""Lists in a result that become tables of their own, with a row per measurement."""


def write_table(sweep: Sweep) -> list[Path]:
    """Write `results.parquet` and `results.csv` over the finished cells; returns the paths.

    If cells tracked gradients or measured their noise, `tracked.parquet` and `noise.parquet` hold
    the rows of all of them.

    Raises:
        ConfigError: a folder that cannot be written.
    """
    frame = table(sweep)
    places = [sweep.folder / f"{NAME}.parquet", sweep.folder / f"{NAME}.csv"]
    write(places[0], _parquet(frame))
    write(places[1], frame.to_csv(index=False, lineterminator="\n"))
    for kind in ALONG:
        rows = along(sweep, kind)
        if len(rows):
            places.append(sweep.folder / f"{kind}.parquet")
            write(places[-1], _parquet(rows))
    return places


def along(sweep: Sweep, kind: str) -> pd.DataFrame:
    """What the finished cells measured during training: a row per cell and step.

    Args:
        sweep: the sweep.
        kind: `"tracked"` (of `training.track_every`) or `"noise"` (of `training.noise_batches`).
    """
    return _with_axes(
        sweep,
        [
            {"cell": cell.run.id, **cell.place, "recipe": result["recipe"], **measured}
            for cell in sweep.finished
            for result in [RunFolder(sweep.store / cell.run.id).result()]
            for measured in result[kind]
        ],
    )


def table(sweep: Sweep) -> pd.DataFrame:
    """The finished cells in the sweep's order.

    Columns: `cell` (the run's folder), every axis, what the run was, its figures (`test_…`,
    `validation_…`), what it cost (counted FLOPs and bytes, seconds by the clock), and where it came
    from (hashes, versions, device). `resumed_at` has the steps of the checkpoints that a stopped
    run resumed from, as one text; it is empty for most. An axis with values of several types is
    text.
    """
    return _with_axes(sweep, records(sweep))


def records(sweep: Sweep) -> list[dict[str, Any]]:
    """The rows of `table`, as plain values."""
    rows = []
    for cell in sweep.finished:
        result = RunFolder(sweep.store / cell.run.id).result()
        rows.append({"cell": cell.run.id, **cell.place, **row(result)})
    return rows


def _with_axes(sweep: Sweep, rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    for name in sweep.axes:
        if len(frame) and len({type(cell.place[name]) for cell in sweep.finished}) > 1:
            frame[name] = [str(value) for value in frame[name]]
    return frame


def _parquet(frame: pd.DataFrame) -> bytes:
    sink = io.BytesIO()
    frame.to_parquet(sink, index=False)
    return sink.getvalue()


def row(result: dict[str, Any]) -> dict[str, Any]:
    """A finished run as one row of plain values."""
    run, cost, machine = result["run"], result["cost"], result["machine"]
    include = run["include"]
    return {
        "recipe": result["recipe"],
        "pattern": result["pattern"],
        "include": include if isinstance(include, str) else ", ".join(include),
        "seed": result["seed"],
        "steps": run["training"]["steps"],
        "budget": run["training"].get("budget"),
        **{f"test_{name}": value for name, value in result["test"].items()},
        **{f"validation_{name}": value for name, value in result["validation"].items()},
        "audit_ok": result["audit"]["ok"],
        "parameters": cost["parameters"],
        "parameters_kept": cost["remaining"],
        "inference_flops": cost["flops"],
        "dense_inference_flops": cost["dense_flops"],
        "training_flops": cost["run_training_flops"],
        "dense_training_flops": cost["run_dense_training_flops"],
        "bytes": cost["bytes"],
        "index_bytes": cost["index_bytes"],
        "dense_bytes": cost["dense_bytes"],
        "train_seconds": result["train_seconds"],
        "resumed_at": " ".join(map(str, result["resumed_at"])),
        "config_hash": result["config_hash"],
        "setting_hash": result["setting_hash"],
        "data_sha256": result["data"]["sha256"],
        "initial_sha256": result["initial_sha256"],
        "final_sha256": result["final_sha256"],
        "device": machine["device"],
        "threads": machine["threads"],
        "processes": machine["processes"],
        **{f"version_{name}": value for name, value in result["versions"].items()},
    }
