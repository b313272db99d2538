"""The ops behind `torch.library`: `nmflow::matmul` and `nmflow::unpack`, with fake kernels.

They are registered with `Library.impl`, which costs 2 µs a call where `custom_op` costs 8. They
have no autograd kernel, which would cost 4 µs at every call: `matmul` below adds the backward pass
if one is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmflow.errors import CompressError, FileFormatError
from nmflow.kernels import gpu, reference, registry
from nmflow.kernels.backend import Call
from nmflow.kernels.calls import (
    LIBRARY,
    SHAPE,
    Bound,
    aligned,
    alive,
    autocast_dtype,
    gradients,
    is_plain_call,
    keep,
    over_batch,
    product,
    refuse_batched_weights,
    refuse_features,
    register_vmap,
    shape_of,
    version_of,
)
from nmflow.kernels.layout import Shape, check_tiled

LIBRARY.define(
    f"matmul(Tensor x, Tensor values, Tensor codes, Tensor? bias, {SHAPE}, int epilogue) -> Tensor"
)
LIBRARY.define(f"unpack(Tensor values, Tensor codes, {SHAPE}) -> Tensor")

_BOUND: Bound = {}


def matmul_cpu(
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
    """What the op does on a CPU: its own checks of x and bias, and the product."""
    if values.is_contiguous() and codes.is_contiguous():
        key = (
            values.untyped_storage()._cdata, codes.untyped_storage()._cdata,
            values.data_ptr(), codes.data_ptr(), values.shape, codes.shape,
            values.dtype, codes.dtype, version_of(values), version_of(codes),
            out, inputs, n, m, panel,
        )  # fmt: skip
        known = _BOUND.get(key)
        run = known[0] if known else _bind(key, values, codes, Shape(out, inputs, n, m, panel))
    else:  # copies, kept until the product is done
        values, codes = values.contiguous(), codes.contiguous()
        run = _bind(None, values, codes, Shape(out, inputs, n, m, panel))
    size = x.shape
    if not size or size[-1] != inputs or x.dtype is not values.dtype or not x.is_cpu:
        _refuse(x, values, inputs)
    if bias is not None:
        if (
            not bias.is_cpu
            or bias.dtype is not values.dtype
            or bias.dim() != 1
            or bias.numel() != out
        ):
            _refuse_bias(bias, values, out)
        bias = aligned(bias.contiguous())
    return product(run, x, bias, out, inputs, epilogue)


def _bind(
    key: tuple[Any, ...] | None, values: Tensor, codes: Tensor, shape: Shape
) -> Callable[..., None]:
    """Bind a weight, and keep the bound function under a key."""
    shape = Shape.of(shape.out, shape.inputs, shape.pattern)
    check_tiled(values, codes, shape)
    if not (values.is_cpu and codes.is_cpu):
        raise CompressError(
            f"x is on the CPU and the packed weight on {values.device}: move the model whole, for "
            "instance packed.to(device), and load its weights if it is on meta"
        )
    if aligned(values) is not values or aligned(codes) is not codes:
        values, codes = aligned(values), aligned(codes)
        return alive(registry.bind(values, codes, shape)[1], values, codes)
    try:
        backend, run = registry.bind(values, codes, shape)
    except FileFormatError as error:
        raise CompressError(f"{error}: its buffers were written, so pack it again") from error
    if key is not None and backend == "cpu":
        keep(_BOUND, key, run, values, codes)
    return run


def _refuse(x: Tensor, values: Tensor, inputs: int) -> None:
    refuse_features(x, inputs)
    raise CompressError(
        f"x is {x.dtype} on {x.device} and the packed weight {values.dtype} on {values.device}: "
        "convert one of them, for instance packed.to(dtype) or x.to(dtype)"
    )


def _matmul_elsewhere(
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
    """All devices but the CPU; nothing here waits for them, so CUDA graphs can capture it."""
    shape = shape_of(out, inputs, n, m, panel)
    _check(x, values, codes, bias, shape)
    way = gpu if gpu.why_not(Call(shape, values.dtype, x.device.type, 1)) is None else reference
    return way.matmul(x, values, codes, bias, shape, epilogue)


def _check(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape) -> None:
    check_tiled(values, codes, shape)
    if not x.shape or x.shape[-1] != shape.inputs or x.dtype is not values.dtype:
        _refuse(x, values, shape.inputs)
    if not x.device == values.device == codes.device:
        _refuse(x, values, shape.inputs)
    if bias is not None and (
        bias.device != values.device or bias.dtype is not values.dtype or bias.shape != (shape.out,)
    ):
        _refuse_bias(bias, values, shape.out)


def _refuse_bias(bias: Tensor, values: Tensor, out: int) -> None:
    raise CompressError(
        f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}: the packed weight takes "
        f"{values.dtype} ({out},) on {'the CPU' if values.is_cpu else values.device}, so convert "
        "the model whole, for instance packed.to(dtype)"
    )


def _unpack(
    values: Tensor, codes: Tensor, out: int, inputs: int, n: int, m: int, panel: int
) -> Tensor:
    shape = shape_of(out, inputs, n, m, panel)
    check_tiled(values, codes, shape)
    if values.is_cuda and codes.device == values.device and gpu.expands(values.dtype):
        return gpu.expand(values, codes, shape)
    return reference.dense(values, codes, shape)


LIBRARY.impl("matmul", matmul_cpu, "CPU")
for _key in ("CUDA", "MPS", "XPU"):
    LIBRARY.impl("matmul", _matmul_elsewhere, _key)
    LIBRARY.impl("unpack", _unpack, _key)
LIBRARY.impl("unpack", _unpack, "CPU")


@torch.library.register_fake("nmflow::matmul", lib=LIBRARY)
def _matmul_fake(x, values, codes, bias, out, inputs, n, m, panel, epilogue):
    torch._check(x.shape[-1] == inputs, lambda: f"x has another last axis than {inputs}")
    for other in (values, codes, bias):  # torch calls this as soon as one of them is on meta
        if other is not None and other.device != x.device:
            _refuse(x, other, inputs)
    return x.new_empty((*x.shape[:-1], out))


@torch.library.register_fake("nmflow::unpack", lib=LIBRARY)
def _unpack_fake(values, codes, out, inputs, n, m, panel):
    return values.new_empty((out, inputs))


@register_vmap("nmflow::matmul", lib=LIBRARY)
def _matmul_vmap(info, in_dims, x, values, codes, bias, *rest):
    refuse_batched_weights(in_dims[1], in_dims[2])
    *dims, epilogue = rest

    def multiply(x: Tensor, bias: Tensor | None, epilogue: int) -> Tensor:
        return _matmul(x, values, codes, bias, *dims, epilogue)

    return over_batch(multiply, x, in_dims[0], bias, in_dims[3], epilogue)


_matmul = torch.ops.nmflow.matmul.default
_unpack_op = torch.ops.nmflow.unpack.default


class _Differentiable(torch.autograd.Function):
    """`x Wᵀ + bias` with gradients for x and bias; the packed weight is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None,
                shape: tuple[int, ...]) -> Tensor:  # fmt: skip
        return _matmul(x, values, codes, bias, *shape, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.shape = inputs[4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0]
        weight = _unpack_op(*ctx.saved_tensors, *ctx.shape)
        wanted = ctx.needs_input_grad
        of_x, of_bias = gradients(grad, weight, wanted[0], wanted[3])
        return of_x, None, None, of_bias, None


def matmul(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: tuple[int, ...],
    epilogue: int = 0,
) -> Tensor:  # fmt: skip
    """Multiply by a packed weight: `y = epilogue(x Wᵀ + bias)`, with gradients for x and bias.

    Under autocast it works like `F.linear`: it takes any floats of up to 32 bits, and y has the
    dtype of autocast. Float32 weights are not rounded to that dtype; only y is.

    Args:
        x: `(..., inputs)` of the weight's dtype.
        values: tiled values, see `nmflow.kernels.layout`.
        codes: tiled codes.
        bias: `(out,)` or None.
        shape: `(out, inputs, n, m, panel)`.
        epilogue: the number of one of `reference.EPILOGUES`; 0 is none.

    Returns:
        `(..., out)`.

    Raises:
        CompressError: sizes or dtypes that do not fit.
    """
    wants = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not wants and is_plain_call(x, values):
        out, inputs, n, m, panel = shape
        return matmul_cpu(x, values, codes, bias, out, inputs, n, m, panel, epilogue)
    to = autocast_dtype(x, values)
    if to is not None:
        with torch.autocast(x.device.type, enabled=False):
            if values.dtype not in (to, torch.float32):  # no kernel mixes two half dtypes
                weight = _unpack_op(values, codes, *shape).to(to)
                y = F.linear(x.to(to), weight, None if bias is None else bias.to(to))
                return reference.apply_epilogue(y, epilogue)
            bias = None if bias is None else bias.to(values.dtype)
            return matmul(x.to(values.dtype), values, codes, bias, shape, epilogue).to(to)
    if wants:
        y = _Differentiable.apply(x, values, codes, bias, shape)
        return reference.apply_epilogue(y, epilogue)
    return _matmul(x, values, codes, bias, *shape, epilogue)


def unpack(values: Tensor, codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dense matrix `(out, inputs)` of a tiled weight."""
    return _unpack_op(values, codes, *shape)
