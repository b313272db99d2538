"""The compiled kernels for training on kept places: forward, and both gradients."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from nmflow import native
from nmflow.errors import CompressError
from nmflow.kernels import cpu
from nmflow.kernels.cpu import PackedStruct, ShapeStruct, name_of
from nmflow.kernels.layout import Shape

NOT_KEPT = 2


@functools.cache
def _lib() -> ctypes.CDLL:
    """The native library, its functions for training steps declared."""
    library = cpu.lib()
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.nmflow_trains.argtypes = [pointer]
    library.nmflow_pack.argtypes = [pointer, pointer, pointer, pointer, i64, pointer, i64, i32]
    library.nmflow_input_grad.argtypes = [pointer, pointer, pointer, i64, i32]
    library.nmflow_weight_grad.argtypes = [*[pointer] * 5, i64, i32]
    library.nmflow_bf16_trains.argtypes = [pointer]
    library.nmflow_bf16_input_grad.argtypes = [pointer, pointer, pointer, i64, i32]
    library.nmflow_bf16_weight_grad.argtypes = [*[pointer] * 5, i64, i32]
    return library


def why_not(shape: Shape) -> str:
    """Why no kernel trains a weight of this shape and pattern here, in one clause; or ""."""
    if not native.available():
        return f"the compiled library is missing: {native.why_not()}"
    if native.isa() == "portable":
        return f"the kernels of training steps need AVX2, and {native.isa()} is in use"
    status = _lib().nmflow_trains(ctypes.byref(ShapeStruct.of(shape, torch.float32)))
    return f"the weight {native.REASONS[status]}" if status else ""


def why_not_dtypes(x: torch.dtype, weight: torch.dtype) -> str:
    """Why no kernel serves an x and a weight of these dtypes, in one clause; or ""."""
    if x in (weight, torch.bfloat16) and weight in (torch.float32, torch.bfloat16):
        return ""
    return f"it was called with {x} on weights of {weight}"


def halves(shape: Shape) -> bool:
    """Whether both gradients have kernels in bfloat16, for a shape whose `why_not` is ""."""
    numbers = ShapeStruct.of(shape, torch.bfloat16)
    return _lib().nmflow_bf16_trains(ctypes.byref(numbers)) == 0


def halved(values: Tensor, shape: Shape) -> Tensor:
    """Tiled float32 values as tiled bfloat16 values, which are stored in pairs."""
    tiles, entries, lanes = values.shape
    pairs = values.new_zeros(shape.tiled_sizes(torch.bfloat16)[0], dtype=torch.bfloat16)
    whole = entries // 2 * 2
    pairs[:, : whole // 2] = values[:, :whole].view(tiles, -1, 2, lanes).transpose(2, 3)
    if entries > whole:
        pairs[:, -1, :, 0] = values[:, -1]
    return pairs


def pack(weight: Tensor, kept: Tensor | None, shape: Shape) -> tuple[Tensor, Tensor, bool]:
    """Pack the kept places of a weight in one pass: those that are not 0, and those in `kept`.

    Args:
        weight: `(out, inputs)`, float32, contiguous.
        kept: its mask as bits, see `masks.kept_values.to_bits`; or None.
        shape: its shape and pattern, for which `why_not` is "".

    Returns:
        The tiled values and codes, and whether every group keeps at most N. If not, both are zero.
    """
    sizes = shape.tiled_sizes(torch.float32)
    values, codes = weight.new_empty(sizes[0]), weight.new_empty(sizes[1], dtype=shape.code_dtype())
    status = _lib().nmflow_pack(
        *(ctypes.byref(ShapeStruct.of(shape, torch.float32)), weight.data_ptr()),
        *(None if kept is None else kept.data_ptr(), values.data_ptr(), values.nbytes),
        *(codes.data_ptr(), codes.nbytes, torch.get_num_threads()),
    )
    if status == NOT_KEPT:
        return values.zero_(), codes.zero_(), False
    _check(status, shape)
    return values, codes, True


def forward(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """`x Wᵀ + bias` of rows `(tokens, inputs)`."""
    y = x.new_empty(len(x), shape.out)
    status = _lib().nmflow_matmul(
        *(ctypes.byref(PackedStruct.of(values, codes, shape)), x.data_ptr(), shape.inputs),
        *(None if bias is None else bias.data_ptr(), y.data_ptr(), shape.out, len(x)),
        *(0, torch.get_num_threads(), 0),
    )
    _check(status, shape)
    return y


def input_grad(dy: Tensor, values: Tensor, codes: Tensor, shape: Shape) -> Tensor:
    """`dy W` of rows `(tokens, out)`, of the values' dtype."""
    dx = dy.new_empty(len(dy), shape.inputs)
    packed = ctypes.byref(PackedStruct.of(values, codes, shape))
    half, lib, threads = values.dtype == torch.bfloat16, _lib(), torch.get_num_threads()
    call = lib.nmflow_bf16_input_grad if half else lib.nmflow_input_grad
    _check(call(packed, dy.data_ptr(), dx.data_ptr(), len(dy), threads), shape)
    return dx


def weight_grad(
    x: Tensor, dy: Tensor, values: Tensor, codes: Tensor, shape: Shape, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """`dyᵀ x` at the kept places and 0 elsewhere, and the sum of dy if asked for.

    x and dy are of the values' dtype, and both results float32.
    """
    dw = x.new_empty(shape.out, shape.inputs, dtype=torch.float32)
    bias = dw.new_empty(shape.out) if with_bias else None
    half = values.dtype == torch.bfloat16
    call = _lib().nmflow_bf16_weight_grad if half else _lib().nmflow_weight_grad
    status = call(
        *(ctypes.byref(PackedStruct.of(values, codes, shape)), x.data_ptr(), dy.data_ptr()),
        *(dw.data_ptr(), None if bias is None else bias.data_ptr(), len(x)),
        torch.get_num_threads(),
    )
    _check(status, shape)
    return dw, bias


def _check(status: int, shape: Shape) -> None:
    if status:
        raise CompressError(f"{name_of(shape)} {native.REASONS[status]}")


def isa() -> str:
    """The instruction set in use, which tests may cap; "" without the library."""
    return native.isa() if native.available() else ""
