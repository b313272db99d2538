"""`nmflow audit CHECKPOINT`: which weights hold their pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmflow.cli._output import JSON, show


def audit(
    checkpoint: Annotated[Path, typer.Argument(help="A safetensors file or a model's folder.")],
    pattern: Annotated[
        str,
        typer.Option(
            help="N:M with N kept of every M, such as 1:16. Without it, audit judges the weights "
            "that the run recorded; without a record, it shows the pattern of each.",
            show_default=False,
        ),
    ] = "",
    include: Annotated[
        str,
        typer.Option(
            help="Presets or globs of the weights, separated by commas; by default those that the "
            "run pruned, else all.",
            show_default=False,
        ),
    ] = "",
    exclude: Annotated[str, typer.Option(help="Presets or globs to leave out.")] = "",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print every weight of CHECKPOINT with its density; exit code 1 if one breaks its pattern."""
    import nmflow
    from nmflow.cli._errors import globs

    found = nmflow.audit(checkpoint, pattern or None, globs(include) or None, globs(exclude))
    show(found, as_json)
    if not found.ok:
        raise typer.Exit(1)
