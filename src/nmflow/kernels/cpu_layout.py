"""Packed weights of the compiled CPU kernels: the two forms, conversions and checks.

Thin Python over the C ABI of `csrc/nmflow.h`, which documents the two forms of a packed weight:
*canonical* (what files store: values `(out, S)` in column order and uint8 indices inside their
groups, S = in / M * N) and the *kernel layout* (what a module holds: two flat buffers that every
kernel reads). Conversions between them and dense keep the exact bits of kept values; places that
are not kept come back as +0.0.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from nmflow import native
from nmflow.errors import CompressError, FileFormatError
from nmflow.pattern import Pattern

LAYOUT_VERSION = 1


class ShapeStruct(ctypes.Structure):
    """`nmflow_shape` of the C ABI."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("out", "in")),
        *((name, ctypes.c_int32) for name in ("n", "m", "panel", "dtype")),
    ]


class PackedStruct(ctypes.Structure):
    """`nmflow_packed` of the C ABI."""

    _fields_ = [
        ("shape", ShapeStruct),
        *(("values", ctypes.c_void_p), ("values_bytes", ctypes.c_int64)),
        *(("codes", ctypes.c_void_p), ("codes_bytes", ctypes.c_int64)),
    ]


@functools.cache
def lib() -> ctypes.CDLL:
    """The native library, its functions for packed weights declared."""
    library = native.library()
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.nmflow_sizes.argtypes = [pointer] * 5
    library.nmflow_canonical_from_dense.argtypes = [pointer, pointer, i64, pointer, pointer]
    library.nmflow_dense_from_canonical.argtypes = [
        *(pointer, pointer, i64, pointer, i64, pointer, i64),
    ]
    library.nmflow_packed_from_canonical.argtypes = [
        *(pointer, pointer, i64, pointer, i64, pointer, i64, pointer, i64),
    ]
    library.nmflow_canonical_from_packed.argtypes = [pointer, pointer, i64, pointer, i64]
    library.nmflow_validate.argtypes = [pointer]
    library.nmflow_matmul.argtypes = [
        *(pointer, pointer, i64, pointer, pointer, i64, i64, i32, i32, i32),
    ]
    library.nmflow_choose.argtypes = [pointer, i64]
    return library


@dataclass(frozen=True)
class Packed:
    """A weight in kernel layout.

    Args:
        values: 1-D tensor of the weight's dtype.
        codes: 1-D tensor, uint8 (or int32 words, the same bytes).
        out: output rows.
        inputs: input columns, a multiple of M.
        pattern: N of every M kept, panels of V rows.
    """

    values: Tensor
    codes: Tensor
    out: int
    inputs: int
    pattern: Pattern

    def __post_init__(self) -> None:
        for buffer in (self.values, self.codes):
            if not buffer.is_contiguous() or buffer.data_ptr() % buffer.element_size():
                raise CompressError(
                    "buffers of a packed weight are read by address: pass contiguous, aligned "
                    "tensors, such as buffer.contiguous().clone()"
                )

    @property
    def nbytes(self) -> int:
        """Bytes held, values and codes."""
        return self.values.nbytes + self.codes.nbytes


def supports(dtype: torch.dtype, pattern: Pattern) -> str:
    """Why the compiled kernels cannot serve this weight, in one clause; empty if they can."""
    if not native.available():
        return f"the native library is not available: {native.why_not()}"
    if dtype not in native.DTYPES:
        return f"dtype {dtype} is not float32, bfloat16 or float16"
    if pattern.m > 256:
        return f"M is {pattern.m}, above 256"
    return ""


def shape_struct(out: int, inputs: int, pattern: Pattern, dtype: torch.dtype) -> ShapeStruct:
    """The C struct of a shape; raises `CompressError` for what cannot be packed."""
    why = supports(dtype, pattern)
    if why:
        raise CompressError(f"weight cannot be packed: {why}")
    if out >= 2**40 or inputs >= 2**40 or pattern.panel >= 2**31:
        raise CompressError(f"weight of shape ({out}, {inputs}) at {pattern} is too large to pack")
    return ShapeStruct(out, inputs, pattern.n, pattern.m, pattern.panel, native.DTYPES[dtype])


