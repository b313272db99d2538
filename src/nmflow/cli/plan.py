"""`nmflow plan CONFIG`: which weights a recipe would prune, and why not the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmflow.cli._output import JSON, show


def plan(
    source: Annotated[Path, typer.Argument(help="A YAML file, a name, or a model's folder.")],
    pattern: Annotated[
        str | None, typer.Option(help="N:M with N kept; a YAML file has its own.")
    ] = None,
    include: Annotated[str | None, typer.Option(help="Presets or globs, by commas.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Presets or globs to leave out.")] = None,
    remainder: Annotated[
        str | None, typer.Option(help="auto, error or skip, where M does not divide an axis.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: pattern=1:8."),
    ] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print which weights of SOURCE's network would be pruned, and why the others are left out."""
    import nmflow
    from nmflow.cli._errors import globs
    from nmflow.cli._networks import network

    model, run, _ = network(source, overrides=set_)
    chosen = nmflow.plan(
        model,
        pattern or (run.pattern if run else "1:16"),
        globs(include) if include else (run.include if run else "all"),
        globs(exclude) if exclude else (run.exclude if run else []),
        remainder=remainder or (run.remainder if run else "auto"),
    )
    show(chosen, as_json)
