"""`nmflow report RUNS`: one page over finished runs, as HTML, Markdown and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders with finished runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder of the report; by default RUNS/report."),
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="The recipe that the others are compared with.")
    ] = "sr-ste",
    time: Annotated[
        bool | None,
        typer.Option(
            "--time/--no-time",
            help="Measure the inference time of each distinct saved network, on this machine; by "
            "default where that takes seconds.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="With --time: examples in a batch; by default 1.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="With --time: threads; by default 1.")
    ] = None,
) -> None:
    """Write report.html, report.md and CSV files over the finished runs in RUNS."""
    from rich.text import Text

    from nmflow.cli._output import console
    from nmflow.errors import ConfigError
    from nmflow.experiments.report import times
    from nmflow.experiments.report.page import write_report
    from nmflow.experiments.run_folder import finished_runs

    for name, value in (("batch", batch), ("threads", threads)):
        if value is not None and not time:
            raise ConfigError(f"{name} is {value} without a measurement: add --time")
    taken, results = None, finished_runs(list(runs))
    if time is None:
        time = not times.read(results).entries and times.quick(results)
    if time:
        batch, threads = batch or 1, threads or 1
        with console(stderr=True).status("measuring inference time") as status:
            problems = times.measure(
                results,
                batch,
                threads,
                progress=lambda what: status.update(Text(f"measuring {what}")),
            )
        taken = times.read(results, (batch, threads))
        taken.problems = problems
    place = write_report(list(runs), output or runs[0] / "report", baseline, taken)
    console().print(f"report: {place}")
