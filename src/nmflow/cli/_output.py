"""How commands print: a table for people, or JSON for programs."""

from __future__ import annotations

import json
from typing import Any, Protocol

import typer

JSON: Any = typer.Option("--json", help="Print JSON instead of a table.")


class Printed(Protocol):
    """What a command prints: it has a table as `str`, and plain types."""

    def to_dict(self) -> dict[str, Any]: ...


def show(found: Printed, as_json: bool = False) -> None:
    """Print the table, as it is: names may hold what a terminal library takes for markup."""
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
