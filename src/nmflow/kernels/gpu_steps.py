"""Training on kept places on a GPU: panels of 64 rows or more, in two-byte floats, by Triton.

Nothing here waits for the device. A weight that does not fit its pattern is found out on the
device, where the same calls then multiply it dense.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nmflow.kernels import gpu_driver, gpu_panels
from nmflow.kernels.gpu_panels import launch
from nmflow.kernels.gpu_plan import DTYPES
from nmflow.kernels.layout import LANES, Shape
from nmflow.masks import triton as masks_triton

DENSEST = 0.25  # a dense product is as fast from here on
SCRATCH = 128 << 20  # bytes of the sums of entries, about, from which input gradients are added up
PARTIAL = torch.float32  # what those sums are kept in
_FULL = 264  # blocks, two on each multiprocessor of an H100
_SHARE = 32  # blocks of tokens of a share, at most


def why_not(shape: Shape) -> str:
    """Why no kernel trains a weight of this shape and pattern on a GPU, in one clause; or ""."""
    if shape.panel % gpu_panels.LEAST_PANEL:
        return f"on a GPU panels of {gpu_panels.LEAST_PANEL}, 128, ... rows alone have kernels"
    if shape.n > DENSEST * shape.m:
        return f"{shape.pattern} keeps more than a quarter, where dense products are as fast"
    return gpu_driver.why_not() or masks_triton.why_not()


def why_not_dtypes(x: torch.dtype, weight: torch.dtype) -> str:
    """Why no kernel multiplies inputs of a dtype, of autocast's if that is on; or ""."""
    if x not in DTYPES:
        name = str(x).removeprefix("torch.")
        return f"it was called with {name}: the kernels of a GPU take bfloat16 and float16"
    if weight not in (torch.float32, x):
        names = (str(dtype).removeprefix("torch.") for dtype in (x, weight))
        return "it was called with {} on weights of {}".format(*names)
    return ""


@functools.lru_cache(4096)
def _served(out: int, inputs: int, n: int, m: int, panel: int) -> Shape | None:
    shape = Shape.of(out, inputs, f"{n}:{m}@{panel}")
    return None if why_not(shape) else shape


def served(x: Tensor, weight: Tensor, n: int, m: int, panel: int) -> Shape | None:
    """The shape of a weight that is trained here with an input, else None."""
    on_gpu = x.device.type == weight.device.type == "cuda" and x.device == weight.device
    if not on_gpu or why_not_dtypes(x.dtype, weight.dtype) or not weight.numel():
        return None
    return _served(*map(int, weight.shape), n, m, panel)  # of a compiler they may be symbols


