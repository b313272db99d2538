"""The registry of backends: which kernel serves a call, and why the others do not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nmflow import native
from nmflow.kernels import cpu, cpu_int8, gpu, reference
from nmflow.kernels.backend import Backend, Call
from nmflow.kernels.layout import Shape

_log = logging.getLogger("nmflow")
_told = False

# The first backend that serves a call runs it; the reference serves all.
BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": gpu, "reference": reference}


@dataclass(frozen=True)
class Choice:
    """Which backend and kernel serve a call, and why the backends before it do not."""

    call: Call
    backend: str
    kernel: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        c = self.call
        text = (
            f"{self.backend} ({self.kernel}) serves {c.shape.pattern} ({c.shape.out}, "
            f"{c.shape.inputs}) {str(c.dtype).removeprefix('torch.')} "
            f"{f'({c.values}) ' if c.values else ''}on {c.device} with "
            f"{c.tokens} tokens and {c.threads} threads"
        )
        return text + "".join(f"; not {name}: {why}" for name, why in self.refused)


def choose(call: Call) -> Choice:
    """Take the first backend of the list that serves the call, and keep the others' reasons."""
    refused: list[tuple[str, str]] = []
    for name, backend in BACKENDS.items():
        why = backend.why_not(call)
        if why is None:
            return Choice(call, name, backend.kernel(call), tuple(refused))
        refused.append((name, why))
    raise AssertionError("the reference backend serves every call")


def bind(values: Tensor, codes: Tensor, shape: Shape) -> tuple[str, Callable[..., None]]:
    """The name of the backend that serves a tiled weight, and its function for that weight."""
    choice = choose(Call(shape, values.dtype, values.device.type, 1))
    _tell(choice)
    return choice.backend, BACKENDS[choice.backend].bind(values, codes, shape)


def bind_int8(
    stream: Tensor, shape: Shape, dtype: torch.dtype, activations: int
) -> Callable[..., None] | None:
    """The compiled function for a weight with 8-bit values; None where the reference serves it."""
    values = "int8, activations too" if activations else "int8"
    choice = choose(Call(shape, dtype, stream.device.type, 1, values=values))
    _tell(choice)
    return cpu_int8.bind(stream, shape, dtype, activations) if choice.backend == "cpu" else None


def _tell(choice: Choice) -> None:
    """Log once that the compiled kernels are missing and the slow reference runs."""
    global _told
    if not _told and choice.call.device == "cpu" and not native.available():
        _told = True
        _log.warning(
            "nmflow runs packed layers on its slow reference kernels: %s", native.why_not()
        )
