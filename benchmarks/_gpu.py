"""Shared by the parts of `gpu.py`: rows, random weights, plans that are forced, kept kernels."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmflow.errors import CompressError
from nmflow.kernels import gpu, gpu_driver
from nmflow.kernels.gpu_plan import Card, Kernel, Plan
from nmflow.kernels.layout import Shape, tiled_from_canonical
from nmflow.packed.measure import copies_past_cache, gpu_ways, time_on_gpu

DEVICE = "cuda"
Row = dict[str, Any]
FIELDS = [
    "what", "out", "inputs", "tokens", "pattern", "dense_us", "packed_us", "ready_us", "ratio",
    "tb_per_s", "turn_us", "tokens_per_s", "error", "taken", "plan", "failed", "device", "torch",
]  # fmt: skip
WRONG = 0.01  # relative error; that of rounding is 0.002
FASTEST: dict[tuple[Shape, int], tuple[float, Plan]] = {}
"""The microseconds and the plan of products that were timed in this process."""


def card() -> Card:
    """The GPU of the run; where there is none, one like an H100."""
    return gpu_driver.driver(0).card if torch.cuda.is_available() else Card()


def timed(ways: Mapping[str, Sequence[Callable[[], Any]]], rounds: int = 20) -> dict[str, float]:
    """Microseconds of a call of each way, the median."""
    return {name: found.median for name, found in time_on_gpu(ways, rounds).items()}


def best_dense(w: Tensor, x: Tensor, rounds: int = 20) -> float:
    """Microseconds of `x Wᵀ` dense: the best of cuBLAS in both layouts, and of cuSPARSELt."""
    xt = x.t().contiguous()
    ways: dict[str, Sequence[Callable[[], Any]]] = dict(gpu_ways(w, None, x))
    ways["w @ xt"] = [partial(torch.matmul, one, xt) for one in (w, w.clone())] * 2
    return min(timed(ways, rounds).values())


def past_cache(nbytes: int) -> range:
    """As many numbers as there must be copies of a weight, so that they do not stay in the L2."""
    return range(copies_past_cache(nbytes, torch.device(DEVICE)))


def random_index(shape: Shape) -> Tensor:
    """The canonical index of a random weight, on the GPU."""
    draw = torch.rand(shape.lists, shape.entries // shape.n, shape.m, device=DEVICE)
    return draw.topk(shape.n, -1).indices.sort(-1).values.flatten(1).to(torch.uint8)


def random_packed(shape: Shape) -> tuple[Tensor, Tensor]:
    """Tiled values and codes of a random bf16 weight on the GPU."""
    values = torch.randn(shape.out, shape.entries, device=DEVICE).bfloat16() * 0.02
    return tiled_from_canonical(values, random_index(shape), shape)


def error(y: Tensor, want: Tensor) -> float:
    """The relative error of a product."""
    return float((y.double() - want.double()).norm() / want.double().norm())


def rested() -> None:
    """Give back what earlier rows held."""
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def taking(plan: Plan | None) -> Iterator[None]:
    """Products of few tokens take this plan; None is the dense matrix."""
    planned = gpu._planned
    gpu._planned = lambda *args: plan  # pyright: ignore
    try:
        yield
    finally:
        gpu._planned = planned


def tried(row: Row, run: Callable[[], Row]) -> Row:
    """The row with what `run` found; what does not fit, or is wrong, is a result too."""
    try:
        found = row | run()
    except (CompressError, torch.OutOfMemoryError) as problem:
        rested()
        return row | {"failed": f"{type(problem).__name__}: {problem}"[:200]}
    if (found.get("error") or 0.0) <= WRONG:
        return found
    return row | {"error": found["error"], "failed": "wrong"}


def product(
    calls: Sequence[Callable[[], Tensor]], want: Tensor, dense_us: float, size: int, rounds: int
) -> Row:
    """What a row says of a product that reads `size` bytes of weights, in calls on copies of it."""
    wrong = error(calls[0](), want)
    us = timed({"packed": calls}, rounds)["packed"]
    return {
        "error": wrong, "packed_us": us, "ratio": dense_us / us, "tb_per_s": size / us / 1e6
    }  # fmt: skip


_FOLDER: list[Path] = []


def _place(kernel: Kernel, architecture: int) -> Path | None:
    name = hashlib.sha256(repr((kernel, architecture)).encode()).hexdigest()[:24]
    return _FOLDER[0] / name if _FOLDER else None


def compiled(kernel: Kernel) -> bool:
    """Whether a kernel was compiled ahead; True where none was."""
    place = _place(kernel, gpu_driver.driver(0).architecture)
    return place is None or place.exists()


def keep_kernels(folder: Path) -> None:
    """Take kernels from a folder where they are there, and put them there where they are not."""
    folder.mkdir(parents=True, exist_ok=True)
    _FOLDER[:] = [folder]
    make = gpu_driver.compile_kernel

    def kept(kernel: Kernel, architecture: int) -> bytes:
        place = _place(kernel, architecture)
        assert place is not None
        if not place.exists():
            own = place.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}")
            own.write_bytes(make(kernel, architecture))
            own.rename(place)
        return place.read_bytes()

    gpu_driver.compile_kernel = kept
