"""Options of `nmflow` itself: its help and `--version`."""

from __future__ import annotations

from typing import Annotated

import typer


def _say(asked: bool) -> None:
    if asked:
        from nmflow.version import __version__

        typer.echo(f"nmflow {__version__}")
        raise typer.Exit


def start(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Train networks to N:M structured sparsity; N is the number of weights kept of every M."""
