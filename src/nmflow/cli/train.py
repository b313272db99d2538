"""`nmflow train CONFIG`: every recipe and seed of a file, with progress; finished runs are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from nmflow.cli._catalog import list_option


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, or a name such as demo.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder of the runs.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes side by side; 0 chooses.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: training.steps=100."),
    ] = None,
    list_: Annotated[bool, list_option("")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Try the whole path: two steps, no network needed.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only what goes wrong.")
    ] = False,
) -> None:
    """Train every recipe and seed of CONFIG; repeat the command to continue a stopped run.

    Ctrl-C and SIGTERM save a checkpoint at the next step; a second one stops at once.
    """
    from nmflow.cli._output import console
    from nmflow.cli._progress import stopping_soon, watcher
    from nmflow.errors import NMFlowError
    from nmflow.experiments import config as configs
    from nmflow.experiments import origins, stopping
    from nmflow.experiments.files import check_writable
    from nmflow.experiments.run_folder import RunFolder

    experiment = configs.load(config, set_)
    if smoke:
        return _smoke(experiment, output, quiet)
    runs = list(experiment.runs())
    folder = output or experiment.folder
    done = sum(RunFolder(folder / run.id).finished for run in runs)
    # Under torchrun only the first process prints and writes.
    first = os.environ.get("RANK", "0") == "0"
    if first:
        check_writable(folder)
    out = console(quiet=quiet or not first)
    out.print(f"{len(runs)} runs into {folder}" + (f", {done} are finished" if done else ""))
    for line in origins.told(runs):
        out.print(line)
    with stopping.watched(stopping_soon):
        # Imported late, since torch and transformers take seconds.
        from nmflow.experiments.runner import run_all

        many = experiment.workers if workers is None else workers
        with watcher(runs, folder, out) as watching:
            failed = run_all(runs, folder, many, experiment.threads, watching.notify)
    for _, sentence in failed[1:]:
        out.print(f"failed: {sentence}")
    if failed:
        others = f" ({len(failed)} of {len(runs)} runs failed)" if len(failed) > 1 else ""
        raise NMFlowError(failed[0][1] + others)
    out.print(f"all {len(runs)} runs are finished; now: nmflow report {folder}")


def _smoke(experiment: Any, output: Path | None, quiet: bool) -> None:
    from nmflow.cli._output import console
    from nmflow.experiments.smoke import folder_of, smoke

    out = console(quiet=quiet)
    folder = folder_of(experiment, output)
    result = smoke(experiment, folder)
    about, cost = result["smoke"], result["cost"]
    for sentence in about["instead"]:
        out.print(f"instead: {sentence}")
    out.print(
        f"{experiment.name}: {cost['parameters']:,} parameters, {len(result['audit']['rows'])} "
        f"weights hold {result['pattern']} in memory and on disk; {about['seconds']} s, "
        f"{about['peak_bytes'] / 2**30:.1f} GiB at most; {folder}",
    )
