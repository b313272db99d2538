"""The compiled CPU kernels: `nmflow_matmul` of the C ABI that `csrc/common/nmflow.h` documents."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nmflow import native
from nmflow.errors import CompressError, FileFormatError

if TYPE_CHECKING:
    from nmflow.kernels.backend import Call
    from nmflow.kernels.layout import Shape

KERNELS = ("auto", "gather", "tokens", "permute", "tiles", "panel", "dot")
TILES = "tiles"


class ShapeStruct(ctypes.Structure):
    """`nmflow_shape` of the C ABI."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("out", "in")),
        *((name, ctypes.c_int32) for name in ("n", "m", "panel", "dtype")),
    ]

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype) -> ShapeStruct:
        """The numbers of a shape."""
        return cls(shape.out, shape.inputs, shape.n, shape.m, shape.panel, native.DTYPES[dtype])


class PackedStruct(ctypes.Structure):
    """`nmflow_packed` of the C ABI."""

    _fields_ = [
        ("shape", ShapeStruct),
        *(("values", ctypes.c_void_p), ("values_bytes", ctypes.c_int64)),
        *(("codes", ctypes.c_void_p), ("codes_bytes", ctypes.c_int64)),
    ]

    @classmethod
    def of(cls, values: Tensor, codes: Tensor, shape: Shape) -> PackedStruct:
        """The addresses of two buffers, which must outlive it; raises `CompressError`."""
        for buffer in (values, codes):
            if not buffer.is_contiguous() or buffer.data_ptr() % buffer.element_size():
                raise CompressError(
                    "buffers of a packed weight are read by address: pass contiguous, aligned "
                    "tensors, such as buffer.contiguous().clone()"
                )
        numbers = ShapeStruct.of(shape, values.dtype)
        return cls(numbers, values.data_ptr(), values.nbytes, codes.data_ptr(), codes.nbytes)


@functools.cache
def lib() -> ctypes.CDLL:
    """The native library, its functions for packed weights declared."""
    library = native.library()
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.nmflow_validate.argtypes = [pointer]
    library.nmflow_matmul.argtypes = [
        *(pointer, pointer, i64, pointer, pointer, i64, i64, i32, i32, i32),
    ]
    library.nmflow_matmul_turned.argtypes = [
        *(pointer, pointer, i64, pointer, pointer, i64, i64, i32, i32, i32),
    ]
    library.nmflow_choose.argtypes = [pointer, i64]
    library.nmflow_int8_bytes.argtypes = [pointer, pointer]
    library.nmflow_int8_validate.argtypes = [pointer]
    library.nmflow_int8_matmul.argtypes = [
        *(pointer, i32, pointer, i64, pointer, pointer, i64, i64, i32, i32, i32),
    ]
    library.nmflow_int8_choose.argtypes = [pointer, i32, i64]
    library.nmflow_int8_isa.argtypes = [pointer, i32, i64]
    library.nmflow_int8_isa.restype = ctypes.c_char_p
    return library


def validate(values: Tensor, codes: Tensor, shape: Shape) -> None:
    """Check a tiled weight whole: sizes, every code, nothing in the padding.

    Raises:
        FileFormatError: it is not a weight of this shape and pattern.
    """
    status = lib().nmflow_validate(ctypes.byref(PackedStruct.of(values, codes, shape)))
    if status:
        raise FileFormatError(f"{name_of(shape)} {native.REASONS[status]}")


# The interface of a backend, see `backend`.


def why_not(call: Call) -> str | None:
    """None if these kernels serve the call, else the reason in words."""
    if call.device != "cpu":
        return f"x is on {call.device} and the compiled kernels run on the CPU"
    if not native.available():
        return f"the native library is not available: {native.why_not()}"
    if call.dtype not in native.DTYPES:
        return f"dtype {call.dtype} is not float32, bfloat16 or float16"
    number = _choose(call)
    return None if number >= 0 else f"the weight {native.REASONS[number]}"


def kernel(call: Call) -> str:
    """The instruction set and the kernel that would run, such as "avx512 tokens"."""
    isa, name = native.isa(), KERNELS[_choose(call)]
    if call.values:
        shape = ctypes.byref(ShapeStruct.of(call.shape, call.dtype))
        isa = lib().nmflow_int8_isa(shape, call.rounds, max(call.tokens, 1)).decode()
    elif isa == "amx" and name != TILES:
        isa = "avx512"
    return f"{isa} {name}"


def _choose(call: Call) -> int:
    """The number of the kernel of `KERNELS`, or a negative status."""
    shape, tokens = ctypes.byref(ShapeStruct.of(call.shape, call.dtype)), max(call.tokens, 1)
    if call.values:
        return lib().nmflow_int8_choose(shape, call.rounds, tokens)
    return lib().nmflow_choose(shape, tokens)


def bind(values: Tensor, codes: Tensor, shape: Shape) -> Callable[..., None]:
    """Prepare one tiled weight, checked here once; its memory must outlive the result."""
    validate(values, codes, shape)
    weight = PackedStruct.of(values, codes, shape)
    run: Any = runner(functools.partial(lib().nmflow_matmul, ctypes.byref(weight)), shape)
    if shape.shared and values.dtype == torch.bfloat16:
        call = functools.partial(lib().nmflow_matmul_turned, ctypes.byref(weight))
        run.turned = turned_runner(call, shape)
    return run


def runner(call: Callable[..., int], shape: Shape) -> Callable[..., None]:
    """`run` as `backend` describes it, for a function of the C ABI that is bound to its weight.

    `run(x, bias, y, tokens, epilogue, kernel=0)` takes the number of a kernel of `KERNELS`, too.
    """
    inputs, out = shape.inputs, shape.out
    get_threads = torch.get_num_threads

    def run(
        x: Tensor, bias: Tensor | None, y: Tensor, tokens: int, epilogue: int, kernel: int = 0
    ) -> None:
        # A single row may have any stride, and tensors with more axes are contiguous.
        many = tokens > 1 and x.dim() == 2
        status = call(
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


def turned_runner(call: Callable[..., int], shape: Shape) -> Callable[..., bool]:
    """`run.turned` as `backend` describes it, by `nmflow_matmul_turned`."""
    numbers = ctypes.byref(ShapeStruct.of(shape, torch.bfloat16))

    def run(x: Tensor, bias: Tensor | None, y: Tensor, tokens: int, epilogue: int) -> bool:
        if KERNELS[lib().nmflow_choose(numbers, tokens)] != TILES:
            return False
        orders = [t.stride(0) == 1 and t.stride(1) >= tokens for t in (x, y)]
        rows = [t.stride(1) == 1 and t.stride(0) >= t.shape[1] for t in (x, y)]
        if not all(a or b for a, b in zip(orders, rows, strict=True)):
            return False
        status = call(
            *(x.data_ptr(), x.stride(1) if orders[0] else x.stride(0)),
            *(None if bias is None else bias.data_ptr(), y.data_ptr()),
            *(y.stride(1) if orders[1] else y.stride(0), tokens, orders[0] + 2 * orders[1]),
            *(epilogue, torch.get_num_threads()),
        )
        if status:
            raise CompressError(f"{name_of(shape)} {native.REASONS[status]}")
        return True

    return run


def name_of(shape: Shape) -> str:
    """The name of a weight in errors."""
    return f"packed weight of shape ({shape.out}, {shape.inputs}) at {shape.pattern}"
