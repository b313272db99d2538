"""`nmflow sweep FILE`: recipes × patterns × placements × seeds × any key, cell by cell."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from nmflow.cli._catalog import list_option


def sweep(
    file: Annotated[Path, typer.Argument(help="A YAML file, or a name such as demo.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder of the results.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Cells that run at the same time; 0 chooses.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key: axes.seed=[0], training.steps=9."
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="'processes' on this machine, or 'ray' on a cluster.")
    ] = "processes",
    list_: Annotated[bool, list_option("sweeps")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only what goes wrong.")
    ] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the table as JSON; the rest to standard error.")
    ] = False,
) -> None:
    """Train every cell of FILE that is not finished; repeat the command to continue a sweep.

    Ctrl-C and SIGTERM save a checkpoint of each cell at its next step; a second one stops at once.
    """
    from nmflow.cli._output import console
    from nmflow.cli._progress import stopping_soon, watcher
    from nmflow.errors import NMFlowError
    from nmflow.experiments import origins, stopping
    from nmflow.experiments import sweep as sweeps

    found = sweeps.load(file, set_ or (), output=output)
    # Under torchrun only the first process prints.
    first = os.environ.get("RANK", "0") == "0"
    out = console(json_, quiet or not first)
    done = len(found.finished)
    known = f", {done} are finished" if done else ""
    out.print(f"{len(found.cells)} cells into {found.store}{known}")
    for line in origins.told(found.runs):
        out.print(line)
    watching = watcher(found.runs, found.store, out)
    with stopping.watched(stopping_soon), watching:
        failed = sweeps.run(found, backend=backend, workers=workers, notify=watching.notify)  # type: ignore[arg-type]
    if json_ and first:
        typer.echo(_as_json(found, failed))
    for _, sentence in failed[1:]:
        out.print(f"failed: {sentence}")
    if failed:
        others = f" ({len(failed)} of {len(found.cells)} cells failed)" if len(failed) > 1 else ""
        raise NMFlowError(failed[0][1] + others)
    out.print(
        f"all {len(found.cells)} cells are finished: {found.folder / 'results.csv'} and .parquet; "
        f"now: nmflow report {found.folder}",
    )


def _as_json(found: Any, failed: list[tuple[str, str]]) -> str:
    """The rows of the table, and the error of each failed cell."""
    from nmflow.experiments.sweep_table import records

    said = [{"cell": cell, "error": sentence} for cell, sentence in failed]
    return json.dumps({"cells": records(found), "failed": said}, indent=1, allow_nan=False)
