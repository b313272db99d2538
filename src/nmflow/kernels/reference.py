"""The reference backend: plain torch on any device and dtype, correct and slow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nmflow.kernels.layout import (
    Shape,
    canonical_from_tiled,
    check_canonical,
    dense_from_canonical,
)

EPILOGUES: tuple[str | None, ...] = (None, "gelu", "relu", "silu", "gelu_tanh")


def dense(values: Tensor, codes: Tensor, shape: Shape) -> Tensor:
    """The dense matrix `(out, inputs)` of a tiled weight, bit by bit what was packed.

    Raises:
        CompressError: the codes are not columns of the pattern; checked on a CPU only, since the
            answer would make a GPU wait.
    """
    canonical = canonical_from_tiled(values, codes, shape)
    if codes.device.type == "cpu":
        check_canonical(*canonical, shape)
    return dense_from_canonical(*canonical, shape)


def matmul(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape, epilogue: int = 0
) -> Tensor:
    """`epilogue(x Wᵀ + bias)` through the dense matrix, rebuilt at every call."""
    y = F.linear(x, dense(values, codes, shape), bias)
    return apply_epilogue(y, epilogue)


def apply_epilogue(y: Tensor, epilogue: int) -> Tensor:
    """Apply the epilogue of that number: 0 none, 1 GELU (erf), 2 ReLU, 3 SiLU, 4 GELU (tanh)."""
    if epilogue == 1:
        return F.gelu(y)
    if epilogue == 3:
        return F.silu(y)
    if epilogue == 4:
        return F.gelu(y, approximate="tanh")
    return torch.relu(y) if epilogue == 2 else y


def why_not(call: object) -> str | None:
    """The reference serves every call."""
    return None


def kernel(call: object) -> str:
    """How a call is computed, as a name."""
    return "rebuild the dense weight, F.linear"


def bind(values: Tensor, codes: Tensor, shape: Shape) -> Callable[..., None]:
    """Bind one weight: return a function `(x, bias, y, tokens, epilogue)` that writes `y`."""

    def run(x: Tensor, bias: Tensor | None, y: Tensor, tokens: int, epilogue: int) -> None:
        y.copy_(matmul(x, values, codes, bias, shape, epilogue))

    return run
