"""A sweep's results as one table: a row a cell, as Parquet and CSV."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from nmflow.experiments.results import RunFolder, write

if TYPE_CHECKING:
    from nmflow.experiments.sweep import Sweep

NAME = "results"


def write_table(sweep: Sweep) -> list[Path]:
    """Write `results.parquet` and `results.csv` over the finished cells; returns the paths.

    Raises:
        ConfigError: a folder that cannot be written.
    """
    frame = table(sweep)
    sink = io.BytesIO()
    frame.to_parquet(sink, index=False)
    places = [sweep.folder / f"{NAME}.parquet", sweep.folder / f"{NAME}.csv"]
    write(places[0], sink.getvalue())
    write(places[1], frame.to_csv(index=False, lineterminator="\n"))
    return places


def table(sweep: Sweep) -> pd.DataFrame:
    """The finished cells in the sweep's order.

    Columns: `cell` (the run's folder), every axis, what the run was, its figures (`test_…`,
    `validation_…`), what it cost (counted FLOPs and bytes, seconds by the clock), and where it came
    from (hashes, versions, device). An axis whose values are of several types is text.
    """
    rows = []
    for cell in sweep.finished:
        result = RunFolder(sweep.store / cell.run.id).result()
        rows.append({"cell": cell.run.id, **cell.place, **row(result)})
    frame = pd.DataFrame(rows)
    for name in sweep.axes:
        values = [cell.place[name] for cell in sweep.finished]
        if len({type(value) for value in values}) > 1:
            frame[name] = [str(value) for value in values]
    return frame


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
