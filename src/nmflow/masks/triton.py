"""The mask kernel on a GPU: W to mask and W̃ in one pass, in Triton, which torch brings along.

Where Triton is missing, or has no C compiler to build its launches with, the same is done in plain
torch, in several passes and, for N above 1, by a `topk` that takes longer than the training step
around it; a warning says so once.
"""

from __future__ import annotations

import functools
import logging
import math
import subprocess
from typing import Any

import torch
from torch import Tensor

from nmflow.pattern import Pattern

log = logging.getLogger("nmflow")

_LOWEST = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""The dtypes, and the lowest bit of a float32 that a value of each can set."""
_TILE = 2048
_WIDEST = 4096


@functools.cache
def why_not() -> str:
    """Why the kernel does not work here, in one clause; empty where it does."""
    try:
        # A first launch shows what an import does not: Triton builds it with a C compiler.
        some = torch.zeros(16, device="cuda" if torch.cuda.is_available() else "cpu")
        project(some, Pattern("1:16"), 0, out=some)
    except Exception as error:
        known = isinstance(error, (ImportError, OSError, RuntimeError, subprocess.SubprocessError))
        if not known and type(error).__module__.partition(".")[0] != "triton":
            raise
        reason = f"Triton does not work here ({' '.join(str(error).split())[:200]})"
        log.warning(
            "%s: masks of weights on a GPU are taken by plain torch, which is slow for N > 1; "
            "install the triton of your torch, and a C compiler",
            reason,
        )
        return reason
    return ""


def serves(w: Tensor, pattern: Pattern) -> bool:
    """Say whether the kernel takes this weight as it lies in memory."""
    return (
        w.device.type == "cuda"
        and w.dtype in _LOWEST
        and pattern.panel == 1
        and pattern.m <= _WIDEST
        and w.numel() > 0
        and _order(w) is not None
        and not why_not()
    )


def project(
    w: Tensor,
    pattern: Pattern,
    dim: int,
    delta: float = 0.0,
    *,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    values: Tensor | None = None,
    pull: float = 0.0,
    scale: Tensor | None = None,
) -> Tensor:
    r"""Magnitude mask and projection of a weight, in one pass over memory, without waiting for it.

    Writes any of `mask` (True for the N largest |w| of every M along `dim`, ties to the lowest
    index) and `out = w * (mask + (1 - mask) * delta)`, +0.0 where pruned if `delta` is 0.

    Args:
        w: a weight that `serves` takes.
        pattern: N:M without panels.
        dim: the axis that is cut into groups.
        delta: what pruned weights are multiplied with, in float32, rounded once to the dtype.
        mask: bool, with the shape and the strides of `w`, or None.
        out: like `w`, or None; may be `w` itself, or `values`.
        values: like `w`: what `out` is made of where it is not `w`, such as a gradient.
        pull: adds `pull * scale * w` to pruned places of `out`, in float32, before it is rounded.
        scale: a tensor of one number on the device; None is 1.

    Returns:
        A bool scalar on the device: whether `w` was finite. If not, what the outputs hold is
        unspecified.
    """
    from nmflow.masks import triton_kernel as gpu_kernel

    kernel: Any = gpu_kernel.project
    order = _order(w)
    assert order is not None
    n, m = pattern.n, pattern.m
    shape, axis = [w.shape[i] for i in order], order.index(dim % w.ndim)
    inner, kind = math.prod(shape[axis + 1 :]), 1 if n == 1 else 2
    if n == m:  # nothing to choose: any cut of the memory will do
        m, inner, kind = _TILE, 1, 0
    wide = 1 << (m - 1).bit_length()
    fine = torch.ones((), dtype=torch.bool, device=w.device)
    if inner == 1:
        tile = max(1, _TILE // wide)
        grid = (-(-w.numel() // (m * tile)), 1)
    else:
        tile = min(max(16, _TILE // wide), 1 << (inner - 1).bit_length())
        grid = (w.numel() // (m * inner), -(-inner // tile))
    kept = w if mask is None else mask.view(torch.uint8)
    with torch.cuda.device_of(w):
        kernel[grid](
            *(w, w if values is None else values, w if out is None else out, kept),
            *(fine.view(torch.uint8), w if scale is None else scale),
            *(w.numel(), inner, n, float(delta), float(pull)),
            **{"M": m, "P": wide, "R": tile, "AXIS": int(inner == 1), "KIND": kind},
            **{"LOWEST": _LOWEST[w.dtype], "PULLS": pull != 0.0, "SCALES": scale is not None},
            **{"MASKS": mask is not None, "WRITES": out is not None},
            VALUES=values is not None,
        )
    return fine


def alike(w: Tensor, other: Tensor) -> bool:
    """Whether `other` lies in memory as `w` does."""
    return w.stride() == other.stride() or (w.is_contiguous() and other.is_contiguous())


def _order(w: Tensor) -> tuple[int, ...] | None:
    """The axes in the order of memory, where the values fill it without gaps."""
    if w.is_contiguous():
        return tuple(range(w.ndim))
    if w.ndim == 4 and w.is_contiguous(memory_format=torch.channels_last):
        return 0, 2, 3, 1
    return None
