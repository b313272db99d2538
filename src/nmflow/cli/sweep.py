"""`nmflow sweep FILE`: recipes × patterns × placements × seeds × any key, cell by cell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nmflow.cli._catalog import list_option


def sweep(
    file: Annotated[Path, typer.Argument(help="A YAML file, or a name such as demo.")],
    output: Annotated[Path | None, typer.Option(help="The folder of the results.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Cells at work at a time; 0 chooses.")
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
) -> None:
    """Train every cell of FILE that is not finished; a killed sweep goes on where it was."""
    from rich.console import Console

    from nmflow.cli._progress import Watcher
    from nmflow.errors import NMFlowError
    from nmflow.experiments import sweep as sweeps

    found = sweeps.load(file, set_ or (), output)
    # Under torchrun only the first process speaks.
    console = Console(soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")
    done = len(found.finished)
    known = f", {done} are finished" if done else ""
    console.print(f"{len(found.cells)} cells into {found.store}{known}", soft_wrap=True)
    with Watcher(found.runs, found.store, console) as watcher:
        failed = sweeps.run(found, backend, workers, watcher.notify)  # type: ignore[arg-type]
    for _, sentence in failed[1:]:
        console.print(f"failed: {sentence}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        others = f" ({len(failed)} of {len(found.cells)} cells failed)" if len(failed) > 1 else ""
        raise NMFlowError(failed[0][1] + others)
    console.print(
        f"all {len(found.cells)} cells are finished: {found.folder / 'results.csv'} and .parquet; "
        f"now: nmflow report {found.folder}",
        soft_wrap=True,
    )
