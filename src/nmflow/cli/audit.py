"""`nmflow audit CHECKPOINT PATTERN`: which weights hold the pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def audit(
    checkpoint: Annotated[Path, typer.Argument(help="A safetensors file or a model's folder.")],
    pattern: Annotated[str, typer.Argument(help="N:M with N kept of every M, such as 1:16.")],
    include: Annotated[
        str, typer.Option(help="Presets or globs of the weights, separated by commas.")
    ] = "all",
    exclude: Annotated[str, typer.Option(help="Presets or globs to leave out.")] = "",
) -> None:
    """Print every weight of CHECKPOINT with its density; exit code 1 unless all hold PATTERN."""
    from rich.console import Console

    import nmflow
    from nmflow.cli._errors import globs

    found = nmflow.audit(checkpoint, pattern, globs(include), globs(exclude))
    Console().print(str(found), soft_wrap=True, markup=False, highlight=False)
    if not found.ok:
        raise typer.Exit(1)
