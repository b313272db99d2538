"""The kernels of a GPU on a CPU: the same source, compiled by g++ with `emulated/device.h`."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from nmflow.kernels import gpu_driver
from nmflow.kernels.gpu_plan import Card, Kernel

COMPILER = shutil.which("g++")
_HERE = Path(__file__).parent / "emulated"
_KERNELS = {
    "decode.cu": ("decode",), "expand.cu": ("expand",), "lookup.cu": ("lookup",),
    "groups.cu": ("groups",), "panels.cu": ("panels",), "turn.cu": ("turn",), "sum.cu": ("sum",),
    "widen.cu": ("widen",), "ready.cu": ("ready",),
}  # fmt: skip


@functools.cache
def _library(file: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    assert COMPILER is not None
    # The emulated header stands in for the one beside the kernels; constants come after what it
    # includes, which has names of its own.
    folder = files("nmflow.kernels") / "cuda"
    text = (folder / file).read_text().replace('#include "device.h"', "")
    for header in gpu_driver.HEADERS:
        text = text.replace(f'#include "{header}"', (folder / header).read_text())
    text = text.replace("#pragma once", "")
    named = {"HALF": 0, **dict(constants)}
    lines = [
        f"#define HALF {named.pop('HALF')}",
        f"#define GROUPS {named.pop('GROUPS', 0)}",
        f"#define INT8 {named.pop('INT8', 0)}",
        f'#include "{_HERE / "device.h"}"',
        *(f"#define {name} {value}" for name, value in named.items()),
        text,
        *(f"EMULATES({name})" for name in _KERNELS[file]),
    ]
    made = tempfile.mkdtemp(prefix="emulated")
    path = Path(made) / "kernel.so"
    subprocess.run(
        [
            *(COMPILER, "-x", "c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC"),
            *("-o", str(path), "-"),
        ],
        input="\n".join(lines),
        text=True,
        check=True,
    )
    library = ctypes.CDLL(str(path))
    shutil.rmtree(made)
    return library


class Emulated:
    """A launcher whose GPU is this process; remembers what it was asked to launch."""

    def __init__(self, card: Card | None = None) -> None:
        self.card = card or Card()
        self.launched: list[tuple[Kernel, tuple[int, int, int]]] = []

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], threads: int, shared: int,
        args: Sequence[Any],
    ) -> None:  # fmt: skip
        """Run a kernel on ctypes values, now."""
        self.launched.append((kernel, grid))
        run = getattr(_library(kernel.file, kernel.constants), f"run_{kernel.function}")
        given = (ctypes.c_void_p * len(args))(*(ctypes.addressof(arg) for arg in args))
        run(*grid, threads, shared, given)
