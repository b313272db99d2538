"""`nmflow cost CONFIG`: parameters, bytes and FLOPs of a network and of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cost(
    config: Annotated[Path, typer.Argument(help="A YAML file, or a name such as demo.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: pattern=1:8."),
    ] = None,
) -> None:
    """Print parameters, bytes with the index, and FLOPs of one example, for every recipe."""
    from rich.console import Console

    import nmflow
    from nmflow.cli._networks import network
    from nmflow.experiments.budget import steps
    from nmflow.experiments.config import load

    console = Console()
    model, run, example = network(config, config_only=True, overrides=set_)
    for spec in load(config, set_).recipes:
        found = nmflow.cost(
            model,
            example,
            pattern=run.pattern,
            include=run.include,
            exclude=run.exclude,
            recipe=spec.build(),
            total_steps=steps(run.model_copy(update={"recipe": spec}), model, example),
        )
        console.print(f"{spec.title}, {run.pattern_text}", style="bold")
        console.print(str(found), soft_wrap=True, markup=False, highlight=False)
