"""The mask kernel on a GPU: W to mask and W̃ in one pass, in Triton, which torch brings along.

If Triton is missing, or has no C compiler to build its launches, plain torch does the same in
several passes. For N above 1 that needs a `topk`, which takes longer than the training step around
it. A warning says so once.
"""

from __future__ import annotations

import functools
import logging
import math
import subprocess
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nmflow.pattern import Pattern
from nmflow.text_table import one_line

log = logging.getLogger("nmflow")

LOWEST = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""The dtypes, and the lowest bit of a float32 that a value of each can set."""
_TILE = 2048
_WIDEST = 4096


def why_not() -> str:
    """Why the kernel does not work here, in one clause; empty if it does.

    A capture of a CUDA graph may not let a first kernel be loaded: that says nothing of later.
    """
    return _why_not(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


@functools.cache
def _why_not(captured: bool) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # A first launch shows what an import does not: Triton builds it with a C compiler. The
        # caller may be a compiler that traces, whose tensors have no memory.
        with _disable_current_modes():
            some = torch.zeros(16, dtype=torch.float32, device=device)
            project(some, Pattern("1:16"), 0, out=some)
    except Exception as error:
        if not (is_of_triton(error) or isinstance(error, (ImportError, RuntimeError))):
            raise
        reason = f"Triton does not work here ({one_line(error)})"
        log.warning(
            "%s: masks of weights on a GPU are taken by plain torch, which is slow for N > 1; "
            "install the triton of your torch, and a C compiler",
            reason,
        )
        return reason
    return ""


def is_of_triton(error: Exception) -> bool:
    """Whether an error of a launch is of Triton's compilers, or of the C compiler that it calls."""
    own = type(error).__module__.partition(".")[0] == "triton"
    return own or isinstance(error, (OSError, subprocess.SubprocessError))


def serves(w: Tensor, pattern: Pattern) -> bool:
    """Say whether the kernel takes this weight as it lies in memory."""
    return (
        w.device.type == "cuda"
        and w.dtype in LOWEST
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
    from nmflow.masks import triton_kernel

    kernel: Any = triton_kernel.project
    cut = cut_of(w, pattern, dim)
    fine = torch.ones((), dtype=torch.bool, device=w.device)
    with torch.cuda.device_of(w):
        kernel[cut.grid](
            w_ptr=w,
            values_ptr=values,
            out_ptr=out,
            mask_ptr=None if mask is None else mask.view(torch.uint8),
            fine_ptr=fine.view(torch.uint8),
            scale_ptr=scale,
            total=w.numel(),
            inner=cut.inner,
            delta=float(delta),
            pull=float(pull) or None,
            **constants(pattern, cut, w.dtype),
        )
    return fine


def constants(pattern: Pattern, cut: Cut, dtype: torch.dtype) -> dict[str, int]:
    """The arguments about groups and dtype of a kernel that chooses masks."""
    return {
        "n": pattern.n,
        "M": cut.m,
        "P": power_of_two(cut.m),
        "R": cut.groups,
        "AXIS": int(cut.inner == 1),
        "KIND": 0 if pattern.n == pattern.m else min(pattern.n, 2),
        "LOWEST": LOWEST[dtype],
    }


class Cut(NamedTuple):
    """How the memory of a weight is divided into tiles.

    Attributes:
        m: the size of a group.
        inner: how many groups are side by side; 1 if each is contiguous.
        groups: the groups in a tile.
        grid: the number of tiles.
    """

    m: int
    inner: int
    groups: int
    grid: tuple[int, int]


def cut_of(w: Tensor, pattern: Pattern, dim: int) -> Cut:
    """How a weight that `serves` accepts is divided into tiles."""
    order = _order(w)
    assert order is not None
    return _cut(tuple(w.shape), order, pattern.n, pattern.m, dim)


@functools.lru_cache(4096)  # asked for every weight at every step
def _cut(shape: tuple[int, ...], order: tuple[int, ...], n: int, m: int, dim: int) -> Cut:
    axis, size = order.index(dim % len(shape)), math.prod(shape)
    inner = math.prod(shape[i] for i in order[axis + 1 :])
    if n == m:  # nothing to choose: any division of the memory will do
        m, inner = _TILE, 1
    groups = _TILE // power_of_two(m)
    if inner == 1:
        groups = max(1, groups)
        return Cut(m, 1, groups, (-(-size // (m * groups)), 1))
    groups = min(max(16, groups), power_of_two(inner))
    return Cut(m, inner, groups, (size // (m * inner), -(-inner // groups)))


def power_of_two(size: int) -> int:
    """The first power of two that is not below a size."""
    return 1 << (size - 1).bit_length()


def alike(w: Tensor, other: Tensor) -> bool:
    """Whether `other` has the memory layout of `w`."""
    return w.stride() == other.stride() or (w.is_contiguous() and other.is_contiguous())


def _order(w: Tensor) -> tuple[int, ...] | None:
    """The axes in the order of memory, where the values fill it without gaps."""
    if w.is_contiguous():
        return tuple(range(w.ndim))
    if w.ndim == 4 and w.is_contiguous(memory_format=torch.channels_last):
        return 0, 2, 3, 1
    return None