def check(status: int, what: str, error: type = CompressError) -> None:
    """Raise `error` for a status of the C ABI that is not zero."""
    if status:
        raise error(f"{what} {native.REASONS[status]}")


def sizes(out: int, inputs: int, pattern: Pattern, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Bytes of the kernel layout's values and codes, and of the canonical values and indices.

    Raises:
        CompressError: a shape, dtype or pattern that the layout cannot hold.
    """
    shape = shape_struct(out, inputs, pattern, dtype)
    found = [ctypes.c_int64() for _ in range(4)]
    status = lib().nmflow_sizes(ctypes.byref(shape), *(ctypes.byref(size) for size in found))
    check(status, f"weight of shape ({out}, {inputs}) at {pattern}")
    a, b, c, d = (size.value for size in found)
    return a, b, c, d


def canonical(w: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Canonical form of a dense weight that holds `pattern`.

    Args:
        w: CPU tensor (out, in), float32, bfloat16 or float16.
        pattern: at most N non-zeros of every M inputs; panels share their columns.

    Returns:
        Values (out, S) and indices uint8 (out, S), or (ceil(out / panel), S) for panels.

    Raises:
        CompressError: the weight does not hold the pattern, or cannot be packed.
    """
    if w.dim() != 2 or w.device.type != "cpu":
        raise CompressError(f"weight is {tuple(w.shape)} on {w.device}: pass a 2-D CPU tensor")
    w = w.detach().contiguous()
    out, inputs = w.shape
    shape = shape_struct(out, inputs, pattern, w.dtype)
    size = sizes(out, inputs, pattern, w.dtype)
    entries = inputs // pattern.m * pattern.n
    values = torch.empty(out, entries, dtype=w.dtype)
    index = torch.empty(size[3] // entries, entries, dtype=torch.uint8)
    status = lib().nmflow_canonical_from_dense(
        ctypes.byref(shape), w.data_ptr(), inputs, values.data_ptr(), index.data_ptr()
    )
    check(status, f"weight of shape ({out}, {inputs}) at {pattern}")
    return values, index


def dense(values: Tensor, index: Tensor, inputs: int, pattern: Pattern) -> Tensor:
    """Dense weight (out, in) of a canonical form.

    Raises:
        FileFormatError: sizes that do not fit, an index out of range or out of order.
        CompressError: a shape, dtype or pattern that the layout cannot hold.
    """
    values, index = values.contiguous(), _bytes(index)
    out = values.shape[0]
    shape = shape_struct(out, inputs, pattern, values.dtype)
    sizes(out, inputs, pattern, values.dtype)
    w = torch.empty(out, inputs, dtype=values.dtype)
    status = lib().nmflow_dense_from_canonical(
        *(ctypes.byref(shape), values.data_ptr(), values.nbytes),
        *(index.data_ptr(), index.nbytes, w.data_ptr(), inputs),
    )
    check(status, f"packed weight of shape ({out}, {inputs}) at {pattern}", FileFormatError)
    return w


def from_canonical(values: Tensor, index: Tensor, inputs: int, pattern: Pattern) -> Packed:
    """Kernel layout of a canonical form, its indices checked.

    Raises:
        FileFormatError: sizes that do not fit, an index out of range or out of order.
        CompressError: a shape, dtype or pattern that the layout cannot hold.
    """
    values, index = values.contiguous(), _bytes(index)
    out = values.shape[0]
    shape = shape_struct(out, inputs, pattern, values.dtype)
    size = sizes(out, inputs, pattern, values.dtype)
    what = f"packed weight of shape ({out}, {inputs}) at {pattern}"
    if (values.nbytes, index.nbytes) != size[2:]:
        raise FileFormatError(f"{what} {native.REASONS[-5]}")
    to = torch.empty(size[0] // values.element_size(), dtype=values.dtype)
    codes = torch.empty(size[1], dtype=torch.uint8)
    status = lib().nmflow_packed_from_canonical(
        *(ctypes.byref(shape), values.data_ptr(), values.nbytes),
        *(index.data_ptr(), index.nbytes, to.data_ptr(), to.nbytes, codes.data_ptr(), codes.nbytes),
    )
    check(status, what, FileFormatError)
    return Packed(to, codes, out, inputs, pattern)


def to_canonical(packed: Packed) -> tuple[Tensor, Tensor]:
    """Canonical form of a kernel-layout weight, checked first.

    Raises:
        FileFormatError: the buffers are not a weight of this shape and pattern.
    """
    entries = packed.inputs // packed.pattern.m * packed.pattern.n
    size = sizes(packed.out, packed.inputs, packed.pattern, packed.values.dtype)
    values = torch.empty(packed.out, entries, dtype=packed.values.dtype)
    index = torch.empty(size[3] // entries, entries, dtype=torch.uint8)
    status = lib().nmflow_canonical_from_packed(
        packed_struct(packed), values.data_ptr(), values.nbytes, index.data_ptr(), index.nbytes
    )
    check(status, name_of(packed), FileFormatError)
    return values, index


def pack(w: Tensor, pattern: Pattern) -> Packed:
    """Kernel layout of a dense weight (out, in) that holds `pattern`.

    Raises:
        CompressError: the weight does not hold the pattern, or cannot be packed.
    """
    values, index = canonical(w, pattern)
    return from_canonical(values, index, w.shape[1], pattern)


def unpack(packed: Packed) -> Tensor:
    """Dense weight (out, in): kept values bit for bit, +0.0 elsewhere.

    Raises:
        FileFormatError: the buffers are not a weight of this shape and pattern.
    """
    values, index = to_canonical(packed)
    return dense(values, index, packed.inputs, packed.pattern)


def validate(packed: Packed) -> None:
    """Check a kernel-layout weight whole: sizes, every code, nothing in the padding.

    Raises:
        FileFormatError: it is not a weight of this shape and pattern.
    """
    check(lib().nmflow_validate(packed_struct(packed)), name_of(packed), FileFormatError)


def _bytes(index: Tensor) -> Tensor:
    if index.dtype != torch.uint8:
        raise FileFormatError(f"index is {index.dtype}: it must be torch.uint8")
    return index.contiguous()


def name_of(packed: Packed) -> str:
    """How errors call the weight."""
    return f"packed weight of shape ({packed.out}, {packed.inputs}) at {packed.pattern}"


def packed_struct(packed: Packed) -> ctypes.c_void_p:
    """Address of the C struct of a packed weight, for as long as its buffers live."""
    values, codes, pattern = packed.values, packed.codes, packed.pattern
    return struct_of(
        *(values.data_ptr(), values.numel(), values.dtype, codes.data_ptr(), codes.nbytes),
        *(packed.out, packed.inputs, pattern.n, pattern.m, pattern.panel),
    )


@functools.lru_cache(maxsize=4096)
def struct_of(
    values: int,
    count: int,
    dtype: torch.dtype,
    codes: int,
    codes_bytes: int,
    out: int,
    inputs: int,
    n: int,
    m: int,
    panel: int,
) -> ctypes.c_void_p:
    """Address of the C struct for two buffers; built once for a weight, not once a call."""
    bytes_each = 4 if dtype == torch.float32 else 2
    shape = shape_struct(out, inputs, Pattern.of(n, m, panel), dtype)
    struct = PackedStruct(shape, values, count * bytes_each, codes, codes_bytes)
    address = ctypes.c_void_p(ctypes.addressof(struct))
    address.owner = struct  # type: ignore[attr-defined]
    return address
