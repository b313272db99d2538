"""The compiled CPU kernels on torch tensors: pack, unpack, multiply.

Thin Python over the C ABI of `csrc/nmflow.h`, which documents the two forms of a packed weight:
*canonical* (what files store: values `(out, S)` in column order and uint8 indices inside their
groups, S = in / M * N) and the *kernel layout* (what a module holds: two flat buffers that every
kernel reads). Conversions between them and dense keep the exact bits of kept values; places that
are not kept come back as +0.0.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmflow import native
from nmflow.errors import CompressError, FileFormatError
from nmflow.pattern import Pattern

if TYPE_CHECKING:
    from nmflow.kernels.layout import Shape
    from nmflow.kernels.registry import Call

LAYOUT_VERSION = 1
EPILOGUES = ("none", "gelu", "relu")
KERNELS = ("auto", "gather", "tokens", "permute", "dot", "panel")


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("out", "in")),
        *((name, ctypes.c_int32) for name in ("n", "m", "panel", "dtype")),
    ]


class _PackedStruct(ctypes.Structure):
    _fields_ = [
        ("shape", _Shape),
        *(("values", ctypes.c_void_p), ("values_bytes", ctypes.c_int64)),
        *(("codes", ctypes.c_void_p), ("codes_bytes", ctypes.c_int64)),
    ]


@functools.cache
def _lib() -> ctypes.CDLL:
    lib = native.library()
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    lib.nmflow_sizes.argtypes = [pointer] * 5
    lib.nmflow_canonical_from_dense.argtypes = [pointer, pointer, i64, pointer, pointer]
    lib.nmflow_dense_from_canonical.argtypes = [
        *(pointer, pointer, i64, pointer, i64, pointer, i64),
    ]
    lib.nmflow_packed_from_canonical.argtypes = [
        *(pointer, pointer, i64, pointer, i64, pointer, i64, pointer, i64),
    ]
    lib.nmflow_canonical_from_packed.argtypes = [pointer, pointer, i64, pointer, i64]
    lib.nmflow_validate.argtypes = [pointer]
    lib.nmflow_matmul.argtypes = [
        *(pointer, pointer, i64, pointer, pointer, i64, i64, i32, i32, i32),
    ]
    lib.nmflow_choose.argtypes = [pointer, i64]
    return lib


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


def _shape(out: int, inputs: int, pattern: Pattern, dtype: torch.dtype) -> _Shape:
    why = supports(dtype, pattern)
    if why:
        raise CompressError(f"weight cannot be packed: {why}")
    if out >= 2**40 or inputs >= 2**40 or pattern.panel >= 2**31:
        raise CompressError(f"weight of shape ({out}, {inputs}) at {pattern} is too large to pack")
    return _Shape(out, inputs, pattern.n, pattern.m, pattern.panel, native.DTYPES[dtype])


def _check(status: int, what: str, error: type = CompressError) -> None:
    if status:
        raise error(f"{what} {native.REASONS[status]}")


def sizes(out: int, inputs: int, pattern: Pattern, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Bytes of the kernel layout's values and codes, and of the canonical values and indices.

    Raises:
        CompressError: a shape, dtype or pattern that the layout cannot hold.
    """
    shape = _shape(out, inputs, pattern, dtype)
    found = [ctypes.c_int64() for _ in range(4)]
    status = _lib().nmflow_sizes(ctypes.byref(shape), *(ctypes.byref(size) for size in found))
    _check(status, f"weight of shape ({out}, {inputs}) at {pattern}")
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
    shape = _shape(out, inputs, pattern, w.dtype)
    size = sizes(out, inputs, pattern, w.dtype)
    entries = inputs // pattern.m * pattern.n
    values = torch.empty(out, entries, dtype=w.dtype)
    index = torch.empty(size[3] // entries, entries, dtype=torch.uint8)
    status = _lib().nmflow_canonical_from_dense(
        ctypes.byref(shape), w.data_ptr(), inputs, values.data_ptr(), index.data_ptr()
    )
    _check(status, f"weight of shape ({out}, {inputs}) at {pattern}")
    return values, index


def dense(values: Tensor, index: Tensor, inputs: int, pattern: Pattern) -> Tensor:
    """Dense weight (out, in) of a canonical form.

    Raises:
        FileFormatError: sizes that do not fit, an index out of range or out of order.
        CompressError: a shape, dtype or pattern that the layout cannot hold.
    """
    values, index = values.contiguous(), _bytes(index)
    out = values.shape[0]
    shape = _shape(out, inputs, pattern, values.dtype)
    sizes(out, inputs, pattern, values.dtype)
    w = torch.empty(out, inputs, dtype=values.dtype)
    status = _lib().nmflow_dense_from_canonical(
        *(ctypes.byref(shape), values.data_ptr(), values.nbytes),
        *(index.data_ptr(), index.nbytes, w.data_ptr(), inputs),
    )
    _check(status, f"packed weight of shape ({out}, {inputs}) at {pattern}", FileFormatError)
    return w


def from_canonical(values: Tensor, index: Tensor, inputs: int, pattern: Pattern) -> Packed:
    """Kernel layout of a canonical form, its indices checked.

    Raises:
        FileFormatError: sizes that do not fit, an index out of range or out of order.
        CompressError: a shape, dtype or pattern that the layout cannot hold.
    """
    values, index = values.contiguous(), _bytes(index)
    out = values.shape[0]
    shape = _shape(out, inputs, pattern, values.dtype)
    size = sizes(out, inputs, pattern, values.dtype)
    what = f"packed weight of shape ({out}, {inputs}) at {pattern}"
    if (values.nbytes, index.nbytes) != size[2:]:
        raise FileFormatError(f"{what} {native.REASONS[-5]}")
    to = torch.empty(size[0] // values.element_size(), dtype=values.dtype)
    codes = torch.empty(size[1], dtype=torch.uint8)
    status = _lib().nmflow_packed_from_canonical(
        *(ctypes.byref(shape), values.data_ptr(), values.nbytes),
        *(index.data_ptr(), index.nbytes, to.data_ptr(), to.nbytes, codes.data_ptr(), codes.nbytes),
    )
    _check(status, what, FileFormatError)
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
    status = _lib().nmflow_canonical_from_packed(
        _struct(packed), values.data_ptr(), values.nbytes, index.data_ptr(), index.nbytes
    )
    _check(status, _name(packed), FileFormatError)
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
    _check(_lib().nmflow_validate(_struct(packed)), _name(packed), FileFormatError)


def choose(packed: Packed, tokens: int) -> str:
    """Name of the kernel that `matmul` takes for this many tokens."""
    struct = _struct(packed)
    number = _lib().nmflow_choose(struct, tokens)
    if number < 0:
        _check(number, _name(packed))
    return KERNELS[number]


def matmul(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    epilogue: str = "none",
    kernel: str = "auto",
    threads: int | None = None,
) -> Tensor:
    r"""Multiply with a packed weight: `y = epilogue(x @ W.T + bias)`.

    Accumulates in fp32 and rounds once to the dtype.

    Args:
        x: CPU tensor (..., in) of the weight's dtype.
        packed: the weight, (out, in).
        bias: (out,) of the weight's dtype, or None.
        epilogue: "none", "gelu" (erf) or "relu".
        kernel: one of `KERNELS`; "auto" lets the library choose.
        threads: at most this many; `torch.get_num_threads()` by default.

    Returns:
        y, (..., out), contiguous.

    Raises:
        CompressError: a shape, dtype or device that does not fit, or a kernel that does not serve
            this case on this machine.
    """
    if x.dtype != packed.values.dtype or x.device.type != "cpu" or x.shape[-1] != packed.inputs:
        raise CompressError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}: the weight needs "
            f"{packed.values.dtype} (..., {packed.inputs}) on the CPU"
        )
    if bias is not None:
        if bias.dtype != x.dtype or bias.shape != (packed.out,) or bias.device.type != "cpu":
            raise CompressError(
                f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}: it must be {x.dtype} "
                f"({packed.out},) on the CPU"
            )
        bias = bias.contiguous()
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], packed.out, dtype=x.dtype)
    status = _lib().nmflow_matmul(
        *(_struct(packed), x.data_ptr(), packed.inputs),
        None if bias is None else bias.data_ptr(),
        *(y.data_ptr(), packed.out, x.numel() // packed.inputs),
        *(EPILOGUES.index(epilogue), threads or torch.get_num_threads(), KERNELS.index(kernel)),
    )
    if status:
        _check(status, f"{_name(packed)} with kernel {kernel!r}")
    return y


# What the registry asks of a backend (its docstring states the contract).


def why_not(call: Call) -> str | None:
    """None if these kernels serve the call, else the reason in words."""
    if call.device != "cpu":
        return f"x is on {call.device} and the compiled kernels run on the CPU"
    return supports(call.dtype, call.shape.pattern) or None


def kernel(call: Call) -> str:
    """The instruction set and the kernel that would run, such as "avx512 tokens"."""
    s = call.shape
    shape = _shape(s.out, s.inputs, s.pattern, call.dtype)
    number = _lib().nmflow_choose(ctypes.byref(shape), max(call.tokens, 1))
    if number < 0:
        _check(number, f"weight of shape ({s.out}, {s.inputs}) at {s.pattern}")
    return f"{native.isa()} {KERNELS[number]}"


def bind(
    values: Tensor, codes: Tensor, shape: Shape
) -> Callable[[Tensor, Tensor | None, Tensor, int, int], None]:
    """Prepare one weight in kernel layout, checked here once; the result runs it."""
    pattern = shape.pattern
    packed = Packed(values.view(-1), codes.view(-1), shape.out, shape.inputs, pattern)
    validate(packed)
    struct, call = _struct(packed), _lib().nmflow_matmul
    inputs, out = shape.inputs, shape.out
    get_threads = torch.get_num_threads

    def run(x: Tensor, bias: Tensor | None, y: Tensor, tokens: int, epilogue: int) -> None:
        # A single row may carry any stride; only between rows does it mean something.
        many = tokens > 1
        status = call(
            struct,
            x.data_ptr(),
            x.stride(0) if many else inputs,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            y.stride(0) if many else out,
            tokens,
            epilogue,
            get_threads(),
            0,
        )
        if status:
            _check(status, f"packed weight of shape ({out}, {inputs}) at {pattern}")

    return run


def _bytes(index: Tensor) -> Tensor:
    if index.dtype != torch.uint8:
        raise FileFormatError(f"index is {index.dtype}: it must be torch.uint8")
    return index.contiguous()


def _name(packed: Packed) -> str:
    return f"packed weight of shape ({packed.out}, {packed.inputs}) at {packed.pattern}"


def _struct(packed: Packed) -> ctypes.c_void_p:
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
    shape = _shape(out, inputs, Pattern.of(n, m, panel), dtype)
    struct = _PackedStruct(shape, values, count * bytes_each, codes, codes_bytes)
    address = ctypes.c_void_p(ctypes.addressof(struct))
    address.owner = struct  # type: ignore[attr-defined]
    return address
