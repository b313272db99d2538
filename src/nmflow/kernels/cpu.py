"""The compiled CPU kernels on torch tensors: multiply with a packed weight.

What a packed weight is, and the ways to and from one, are in `cpu_layout`; the C ABI beneath both
is documented in `csrc/nmflow.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmflow import native
from nmflow.errors import CompressError
from nmflow.kernels.cpu_layout import (
    Packed,
    canonical,
    check,
    dense,
    from_canonical,
    lib,
    name_of,
    pack,
    packed_struct,
    shape_struct,
    sizes,
    struct_of,
    supports,
    to_canonical,
    unpack,
    validate,
)

if TYPE_CHECKING:
    from nmflow.kernels.backend import Call
    from nmflow.kernels.layout import Shape

__all__ = [
    "EPILOGUES",
    "KERNELS",
    "Packed",
    "bind",
    "canonical",
    "choose",
    "dense",
    "from_canonical",
    "kernel",
    "matmul",
    "pack",
    "sizes",
    "struct_of",
    "supports",
    "to_canonical",
    "unpack",
    "validate",
    "why_not",
]

EPILOGUES = ("none", "gelu", "relu")
KERNELS = ("auto", "gather", "tokens", "permute", "tiles", "panel")


def choose(packed: Packed, tokens: int) -> str:
    """Name of the kernel that `matmul` takes for this many tokens."""
    struct = packed_struct(packed)
    number = lib().nmflow_choose(struct, tokens)
    if number < 0:
        check(number, name_of(packed))
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
    status = lib().nmflow_matmul(
        *(packed_struct(packed), x.data_ptr(), packed.inputs),
        None if bias is None else bias.data_ptr(),
        *(y.data_ptr(), packed.out, x.numel() // packed.inputs),
        *(EPILOGUES.index(epilogue), threads or torch.get_num_threads(), KERNELS.index(kernel)),
    )
    if status:
        check(status, f"{name_of(packed)} with kernel {kernel!r}")
    return y


# What the registry asks of a backend (`backend` states the contract).


def why_not(call: Call) -> str | None:
    """None if these kernels serve the call, else the reason in words."""
    if call.device != "cpu":
        return f"x is on {call.device} and the compiled kernels run on the CPU"
    return supports(call.dtype, call.shape.pattern) or None


def kernel(call: Call) -> str:
    """The instruction set and the kernel that would run, such as "avx512 tokens"."""
    s = call.shape
    shape = shape_struct(s.out, s.inputs, s.pattern, call.dtype)
    number = lib().nmflow_choose(ctypes.byref(shape), max(call.tokens, 1))
    if number < 0:
        check(number, f"weight of shape ({s.out}, {s.inputs}) at {s.pattern}")
    return f"{native.isa()} {KERNELS[number]}"


def bind(
    values: Tensor, codes: Tensor, shape: Shape
) -> Callable[[Tensor, Tensor | None, Tensor, int, int], None]:
    """Prepare one weight in kernel layout, checked here once; the result runs it."""
    pattern = shape.pattern
    packed = Packed(values.view(-1), codes.view(-1), shape.out, shape.inputs, pattern)
    validate(packed)
    struct, call = packed_struct(packed), lib().nmflow_matmul
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
            check(status, f"packed weight of shape ({out}, {inputs}) at {pattern}")

    return run
