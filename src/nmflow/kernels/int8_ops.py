"""The ops of weights with 8-bit values: `nmflow::matmul_int8` and `nmflow::unpack_int8`.

They are like those of `ops`, and keep bound weights in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmflow.errors import CompressError, FileFormatError
from nmflow.kernels import gpu, int8, reference, registry
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
from nmflow.kernels.layout import Shape

LIBRARY.define(
    f"matmul_int8(Tensor x, Tensor stream, Tensor? bias, {SHAPE}, int activations, int epilogue)"
    " -> Tensor"
)
LIBRARY.define(f"unpack_int8(Tensor stream, {SHAPE}) -> Tensor")

_BOUND: Bound = {}


def matmul_int8_cpu(
    x: Tensor,
    stream: Tensor,
    bias: Tensor | None,
    out: int,
    inputs: int,
    n: int,
    m: int,
    panel: int,
    activations: int,
    epilogue: int,
) -> Tensor:
    """What the op does on a CPU: its own checks of x and bias, and the product."""
    size = x.shape
    key = (
        stream.untyped_storage()._cdata, stream.data_ptr(), stream.shape, stream.stride(),
        version_of(stream), x.dtype, out, inputs, n, m, panel, activations,
    )  # fmt: skip
    known = _BOUND.get(key)
    if not size or size[-1] != inputs or not x.is_cpu or not stream.is_cpu:
        _refuse(x, stream, inputs)
    if bias is not None:
        if not bias.is_cpu or bias.dtype is not x.dtype or bias.shape != (out,):
            _refuse_bias(x, bias, out)
        bias = aligned(bias.contiguous())
    if known is None:
        shape = Shape.of(out, inputs, f"{n}:{m}@{panel}")
        held = stream.contiguous()
        run = _bind(key if held is stream else None, held, shape, x.dtype, activations)
        if run is None:
            return int8.matmul(x, held, bias, shape, activations, epilogue)
    else:
        run = known[0]
    return product(run, x, bias, out, inputs, epilogue)


def _bind(
    key: tuple[Any, ...] | None, stream: Tensor, shape: Shape, dtype: torch.dtype, activations: int
) -> Callable[..., None] | None:
    """Bind a weight, and keep the bound function under a key; None if the reference serves it."""
    int8.check_stream(stream, shape)
    held = aligned(stream, 4)
    try:
        run = registry.bind_int8(held, shape, dtype, activations)
    except FileFormatError as error:
        raise CompressError(f"{error}: its buffer was written, so pack it again") from error
    if run is None:
        return None
    if held is not stream:
        return alive(run, held)
    if key is not None:
        keep(_BOUND, key, run, stream)
    return run


def _refuse(x: Tensor, stream: Tensor, inputs: int) -> None:
    refuse_features(x, inputs)
    raise CompressError(
        f"x is on {x.device} and the packed weight on {stream.device}: move the model whole, for "
        "instance packed.to(device), and load its weights if it is on meta"
    )


def _refuse_bias(x: Tensor, bias: Tensor, out: int) -> None:
    raise CompressError(
        f"x is {x.dtype} on {x.device} and the bias {bias.dtype} {tuple(bias.shape)} on "
        f"{bias.device}: the packed layer takes a bias of x's dtype and of the shape ({out},), so "
        "convert one of them, for instance packed.to(dtype) or x.to(dtype)"
    )


def _matmul_any(x, stream, bias, out, inputs, n, m, panel, activations, epilogue):
    """All devices but the CPU; nothing here waits for them, so CUDA graphs can capture it."""
    shape = shape_of(out, inputs, n, m, panel)
    int8.check_stream(stream, shape)
    if not x.shape or x.shape[-1] != inputs or x.device != stream.device:
        _refuse(x, stream, inputs)
    if bias is not None and (
        bias.device != x.device or bias.dtype is not x.dtype or bias.shape != (out,)
    ):
        _refuse_bias(x, bias, out)
    if activations and x.is_cuda:
        raise CompressError(
            f"activations is 'int8' and x is on {x.device}: 8-bit inputs have kernels on CPUs "
            "alone, so pack with activations='float', or move the model to the CPU"
        )
    if not activations and gpu.why_not(Call(shape, x.dtype, x.device.type, 1)) is None:
        return gpu.matmul_int8(x, stream, bias, shape, epilogue)
    return int8.matmul(x, stream, bias, shape, activations, epilogue)


def _unpack(stream: Tensor, out: int, inputs: int, n: int, m: int, panel: int) -> Tensor:
    shape = shape_of(out, inputs, n, m, panel)
    int8.check_stream(stream, shape)
    return int8.dense(stream, shape)


LIBRARY.impl("matmul_int8", matmul_int8_cpu, "CPU")
LIBRARY.impl("unpack_int8", _unpack, "CPU")
for _key in ("CUDA", "MPS", "XPU"):
    LIBRARY.impl("matmul_int8", _matmul_any, _key)
    LIBRARY.impl("unpack_int8", _unpack, _key)


@torch.library.register_fake("nmflow::matmul_int8", lib=LIBRARY)
def _matmul_fake(x, stream, bias, out, inputs, n, m, panel, activations, epilogue):
    torch._check(x.shape[-1] == inputs, lambda: f"x has another last axis than {inputs}")
    for other in (stream, bias):
        if other is not None and other.device != x.device:
            _refuse(x, other, inputs)
    return x.new_empty((*x.shape[:-1], out))


@torch.library.register_fake("nmflow::unpack_int8", lib=LIBRARY)
def _unpack_fake(stream, out, inputs, n, m, panel):
    return stream.new_empty((out, inputs), dtype=torch.float32)


@register_vmap("nmflow::matmul_int8", lib=LIBRARY)
def _matmul_vmap(info, in_dims, x, stream, bias, *rest):
    refuse_batched_weights(in_dims[1])
    *numbers, epilogue = rest

    def multiply(x: Tensor, bias: Tensor | None, epilogue: int) -> Tensor:
        return _matmul(x, stream, bias, *numbers, epilogue)

    return over_batch(multiply, x, in_dims[0], bias, in_dims[2], epilogue)


_matmul = torch.ops.nmflow.matmul_int8.default
_unpack_op = torch.ops.nmflow.unpack_int8.default


class _Differentiable(torch.autograd.Function):
    """`x Wᵀ + bias` with gradients for x and bias, which ignore the rounding of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, stream: Tensor, bias: Tensor | None, shape: tuple[int, ...],
                activations: int) -> Tensor:  # fmt: skip
        return _matmul(x, stream, bias, *shape, activations, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.shape = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0]
        weight = _unpack_op(*ctx.saved_tensors, *ctx.shape).to(grad.dtype)
        wanted = ctx.needs_input_grad
        of_x, of_bias = gradients(grad, weight, wanted[0], wanted[2])
        return of_x, None, of_bias, None, None


