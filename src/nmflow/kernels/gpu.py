"""The backend of NVIDIA GPUs: few tokens by fragments, many by panels or a dense matrix.

Nothing waits for the device or allocates outside of torch's allocator, so calls can be captured in
a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nmflow.kernels import gpu_cuts, gpu_driver, gpu_panels, gpu_plan
from nmflow.kernels.backend import Call
from nmflow.kernels.gpu_driver import Launcher
from nmflow.kernels.gpu_plan import DTYPES, Kernel, Plan
from nmflow.kernels.layout import LANES, Shape
from nmflow.kernels.reference import apply_epilogue

_EXPAND = Kernel("expand.cu", "expand")
_ROW = 256  # threads of a block of `widen` and `ready`
_SPANS = 4  # blocks of `expand` write at least that many spans of codes

_MOST_EPILOGUE = 2  # of those that the GPU kernels apply


def why_not(call: Call) -> str | None:
    """None if these kernels serve the call, else the reason in words."""
    if call.device != "cuda":
        return f"x is on {call.device} and these kernels run on NVIDIA GPUs"
    if call.rounds:
        return "8-bit inputs have no kernel on GPUs"
    if call.dtype not in DTYPES:
        return f"tensor cores multiply bfloat16 and float16, and the weight is {call.dtype}"
    return gpu_driver.why_not()


def kernel(call: Call) -> str:
    """The name of the kernel that would run, such as "panel fragments"."""
    if _by_panels(call.shape, call.tokens):
        return "panels on gathered columns"
    if call.tokens <= gpu_plan.most_tokens(call.shape):
        return "panel fragments" if call.shape.shared else "rows in registers"
    why = gpu_plan.why_no_fragments(call.shape)
    return "rebuild the dense weight in one pass, cuBLAS" + (f": {why}" if why else "")


def bind(values: Tensor, codes: Tensor, shape: Shape) -> Callable[..., None]:
    """Prepare one weight; nothing is made of it, so nothing can grow old."""

    def run(x: Tensor, bias: Tensor | None, y: Tensor, tokens: int, epilogue: int) -> None:
        y.copy_(matmul(x, values, codes, bias, shape, epilogue))

    return run


def matmul(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape, epilogue: int = 0,
    launcher: Launcher | None = None,
) -> Tensor:  # fmt: skip
    """`epilogue(x Wᵀ + bias)` of a call that `why_not` lets pass; sums are float32, rounded once.

    Args:
        x: `(..., inputs)`.
        values: tiled values.
        codes: tiled codes.
        bias: `(out,)` or None.
        shape: sizes and pattern.
        epilogue: the number of one of `reference.EPILOGUES`; 0 is none.
        launcher: what runs kernels; None is the driver of the GPU that `x` is on.
    """
    if epilogue > _MOST_EPILOGUE:
        exact = matmul(x, values, codes, bias, shape, 0, launcher)
        return apply_epilogue(exact, epilogue)
    launcher = launcher or gpu_driver.driver(x.device.index)
    rows = x.reshape(-1, shape.inputs)
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty(*x.shape[:-1], shape.out)
    if _by_panels(shape, tokens):
        y = gpu_panels.matmul(rows, values, codes, bias, shape, epilogue, None, launcher)
        return y.view(*x.shape[:-1], shape.out)
    half = x.dtype == torch.float16
    plan = _planned(shape, half, tokens, launcher.card)
    if plan is None:
        dense = expand(values, codes, shape, launcher)
        return apply_epilogue(F.linear(x, dense, bias), epilogue)
    return _by_plan(x, _aligned(values), _aligned(codes), bias, shape, epilogue, plan, launcher)


def matmul_int8(
    x: Tensor, stream: Tensor, bias: Tensor | None, shape: Shape, epilogue: int = 0,
    launcher: Launcher | None = None,
) -> Tensor:  # fmt: skip
    """`epilogue(x Wᵀ + bias)` of a weight with 8-bit values, W[o] = scale[o] q[o]; as `matmul`.

    Few tokens are multiplied by q, and sums by the scale. For many, values are made of two bytes,
    rounded once, in a pass over what is packed.
    """
    if epilogue > _MOST_EPILOGUE:
        return apply_epilogue(matmul_int8(x, stream, bias, shape, 0, launcher), epilogue)
    launcher = launcher or gpu_driver.driver(x.device.index)
    tokens = x.numel() // shape.inputs
    half, plan = x.dtype == torch.float16, None
    if tokens and not _by_panels(shape, tokens):
        plan = _planned(shape, half, tokens, launcher.card, True)
    if plan is None:
        values, codes = widened(stream, shape, x.dtype, launcher)
        return matmul(x, values, codes, bias, shape, epilogue, launcher)
    return _by_plan(x, _aligned(stream), None, bias, shape, epilogue, plan, launcher)


def _by_plan(
    x: Tensor, values: Tensor, codes: Tensor | None, bias: Tensor | None, shape: Shape,
    epilogue: int, plan: Plan, launcher: Launcher,
) -> Tensor:  # fmt: skip
    """A product of few tokens; `values` and `codes`, or a stream and None."""
    rows = x.reshape(-1, shape.inputs)
    tokens = rows.shape[0]
    if rows.stride(1) != 1 or (tokens > 1 and rows.stride(0) < shape.inputs):
        rows = rows.contiguous()
    y = x.new_empty(*x.shape[:-1], shape.out)
    bias = None if bias is None else bias.contiguous()
    stride = rows.stride(0) if tokens > 1 else shape.inputs
    whole = not (stride % 8 or shape.inputs % 8 or rows.data_ptr() % 16)
    partial = None
    if plan.shares > 1:
        partial = torch.empty(
            (plan.shares, tokens, shape.out), dtype=torch.float32, device=x.device
        )
    if plan.ready:
        rows = _in_order(rows, tokens, stride, whole, plan, launcher)
    args = [
        *(_address(t) for t in (values, codes, rows, bias, y, partial)),
        *(ctypes.c_longlong(stride), ctypes.c_longlong(shape.out)),
        *map(ctypes.c_int, (shape.out, shape.inputs, tokens, shape.entries, shape.panel)),
        *map(ctypes.c_int, (plan.chunks, epilogue, whole)),
    ]
    launcher.launch(plan.kernel, plan.grid, plan.threads, plan.shared, args)
    if partial is not None:
        args = [
            *(_address(t) for t in (partial, bias, y)),
            ctypes.c_longlong(shape.out),
            *map(ctypes.c_int, (shape.out, tokens, plan.shares, epilogue)),
        ]
        last = Kernel("sum.cu", "sum", (("HALF", int(x.dtype == torch.float16)),))
        launcher.launch(last, (-(-shape.out // 256), tokens, 1), 256, 0, args)
    return y


def _in_order(
    rows: Tensor, tokens: int, stride: int, whole: bool, plan: Plan, launcher: Launcher
) -> Tensor:
    """x as `groups.cu` with READY copies it, see `ready.cu`."""
    numbers, inputs = dict(plan.kernel.constants), rows.shape[1]
    blocks = -(-inputs // numbers["CHUNK"]) * numbers["CHUNK"] // 16
    threads = blocks * numbers["NT"] * 8
    ready = rows.new_empty(plan.grid[2], threads, 16)
    args = [
        *(_address(t) for t in (rows, ready)),
        ctypes.c_longlong(stride),
        *map(ctypes.c_int, (inputs, tokens, blocks, whole)),
    ]
    kernel = Kernel("ready.cu", "ready", (("NT", numbers["NT"]),))
    launcher.launch(kernel, (-(-threads // _ROW), plan.grid[2], 1), _ROW, 0, args)
    return ready


def expand(values: Tensor, codes: Tensor, shape: Shape, launcher: Launcher | None = None) -> Tensor:
    """The dense matrix `(out, inputs)` of a weight of two bytes, bit by bit."""
    launcher = launcher or gpu_driver.driver(values.device.index)
    values, codes = values.contiguous(), codes.contiguous()
    dense = values.new_empty(shape.out, shape.inputs)
    span = shape.m if shape.m > LANES else LANES // shape.m * shape.m
    columns = span * max(_SPANS, 512 // span)
    args = [
        *(_address(t) for t in (values, codes, dense)),
        *map(ctypes.c_int, (shape.out, shape.inputs, shape.n, shape.m, shape.entries)),
        *map(ctypes.c_int, (shape.panel if shape.shared else 0, columns)),
    ]
    grid = (shape.tiles, -(-shape.inputs // columns), 1)
    launcher.launch(_EXPAND, grid, 256, 2 * LANES * columns, args)
    return dense


def widened(
    stream: Tensor, shape: Shape, dtype: torch.dtype, launcher: Launcher | None = None
) -> tuple[Tensor, Tensor]:
    """Tiled values and codes of a weight with 8-bit values: scale times q, rounded once."""
    launcher = launcher or gpu_driver.driver(stream.device.index)
    stream, sizes = _aligned(stream), shape.tiled_sizes(dtype)
    values = stream.new_empty(sizes[0], dtype=dtype)
    codes = stream.new_empty(sizes[1], dtype=shape.code_dtype())
    constants = {"N": shape.n, "M": shape.m, "HALF": int(dtype == torch.float16)}
    args = [
        *(_address(t) for t in (stream, values, codes)),
        *map(ctypes.c_int, (shape.out, shape.entries, shape.panel if shape.shared else 0)),
    ]
    threads = shape.tiles * LANES * -(-shape.entries // (32 // shape.bits))
    kernel = Kernel("widen.cu", "widen", tuple(constants.items()))
    launcher.launch(kernel, (-(-threads // _ROW), 1, 1), _ROW, 0, args)
    return values, codes


def expands(dtype: torch.dtype) -> bool:
    """Whether `expand` takes weights of a dtype on the current GPU."""
    return dtype in DTYPES and gpu_driver.why_not() is None


def _by_panels(shape: Shape, tokens: int) -> bool:
    """Whether a product has more tokens than fragments are good for, and panels for them."""
    return tokens > gpu_plan.MOST_TOKENS and gpu_panels.serves(shape)


_planned = functools.lru_cache(4096)(gpu_cuts.plan)


def _address(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _aligned(t: Tensor) -> Tensor:
    """The tensor in order, at an address that copies of sixteen bytes take."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t
