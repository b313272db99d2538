"""The option `--list` of commands that take a configuration by name."""

from __future__ import annotations

from typing import Any

import typer


def list_option(kind: str) -> Any:
    """An option that prints the catalog's names of `kind` and ends the command."""

    def show(asked: bool) -> None:
        if not asked:
            return
        from nmflow.experiments.catalog import listing

        rows = listing(kind)
        width = max(len(name) for name, _ in rows)
        for name, about in rows:
            typer.echo(f"{name:{width}}  {about}")
        raise typer.Exit

    return typer.Option("--list", is_eager=True, callback=show, help="Show all names.")
