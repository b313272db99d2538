"""`nmflow cost CONFIG`: parameters, bytes and FLOPs of a network and of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nmflow.cli._output import JSON


def cost(
    config: Annotated[Path, typer.Argument(help="A YAML file, or a name such as demo.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: pattern=1:8."),
    ] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print parameters, bytes with the index, and FLOPs of one example, for every recipe."""
    import nmflow
    from nmflow.cli._networks import network
    from nmflow.experiments.budget import steps
    from nmflow.experiments.config import load

    model, run, example = network(config, config_only=True, overrides=set_)
    costs = {}
    for spec in load(config, set_).recipes:
        costs[spec.title] = nmflow.cost(
            model,
            example,
            pattern=run.pattern,
            include=run.include,
            exclude=run.exclude,
            recipe=spec.build(),
            total_steps=steps(run.model_copy(update={"recipe": spec}), model, example),
        )
    if as_json:
        typer.echo(json.dumps({title: found.to_dict() for title, found in costs.items()}, indent=1))
        return
    for title, found in costs.items():
        typer.secho(f"{title}, {run.pattern_text}", bold=True)
        typer.echo(str(found))
