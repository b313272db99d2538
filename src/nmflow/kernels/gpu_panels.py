"""Panels of 64 rows or more, for many tokens: a dense product over the columns that a panel keeps.

In Triton, which torch's CUDA builds bring. x is turned to `(inputs, tokens)` first, so that what a
panel gathers are whole rows; in tiles, since torch's own copy reaches a fifth of the bandwidth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmflow.kernels.layout import LANES, Shape
from nmflow.masks import triton as masks_triton

LEAST_PANEL = 64
_DENSEST = 0.25  # a dense product is about twice as fast a weight
_FULL = 264  # blocks, two on each multiprocessor of an H100
_TILE = 64  # rows and columns that a block turns


class Block(NamedTuple):
    """How a product is cut: rows, entries and tokens of a block, warps and stages."""

    rows: int
    entries: int
    tokens: int
    warps: int
    stages: int


def serves(shape: Shape) -> bool:
    """Whether panels are multiplied as such when there are many tokens."""
    return (
        shape.panel % LEAST_PANEL == 0
        and shape.n <= _DENSEST * shape.m
        and not masks_triton.why_not()
    )


def block(shape: Shape, tokens: int) -> Block:
    """The best cut of those that were timed at 4,096 tokens; half as wide where blocks are few."""
    wide = Block(64, 32, 256, 8, 4)
    enough = -(-shape.out // wide.rows) * (tokens // wide.tokens) >= _FULL
    return wide if enough else wide._replace(tokens=128, warps=4)


def matmul(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape, epilogue: int = 0,
    cut: Block | None = None,
) -> Tensor:  # fmt: skip
    """`epilogue(x Wᵀ + bias)` of x `(tokens, inputs)`; sums are float32, rounded once."""
    from nmflow.kernels import gpu_panels_kernel

    kernel: Any = gpu_panels_kernel.panels
    tokens = x.shape[0]
    cut = cut or block(shape, tokens)
    y = x.new_empty(tokens, shape.out)
    span = shape.m if shape.m > LANES else LANES // shape.m * shape.m
    grid = (-(-shape.out // cut.rows), -(-tokens // cut.tokens))
    with torch.cuda.device_of(x):
        kernel[grid](
            *(turned(x), values.contiguous(), codes.contiguous()),
            *(values if bias is None else bias.contiguous(), y, tokens, shape.out),
            **{"V": shape.panel, "ENTRIES": shape.entries},
            **{"PER_SPAN": span // shape.m * shape.n, "SPAN": span},
            **{"BV": cut.rows, "BK": cut.entries, "BT": cut.tokens},
            **{"BIAS": bias is not None, "EPILOGUE": epilogue},
            **{"num_warps": cut.warps, "num_stages": cut.stages},
        )
    return y


def turned(x: Tensor) -> Tensor:
    """xᵀ of x `(tokens, inputs)`, in order."""
    from nmflow.kernels import gpu_panels_kernel

    kernel: Any = gpu_panels_kernel.turn
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    y = x.new_empty(columns, rows)
    with torch.cuda.device_of(x):
        kernel[-(-rows // _TILE), -(-columns // _TILE)](
            x, y, rows, columns, x.stride(0), B=_TILE, num_warps=4
        )
    return y
