"""The compiled CPU kernels on 8-bit values: `nmflow_int8_matmul` of `csrc/common/nmflow.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmflow import native
from nmflow.errors import CompressError, FileFormatError
from nmflow.kernels.cpu import ShapeStruct, lib, name_of

if TYPE_CHECKING:
    from nmflow.kernels.layout import Shape


class Int8Struct(ctypes.Structure):
    """`nmflow_int8` of the C ABI."""

    _fields_ = [("shape", ShapeStruct), ("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]

    @classmethod
    def of(cls, stream: Tensor, shape: Shape, dtype: torch.dtype) -> Int8Struct:
        """The address of a stream, which must outlive it, for inputs of a dtype."""
        return cls(ShapeStruct.of(shape, dtype), stream.data_ptr(), stream.nbytes)


def bind(stream: Tensor, shape: Shape, dtype: torch.dtype) -> Callable[..., None]:
    """Prepare one weight for inputs of a dtype, checked here once.

    Returns:
        `run(x, bias, y, tokens, activations, epilogue, kernel=0)`, as `bind` of `backend`; the
        weight's memory must outlive it.

    Raises:
        FileFormatError: the stream is not a weight of this shape and pattern.
    """
    weight = Int8Struct.of(stream, shape, dtype)
    address, call = ctypes.byref(weight), lib().nmflow_int8_matmul
    if status := lib().nmflow_int8_validate(address):
        raise FileFormatError(f"{name_of(shape)} {native.REASONS[status]}")
    inputs, out, get_threads = shape.inputs, shape.out, torch.get_num_threads

    def run(
        x: Tensor, bias: Tensor | None, y: Tensor, tokens: int, activations: int, epilogue: int,
        kernel: int = 0,
    ) -> None:  # fmt: skip
        many = tokens > 1  # the stride of a single row means nothing
        status = call(
            address,
            activations,
            x.data_ptr(),
            x.stride(0) if many else inputs,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            y.stride(0) if many else out,
            tokens,
            epilogue,
            get_threads(),
            kernel,
        )
        if status:
            raise CompressError(f"{name_of(shape)} {native.REASONS[status]}")

    return run
