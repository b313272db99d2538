"""`nmflow report RUNS`: one page over finished runs, as HTML, Markdown and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders with finished runs.")],
    output: Annotated[
        Path | None, typer.Option(help="The folder of the report; by default RUNS/report.")
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="The recipe that the others are compared with.")
    ] = "sr-ste",
) -> None:
    """Write report.html, report.md and CSV files over the finished runs in RUNS."""
    from rich.console import Console

    from nmflow.experiments.report import write_report

    place = write_report(list(runs), output or runs[0] / "report", baseline)
    Console().print(f"report: {place}", soft_wrap=True)
