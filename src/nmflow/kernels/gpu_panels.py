"""Panels of 64 rows or more, for many tokens: a dense product over the columns that a panel keeps.

In Triton, which torch's CUDA builds bring. x is turned to `(inputs, tokens)` first, so that what a
panel gathers are whole rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmflow.kernels.layout import LANES, Shape
from nmflow.masks import triton as masks_triton

LEAST_PANEL = 64
_DENSEST = 0.25  # a dense product is about twice as fast a weight


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


def block(shape: Shape) -> Block:
    """The cut of a shape; not measured yet."""
    entries = 32 if shape.entries < 256 else 64
    return (
        Block(128, entries, 128, 8, 3) if shape.panel % 128 == 0 else Block(64, entries, 128, 4, 4)
    )


def matmul(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape, epilogue: int = 0,
    cut: Block | None = None,
) -> Tensor:  # fmt: skip
    """`epilogue(x Wᵀ + bias)` of x `(tokens, inputs)`; sums are float32, rounded once."""
    from nmflow.kernels import gpu_panels_kernel

    kernel: Any = gpu_panels_kernel.panels
    cut = cut or block(shape)
    tokens = x.shape[0]
    y = x.new_empty(tokens, shape.out)
    span = shape.m if shape.m > LANES else LANES // shape.m * shape.m
    grid = (-(-shape.out // cut.rows), -(-tokens // cut.tokens))
    with torch.cuda.device_of(x):
        kernel[grid](
            *(x.t().contiguous(), values.contiguous(), codes.contiguous()),
            *(values if bias is None else bias.contiguous(), y, tokens, shape.out),
            **{"V": shape.panel, "ENTRIES": shape.entries},
            **{"PER_SPAN": span // shape.m * shape.n, "SPAN": span},
            **{"BV": cut.rows, "BK": cut.entries, "BT": cut.tokens},
            **{"BIAS": bias is not None, "EPILOGUE": epilogue},
            **{"num_warps": cut.warps, "num_stages": cut.stages},
        )
    return y
