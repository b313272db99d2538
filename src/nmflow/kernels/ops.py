"""The ops behind `torch.library`: `nmflow::matmul` and `nmflow::unpack`, with fake kernels.

They are registered with `Library.impl`, which costs 2 µs a call where `custom_op` costs 8; and
without an autograd kernel, which would cost 4 µs at every call: `matmul` below adds the backward
pass where one is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmflow.errors import CompressError
from nmflow.kernels import reference, registry
from nmflow.kernels.layout import Shape, check_tiled

_LIBRARY = torch.library.Library("nmflow", "DEF")
_SHAPE = "int out, int inputs, int n, int m, int panel"
_LIBRARY.define(
    f"matmul(Tensor x, Tensor values, Tensor codes, Tensor? bias, {_SHAPE}, int epilogue) -> Tensor"
)
_LIBRARY.define(f"unpack(Tensor values, Tensor codes, {_SHAPE}) -> Tensor")

# Bound functions of the CPU backend by address and shape. They hold no tensor, and what they hold
# follows from the key alone, so an address that is used again is no danger.
_BOUND: dict[tuple[Any, ...], Callable[..., None]] = {}
_MOST_BOUND = 65_536


def _matmul_cpu(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    out: int,
    inputs: int,
    n: int,
    m: int,
    panel: int,
    epilogue: int,
) -> Tensor:
    key = (
        values.data_ptr(), codes.data_ptr(), values.numel(), codes.numel(), values.dtype,
        codes.dtype, out, inputs, n, m, panel,
    )  # fmt: skip
    run = _BOUND.get(key)
    if run is None:
        run = _bind(key, values, codes, Shape(out, inputs, n, m, panel))
    size = x.shape
    if size[-1] != inputs or x.dtype is not values.dtype:
        _refuse(x, values, inputs)
    if bias is not None and (
        bias.dtype is not values.dtype or bias.dim() != 1 or bias.numel() != out
    ):
        raise CompressError(
            f"bias is {bias.dtype} {tuple(bias.shape)}: the packed weight takes {values.dtype} "
            f"({out},), so convert the model whole, for instance packed.to(dtype)"
        )
    y = x.new_empty((*size[:-1], out))
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if len(size) == 2 and x.stride(1) == 1 and x.stride(0) >= inputs:
        run(x, bias, y, size[0], epilogue)
    elif y.numel():
        flat = x.reshape(-1, inputs)
        if flat.stride(1) != 1 or flat.stride(0) < inputs:  # such as an expanded row
            flat = flat.contiguous()
        run(flat, bias, y.view(-1, out), flat.shape[0], epilogue)
    return y


def _bind(key: tuple[Any, ...], values: Tensor, codes: Tensor, shape: Shape) -> Callable[..., None]:
    """Bind a weight the first time it is met."""
    shape = Shape.of(shape.out, shape.inputs, shape.pattern)
    check_tiled(values, codes, shape)
    backend, run = registry.bind(values.contiguous(), codes.contiguous(), shape)
    if backend == "cpu" and values.is_contiguous() and codes.is_contiguous():
        if len(_BOUND) >= _MOST_BOUND:
            _BOUND.clear()
        _BOUND[key] = run
    return run


def _refuse(x: Tensor, values: Tensor, inputs: int) -> None:
    if x.shape[-1] != inputs:
        raise CompressError(f"x has {x.shape[-1]} features where the packed weight takes {inputs}")
    raise CompressError(
        f"x is {x.dtype} and the packed weight {values.dtype}: convert one of them, for instance "
        "packed.to(dtype) or x.to(dtype)"
    )


def _matmul_any(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    out: int,
    inputs: int,
    n: int,
    m: int,
    panel: int,
    epilogue: int,
) -> Tensor:
    """Every device but the CPU: the reference, which is what the registry would say."""
    shape = Shape.of(out, inputs, f"{n}:{m}@{panel}")
    check_tiled(values, codes, shape)
    if x.shape[-1] != inputs or x.dtype is not values.dtype:
        _refuse(x, values, inputs)
    return reference.matmul(x, values, codes, bias, shape, epilogue)


def _unpack(
    values: Tensor, codes: Tensor, out: int, inputs: int, n: int, m: int, panel: int
) -> Tensor:
    shape = Shape.of(out, inputs, f"{n}:{m}@{panel}")
    check_tiled(values, codes, shape)
    return reference.dense(values, codes, shape)


_LIBRARY.impl("matmul", _matmul_cpu, "CPU")
for _key in ("CUDA", "MPS", "XPU"):
    _LIBRARY.impl("matmul", _matmul_any, _key)
    _LIBRARY.impl("unpack", _unpack, _key)
_LIBRARY.impl("unpack", _unpack, "CPU")


@torch.library.register_fake("nmflow::matmul", lib=_LIBRARY)
def _matmul_fake(x, values, codes, bias, out, inputs, n, m, panel, epilogue):
    torch._check(x.shape[-1] == inputs, lambda: f"x has another last axis than {inputs}")
    torch._check(x.device == values.device, lambda: "x and the packed weight are on two devices")
    return x.new_empty((*x.shape[:-1], out))


@torch.library.register_fake("nmflow::unpack", lib=_LIBRARY)
def _unpack_fake(values, codes, out, inputs, n, m, panel):
    return values.new_empty((out, inputs))


_matmul = torch.ops.nmflow.matmul.default
_unpack_op = torch.ops.nmflow.unpack.default


class _Differentiable(torch.autograd.Function):
    """`x Wᵀ + bias` with gradients for x and bias; the packed weight is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None,
                shape: tuple[int, ...]) -> Tensor:  # fmt: skip
        ctx.save_for_backward(values, codes)
        ctx.shape = shape
        return _matmul(x, values, codes, bias, *shape, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0]
        weight = _unpack_op(*ctx.saved_tensors, *ctx.shape)
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, bias, None


def matmul(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: tuple[int, ...],
    epilogue: int = 0,
) -> Tensor:  # fmt: skip
    """Multiply by a packed weight: `y = epilogue(x Wᵀ + bias)`, with gradients for x and bias.

    Args:
        x: `(..., inputs)` of the weight's dtype.
        values: tiled values, see `nmflow.kernels.layout`.
        codes: tiled codes.
        bias: `(out,)` or None.
        shape: `(out, inputs, n, m, panel)`.
        epilogue: 0 none, 1 GELU (erf), 2 ReLU.

    Returns:
        `(..., out)`.

    Raises:
        CompressError: sizes or dtypes that do not fit.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Differentiable.apply(x, values, codes, bias, shape)
        return reference.apply_epilogue(y, epilogue)
    return _matmul(x, values, codes, bias, *shape, epilogue)


def unpack(values: Tensor, codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dense matrix `(out, inputs)` of a tiled weight."""
    return _unpack_op(values, codes, *shape)
