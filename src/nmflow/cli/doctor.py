"""`nmflow doctor`: what this machine can run, what is slow here and why."""

from __future__ import annotations

from typing import Annotated

from nmflow.cli._output import JSON, show


def doctor(as_json: Annotated[bool, JSON] = False) -> None:
    """Print what nmflow finds here: torch, kernels, threads, the GPU, and what to install."""
    from nmflow.inspect.machine import doctor as look

    found = look()
    show(found, as_json)
