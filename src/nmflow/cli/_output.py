"""How commands print: a table for people, or JSON for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console

JSON: Any = typer.Option("--json", help="Print JSON instead of a table.")


def console(stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints text unchanged, since paths may hold brackets and colons."""
    from rich.console import Console

    return Console(
        stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True
    )


class Printed(Protocol):
    """A result that has a table as `str`, and plain types for JSON."""

    def to_dict(self) -> dict[str, Any]: ...


def show(found: Printed, as_json: bool = False) -> None:
    """Print the table unchanged, since names may look like markup."""
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
