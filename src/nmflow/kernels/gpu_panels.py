"""Panels of 64 rows or more, for many tokens: a dense product over the columns that a panel keeps.

On cards with products of warp groups by `cuda/panels.cu`, on others in Triton, which torch's CUDA
builds bring. Both read xᵀ, so that what a panel gathers are whole rows. An x whose tokens lie side
by side in memory (`x.stride(0) == 1`) is taken as it is; another is turned first, in tiles, since
torch's own copy reaches a fifth of the bandwidth.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmflow.errors import CompressError
from nmflow.kernels import gpu_driver
from nmflow.kernels.gpu_driver import Launcher
from nmflow.kernels.gpu_plan import Card, Kernel
from nmflow.kernels.layout import LANES, Shape
from nmflow.masks import triton as masks_triton
from nmflow.text_table import one_line

LEAST_PANEL = 64
_DENSEST = 0.25  # a dense product is about twice as fast a weight
_FULL = 264  # blocks, two on each multiprocessor of an H100
_TILE = 64  # rows and columns that a block turns


class Block(NamedTuple):
    """How Triton cuts a product: rows, entries and tokens of a block, warps and stages."""

    rows: int
    entries: int
    tokens: int
    warps: int
    stages: int


class Group(NamedTuple):
    """How warp groups cut it: rows, tokens, groups across them, entries, stages, blocks at once."""

    rows: int
    tokens: int
    across: int
    entries: int
    stages: int
    blocks: int


def serves(shape: Shape) -> bool:
    """Whether panels are multiplied as such when there are many tokens."""
    return (
        shape.panel % LEAST_PANEL == 0
        and shape.n <= _DENSEST * shape.m
        and (gpu_driver.groups() or not masks_triton.why_not())
    )


def block(shape: Shape, tokens: int) -> Block:
    """The best cut of those that were timed at 4,096 tokens; half as wide where blocks are few."""
    wide = Block(64, 32, 256, 8, 4)
    enough = -(-shape.out // wide.rows) * (tokens // wide.tokens) >= _FULL
    return wide if enough else wide._replace(tokens=128, warps=4)


def group(shape: Shape, tokens: int) -> Group:
    """The best cut of those that were timed, within 3 %; half as wide where blocks are few."""
    if -(-shape.out // LEAST_PANEL) * (tokens // 256) < _FULL:
        return Group(64, 128, 1, 32, 4, 4)
    return Group(64, 256, 1, 32, 3, 3) if shape.panel % 128 else Group(128, 128, 1, 64, 3, 2)


def matmul(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape, epilogue: int = 0,
    cut: Block | Group | None = None, launcher: Launcher | None = None,
) -> Tensor:  # fmt: skip
    """`epilogue(x Wᵀ + bias)` of x `(tokens, inputs)`; sums are float32, rounded once."""
    values, codes = values.contiguous(), codes.contiguous()
    bias = None if bias is None else bias.contiguous()
    if cut is None and (launcher is not None or x.is_cuda):
        launcher = launcher or gpu_driver.driver(x.device.index)
        wide = group(shape, x.shape[0])
        if shared_bytes(shape, wide, launcher.card):
            cut = wide
    if isinstance(cut, Group):
        launcher = launcher or gpu_driver.driver(x.device.index)
        return _by_groups(x, values, codes, bias, shape, epilogue, cut, launcher)
    return _by_triton(x, values, codes, bias, shape, epilogue, cut or block(shape, x.shape[0]))


def shared_bytes(shape: Shape, cut: Group, card: Card) -> int:
    """Shared memory of a block of `panels.cu`; 0 where the card does not take it."""
    stages = cut.stages * cut.entries * 2 * (cut.tokens + cut.rows)
    shared = 1024 + stages + -(-shape.entries // LANES) * LANES
    fits = card.groups and shape.panel % cut.rows == 0 and shared <= card.shared
    return shared if fits else 0


def kernel_of(shape: Shape, cut: Group, half: bool, epilogue: int) -> Kernel:
    """What multiplies by warp groups."""
    constants = {
        "N": shape.n, "M": shape.m, "HALF": int(half), "ROWS": cut.rows, "TOKENS": cut.tokens,
        "ACROSS": cut.across, "BK": cut.entries, "STAGES": cut.stages, "BLOCKS": cut.blocks,
        "EPILOGUE": epilogue, "GROUPS": 1,
    }  # fmt: skip
    return Kernel("panels.cu", "panels", tuple(constants.items()))


def _by_groups(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape, epilogue: int,
    cut: Group, launcher: Launcher,
) -> Tensor:  # fmt: skip
    tokens = x.shape[0]
    y = x.new_empty(tokens, shape.out)
    xt = x.t()
    if xt.stride(1) != 1 or xt.stride(0) % 8 or xt.stride(0) < tokens or xt.data_ptr() % 16:
        xt = turned(x, launcher)
    values = values.clone() if values.data_ptr() % 16 else values
    kernel = kernel_of(shape, cut, x.dtype == torch.float16, epilogue)
    args = [
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (values, codes, xt)),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        *(ctypes.c_void_p(y.data_ptr()), ctypes.c_longlong(xt.stride(0))),
        *(ctypes.c_longlong(shape.out), ctypes.c_int(shape.out), ctypes.c_int(tokens)),
        *map(ctypes.c_int, (shape.entries, shape.panel, shape.out % 8 == 0)),
    ]
    grid = (-(-shape.out // cut.rows), -(-tokens // cut.tokens), 1)
    shared = shared_bytes(shape, cut, launcher.card)
    launcher.launch(kernel, grid, cut.rows * 2 * cut.across, shared, args)
    return y


def turned(x: Tensor, launcher: Launcher | None = None) -> Tensor:
    """xᵀ of x `(tokens, inputs)`, a view of rows of a multiple of eight numbers."""
    launcher = launcher or gpu_driver.driver(x.device.index)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    y = x.new_empty(columns, -(-rows // 8) * 8)
    whole = not (x.stride(0) % 8 or columns % 8 or x.data_ptr() % 16)
    args = [
        *(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())),
        *(ctypes.c_longlong(x.stride(0)), ctypes.c_longlong(y.stride(0))),
        *map(ctypes.c_int, (rows, columns, whole)),
    ]
    grid = (-(-rows // _TILE), -(-columns // _TILE), 1)
    launcher.launch(Kernel("turn.cu", "turn"), grid, 256, _TILE * 33 * 4, args)
    return y[:, :rows]


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **more: Any) -> None:
    """Launch a Triton kernel on the device of a tensor, on torch's current stream.

    Raises:
        CompressError: Triton does not compile it, or the card does not take it.
    """
    try:
        with torch.cuda.device_of(on):
            kernel[grid](*args, **more)
    except Exception as error:
        if not masks_triton.is_of_triton(error):
            raise
        raise CompressError(
            f"Triton does not run the kernel {kernel.__name__!r} of panels on {on.device} "
            f"({one_line(error)}): leave such layers dense, with sparse_steps='off' or "
            "without compress, or install the triton of your torch"
        ) from error


def _by_triton(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape, epilogue: int,
    cut: Block,
) -> Tensor:  # fmt: skip
    from nmflow.kernels import gpu_panels_kernel

    tokens = x.shape[0]
    y = x.new_empty(tokens, shape.out)
    xt = x.t()
    if not xt.is_contiguous():
        xt = turned(x) if x.is_cuda else xt.contiguous()
    span = shape.m if shape.m > LANES else LANES // shape.m * shape.m
    grid = (-(-shape.out // cut.rows), -(-tokens // cut.tokens))
    launch(
        *(gpu_panels_kernel.panels, grid, x),
        *(xt, values, codes, values if bias is None else bias, y),
        *(tokens, shape.out, xt.stride(0)),
        **{"V": shape.panel, "ENTRIES": shape.entries},
        **{"PER_SPAN": span // shape.m * shape.n, "SPAN": span},
        **{"BV": cut.rows, "BK": cut.entries, "BT": cut.tokens},
        **{"BIAS": bias is not None, "EPILOGUE": epilogue},
        **{"num_warps": cut.warps, "num_stages": cut.stages},
    )
    return y
