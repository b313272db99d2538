"""The compiled CPU kernels on 8-bit values: `nmflow_int8_matmul` of `csrc/common/nmflow.h`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmflow import native
from nmflow.errors import FileFormatError
from nmflow.kernels.cpu import ShapeStruct, lib, name_of, runner

if TYPE_CHECKING:
    from nmflow.kernels.layout import Shape


class Int8Struct(ctypes.Structure):
    """`nmflow_int8` of the C ABI."""

    _fields_ = [("shape", ShapeStruct), ("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]

    @classmethod
    def of(cls, stream: Tensor, shape: Shape, dtype: torch.dtype) -> Int8Struct:
        """The address of a stream, which must outlive it, for inputs of a dtype."""
        return cls(ShapeStruct.of(shape, dtype), stream.data_ptr(), stream.nbytes)


def bind(stream: Tensor, shape: Shape, dtype: torch.dtype, activations: int) -> Callable[..., None]:
    """Prepare one weight for inputs of a dtype, checked here once; its memory must outlive it.

    Raises:
        FileFormatError: the stream is not a weight of this shape and pattern.
    """
    address = ctypes.byref(Int8Struct.of(stream, shape, dtype))
    if status := lib().nmflow_int8_validate(address):
        raise FileFormatError(f"{name_of(shape)} {native.REASONS[status]}")
    return runner(functools.partial(lib().nmflow_int8_matmul, address, activations), shape)