def sizes(shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the packed values, of two bytes, and of their codes."""
    return shape.tiled_sizes(torch.bfloat16)


def _span(shape: Shape) -> dict[str, int]:
    span = shape.m if shape.m > LANES else LANES // shape.m * shape.m
    own = {"V": shape.panel, "ENTRIES": shape.entries, "SPAN": span}
    return own | {"PER_SPAN": span // shape.m * shape.n}


def pack(
    weight: Tensor, kept: Tensor | None, shape: Shape, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Pack what a weight keeps, in one pass: where it is not 0, and where `kept` says so.

    Args:
        weight: `(out, inputs)`, float32 or of `dtype`.
        kept: its mask as bits, see `masks.kept_values.to_bits`; or None.
        shape: its shape and pattern, for which `why_not` is "".
        dtype: of the packed values.

    Returns:
        The tiled values and codes, and an int32: 1 if every group keeps at most N, else 0, where
        the others are of no use.
    """
    from nmflow.kernels import gpu_steps_kernel as kernels

    weight = weight.contiguous()
    tiled, codes = sizes(shape)
    fresh = torch.zeros if shape.entries % 2 else torch.empty  # the last pair of a row is half full
    values = fresh(tiled, dtype=dtype, device=weight.device)
    codes = torch.empty(codes, dtype=torch.uint8, device=weight.device)
    fits = torch.ones((), dtype=torch.int32, device=weight.device)
    wide = 1 << (shape.m - 1).bit_length()
    groups = max(1, 64 // wide)
    grid = (shape.lists, -(-(shape.inputs // shape.m) // groups))
    held = weight if kept is None else kept.contiguous()
    launch(
        kernels.pack, grid, weight, weight, held, values, codes, fits, shape.out, shape.inputs,
        0 if kept is None else kept.shape[1], N=shape.n, M=shape.m, WIDE=wide, V=shape.panel,
        REACH=shape.groups_per_span, HELD=kept is not None, G=groups,
        R=min(64, 4096 // (groups * wide)), num_warps=8,
    )  # fmt: skip
    return values, codes, fits


def forward(
    x: Tensor, weight: Tensor, values: Tensor, codes: Tensor, fits: Tensor, bias: Tensor | None,
    shape: Shape,
) -> Tensor:  # fmt: skip
    """`x Wᵀ + bias` of rows `(tokens, inputs)`, in their dtype."""
    if not len(x):
        return x.new_empty(0, shape.out)
    bias = None if bias is None else bias.to(x.dtype)
    y = gpu_panels.matmul(x, values, codes, bias, shape)
    _mend(x, weight.t(), bias, y, fits)
    return y


def weight_grad(
    x: Tensor, dy: Tensor, codes: Tensor, fits: Tensor, shape: Shape, dtype: torch.dtype
) -> Tensor:
    """`dyᵀ x` at the kept places, 0 elsewhere: `(out, inputs)`; sums are float32, rounded once."""
    from nmflow.kernels import gpu_steps_kernel as kernels

    dw = torch.zeros(shape.out, shape.inputs, dtype=dtype, device=x.device)
    tokens = len(x)
    if not tokens:
        return dw
    xt = gpu_panels.turned(x) if x.is_cuda else x.t().contiguous()
    rows = 128 if shape.panel % 128 == 0 else 64
    entries = min(64, max(16, 1 << (shape.entries - 1).bit_length()))
    blocks = -(-shape.out // rows) * -(-shape.entries // entries)
    steps = -(-tokens // 64)
    shares = max(-(-steps // _SHARE), min(-(-_FULL // blocks), steps))
    each = -(-steps // shares) * 64
    sums = torch.empty(shares, shape.out, shape.entries, dtype=torch.float32, device=x.device)
    grid = (-(-shape.out // rows), -(-shape.entries // entries))
    launch(
        kernels.weight_grad, (*grid, shares), x, dy, xt, codes, sums, tokens, shape.out,
        xt.stride(0), each, **_span(shape), BV=rows, BK=entries, BT=64,
        num_warps=rows // 16, num_stages=3,
    )  # fmt: skip
    launch(
        kernels.spread, grid, x, sums, codes, dw, shape.out, shape.inputs, shares, **_span(shape),
        BV=rows, BK=entries,
    )  # fmt: skip
    _mend(dy.t(), x, None, dw, fits)
    return dw


def input_grad(
    dy: Tensor, weight: Tensor, values: Tensor, codes: Tensor, fits: Tensor, shape: Shape
) -> Tensor:
    """`dy W` of rows `(tokens, out)`, in their dtype; sums are float32.

    A panel's entries are multiplied by its rows of dy, a share of the tokens at a time, and each
    column adds up its own, in the panels' order.
    """
    from nmflow.kernels import gpu_steps_kernel as kernels

    dx = dy.new_empty(len(dy), shape.inputs)
    if not len(dy):
        return dx
    table = torch.empty(shape.inputs, shape.lists, dtype=torch.int32, device=dy.device)
    count = torch.empty(shape.inputs, dtype=torch.int32, device=dy.device)
    launch(
        kernels.list_entries, (-(-shape.inputs // 64),), dy, codes, table, count, shape.inputs,
        shape.lists, N=shape.n, M=shape.m, REACH=shape.groups_per_span, BC=64, BL=32,
    )  # fmt: skip
    every = shape.lists * shape.entries
    share = max(SCRATCH // (every * PARTIAL.itemsize) // 128, 1) * 128
    share = min(share, -(-len(dy) // 128) * 128)
    sums = torch.empty(every, share, dtype=PARTIAL, device=dy.device)
    entries = min(64, max(16, 1 << (shape.entries - 1).bit_length()))
    for begin in range(0, len(dy), share):
        end = min(begin + share, len(dy))
        blocks = -(-(end - begin) // 128)
        launch(
            kernels.entry_sums, (shape.lists, -(-shape.entries // entries), blocks), dy, dy, values,
            sums, begin, end, shape.out, share, V=shape.panel, ENTRIES=shape.entries, BV=64,
            BK=entries, BT=128, num_warps=4,
        )  # fmt: skip
        launch(
            kernels.input_grad, (-(-shape.inputs // 32), blocks), dy, sums, table, count, dx, begin,
            end, shape.inputs, shape.lists, share, BC=32, BT=128, num_warps=8,
        )  # fmt: skip
    _mend(dy, weight, None, dx, fits)
    return dx


def _mend(a: Tensor, b: Tensor, bias: Tensor | None, c: Tensor, fits: Tensor) -> None:
    """Write `a b + bias` into `c` where the weight did not fit; a launch that ends at once else."""
    from nmflow.kernels import gpu_steps_kernel as kernels

    rows, depth = a.shape
    columns = b.shape[1]
    launch(
        kernels.mend, (min(_FULL, -(-rows // 64) * -(-columns // 64)),), c, a, b,
        a if bias is None else bias, c, fits, rows, columns, depth, *a.stride(), *b.stride(),
        BIAS=bias is not None, BM=64, BN=64, BK=32, num_warps=4,
    )  # fmt: skip
