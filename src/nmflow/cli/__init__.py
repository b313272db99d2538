"""The command line, `nmflow`: one file per command, each with a function of the file's name."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import NoReturn

from nmflow.errors import NMFlowError
from nmflow.text_table import printable

ORDER = ("train", "sweep", "report", "plan", "audit", "cost", "compress", "bench", "doctor")


def commands() -> list[str]:
    """The names of the commands, in the order in which you use them."""
    there = {m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")}
    return [name for name in ORDER if name in there] + sorted(there - set(ORDER))


def app():
    """The typer application with every command of this folder."""
    import typer

    from nmflow.cli._start import start

    made = typer.Typer(
        name="nmflow",
        help=start.__doc__,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    # With a callback, a single command keeps its name.
    made.callback()(start)
    for name in commands():
        made.command(name)(getattr(importlib.import_module(f"nmflow.cli.{name}"), name))
    return made


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 2.

    A command that a signal stopped has the exit code that a shell expects: 130 or 143.
    """
    from nmflow.experiments.stopping import Stopped

    try:
        app()()
    except NMFlowError as error:
        _end(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nmflow"):
            raise
        _end(
            f"the package {error.name!r} is missing: install the experiments with "
            "pip install 'nmflow[experiments]'"
        )
    except Stopped as stopped:
        sys.stderr.write(f"nmflow: {stopped}\n")
        sys.exit(stopped.exit_code)


def _end(sentence: str) -> NoReturn:
    # Exit code 1 means "no" from a command that checks, such as audit.
    sys.stderr.write(f"nmflow: {printable(sentence)}\n")
    sys.exit(2)