def matmul_int8(
    x: Tensor, stream: Tensor, bias: Tensor | None, shape: tuple[int, ...], activations: int = 0,
    epilogue: int = 0,
) -> Tensor:  # fmt: skip
    """Multiply by a packed weight with 8-bit values: `y = epilogue(x Wᵀ + bias)`.

    With gradients for x and bias; rounding x counts as the identity. Under autocast y has the dtype
    of autocast, as with `F.linear`.

    Args:
        x: `(..., inputs)`, any float.
        stream: the weight, see `nmflow.kernels.int8`.
        bias: `(out,)` of x's dtype, or None.
        shape: `(out, inputs, n, m, panel)`.
        activations: 1 rounds each token to 8 bits and multiplies whole numbers; 0 floats.
        epilogue: the number of one of `reference.EPILOGUES`; 0 is none.

    Returns:
        `(..., out)`, of x's dtype.

    Raises:
        CompressError: sizes or dtypes that do not fit.
    """
    wants = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not wants and is_plain_call(x, stream):
        out, inputs, n, m, panel = shape
        return matmul_int8_cpu(x, stream, bias, out, inputs, n, m, panel, activations, epilogue)
    to = autocast_dtype(x, x)
    if to is not None:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(to) if x.is_cuda else x  # whose kernels take no float32
            bias = None if bias is None else bias.to(x.dtype)
            return matmul_int8(x, stream, bias, shape, activations, epilogue).to(to)
    if wants:
        y = _Differentiable.apply(x, stream, bias, shape, activations)
        return reference.apply_epilogue(y, epilogue)
    return _matmul(x, stream, bias, *shape, activations, epilogue)


def unpack_int8(stream: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dense matrix `(out, inputs)` of a packed weight with 8-bit values, exact in float32."""
    return _unpack_op(stream, *shape)
