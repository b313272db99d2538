"""Weights with 8-bit values: rounding, two layouts, and the product in plain torch on any device.

A row o of W `(out, in)` is `scale[o] * q[o]` with whole numbers from -127 to 127. Canonical, for
files: `q (out, S)` int8, `scale (out,)` float32, and the index of `nmflow.kernels.layout`. Tiled,
for modules and kernels: one stream of bytes that holds all three (`csrc/nmflow.h` states it bit by
bit).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nmflow.errors import CompressError
from nmflow.kernels.layout import LANES, Shape, check_index, dense_from_canonical
from nmflow.kernels.reference import apply_epilogue

ACTIVATIONS = ("float", "int8")
# Of the layers that may have 8-bit values.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The most kept values of a row: a sum of this many products of two bytes fits 32 bits.
MOST_ENTRIES = 131_072
_HEAD = 128  # bytes of a tile before its blocks: 16 scales and 16 sums
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Layout:
    """Where things lie in the stream of a shape.

    Attributes:
        bits: bits of a code, which is the column inside its group.
        per: codes in a byte, and quads (four entries) of a row in a block.
        blocks: blocks of a tile of 16 rows.
        size: shape of the stream, `(tiles, bytes of a tile)`.
    """

    bits: int
    per: int
    blocks: int
    size: tuple[int, int]

    @classmethod
    def of(cls, shape: Shape) -> Layout:
        """The layout of a shape."""
        bits = 2 if shape.m <= 4 else 4 if shape.m <= 16 else 8
        per = 8 // bits
        blocks = -(-shape.entries // (4 * per))
        return cls(bits, per, blocks, (shape.tiles, _HEAD + blocks * (1 + per) * 64))


def why_not(shape: Shape) -> str:
    """Why a matrix cannot have 8-bit values, in one clause; empty if it can."""
    if shape.entries > MOST_ENTRIES:
        return f"a row keeps {shape.entries:,} values, above {MOST_ENTRIES:,}"
    return ""


def round_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round the kept values of each row: `q = round(w / scale)`, to even at a tie.

    `scale` is the largest |w| of the row divided by 127, rounded up to 16 significant bits. So
    `scale * q` is exact in float32, and rounding it again gives the same `q` and `scale`.

    Args:
        values: `(out, S)`, floats.

    Returns:
        `q (out, S)` int8 and `scale (out,)` float32.

    Raises:
        CompressError: a value is NaN, infinite, or above what float32 holds.
    """
    wide = values.float()
    most = wide.abs().amax(1)
    if not bool(most.isfinite().all()):
        raise CompressError(
            "the weight holds a NaN or an infinity: it has no 8-bit values, so correct it, or "
            "pass values=None"
        )
    # Rows of zeros, and rows too small for an exact scale, become zeros.
    scale = torch.where(most < _SMALLEST, 0.0, most / torch.full_like(most, 127.0))
    bits = scale.view(torch.int32)
    scale = (bits + 0xFF & ~0xFF).view(torch.float32)
    q = torch.where(scale > 0, wide.T / scale, 0.0).T.round().clamp_(-127, 127)
    return q.to(torch.int8), scale


def float_values(q: Tensor, scale: Tensor) -> Tensor:
    """`scale * q`, exact: float32 `(out, S)`."""
    return q.float() * scale[:, None]


def stream_from_canonical(q: Tensor, scale: Tensor, index: Tensor, shape: Shape) -> Tensor:
    """Canonical to tiled, uint8; the inputs must have passed `check_canonical`."""
    at = Layout.of(shape)
    rows = shape.tiles * LANES
    code = index if shape.panel == 1 else index.repeat_interleave(shape.panel, 0)[: shape.out]

    def quads(x: Tensor) -> Tensor:  # (tiles, blocks, per, 16, 4) of (out, S)
        full = x.new_zeros(rows, at.blocks * at.per * 4)
        full[: shape.out, : shape.entries] = x
        return full.view(shape.tiles, LANES, at.blocks, at.per, 4).permute(0, 2, 3, 1, 4)

    codes = quads(code.to(torch.uint8))
    shift = torch.arange(at.per, device=q.device, dtype=torch.uint8) * at.bits
    codes = (codes << shift[:, None, None]).sum(2, dtype=torch.uint8)
    blocks = torch.cat([codes.unsqueeze(2), quads(q.view(torch.uint8))], 2)
    head = scale.new_zeros(2, rows)
    head[0, : shape.out] = scale
    head[1].view(torch.int32)[: shape.out] = q.sum(1, dtype=torch.int32)
    heads = head.view(2, shape.tiles, LANES).permute(1, 0, 2).contiguous().view(torch.uint8)
    return torch.cat([heads.view(shape.tiles, _HEAD), blocks.reshape(shape.tiles, -1)], 1)


def canonical_from_stream(stream: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Tiled to canonical: `q (out, S)` int8, `scale (out,)` float32, `index (lists, S)` uint8."""
    at = Layout.of(shape)
    heads = stream[:, : _HEAD // 2].contiguous().view(torch.float32)
    blocks = stream[:, _HEAD:].reshape(shape.tiles, at.blocks, 1 + at.per, LANES, 4)

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2, 4).reshape(shape.tiles * LANES, -1)[:, : shape.entries]

    shift = torch.arange(at.per, device=stream.device, dtype=torch.uint8) * at.bits
    codes = blocks[:, :, :1] >> shift[:, None, None] & (1 << at.bits) - 1
    q = rows(blocks[:, :, 1:])[: shape.out].contiguous().view(torch.int8)
    index = rows(codes)[: shape.out : shape.panel].contiguous()
    return q, heads.reshape(-1)[: shape.out].clone(), index


def check_stream(stream: Tensor, shape: Shape) -> None:
    """Raise `CompressError` unless the stream has the size that the shape demands."""
    if why := why_not(shape):
        raise CompressError(f"the weight cannot have 8-bit values: {why}")
    want = Layout.of(shape).size
    if stream.dtype != torch.uint8 or tuple(stream.shape) != want:
        raise CompressError(
            f"the packed stream is {stream.dtype} {tuple(stream.shape)}, but {shape} needs uint8 "
            f"{want}: pack it again"
        )


def check_canonical(q: Tensor, scale: Tensor, index: Tensor, shape: Shape) -> None:
    """Raise `CompressError` unless sizes, types, every value and every index are right."""
    if tuple(q.shape) != (shape.out, shape.entries) or q.dtype != torch.int8:
        raise CompressError(
            f"values are {q.dtype} {tuple(q.shape)}, not int8 of the shape "
            f"{(shape.out, shape.entries)}"
        )
    if tuple(scale.shape) != (shape.out,) or scale.dtype != torch.float32:
        raise CompressError(
            f"scales are {scale.dtype} {tuple(scale.shape)}, not float32 of the shape "
            f"{(shape.out,)}"
        )
    if int(q.min()) < -127 or not bool((scale >= 0).all()) or not bool(scale.isfinite().all()):
        raise CompressError("a value is -128, or a scale is negative, infinite or NaN")
    if why := why_not(shape):
        raise CompressError(f"the weight cannot have 8-bit values: {why}")
    check_index(index, shape)


def dense(stream: Tensor, shape: Shape) -> Tensor:
    """The matrix `(out, inputs)` of a stream, exact in float32.

    Raises:
        CompressError: the codes are not columns of the pattern; checked on a CPU only.
    """
    q, scale, index = canonical_from_stream(stream, shape)
    if stream.device.type == "cpu":
        check_canonical(q, scale, index, shape)
    return dense_from_canonical(float_values(q, scale), index, shape)


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token: `r = round(x * (127 / a))` with a = max |x|, to even at a tie.

    A token with a below 1e-30 counts as zero; one with a NaN or an infinity has the step NaN.

    Args:
        x: `(tokens, in)`, any float.

    Returns:
        `r (tokens, in)` float32, whole numbers from -127 to 127, and `step (tokens, 1)`: `a / 127`.
    """
    wide = x.float()
    most = wide.abs().amax(1, keepdim=True)
    known = most.isfinite() & (most >= _SMALLEST)
    full = torch.full_like(most, 127.0)  # divided as such: torch would multiply by a reciprocal
    r = torch.where(known, (wide * (full / most)).round(), 0.0)
    step = torch.where(known, most / full, torch.where(most < _SMALLEST, 0.0, torch.nan))
    return r, step


def matmul(
    x: Tensor, stream: Tensor, bias: Tensor | None, shape: Shape, activations: int,
    epilogue: int = 0,
) -> Tensor:  # fmt: skip
    """`epilogue(x Wᵀ + bias)` by the dense matrix, rebuilt at every call.

    With 8-bit activations the sums of whole numbers are exact (in float64), as in the kernels.
    """
    if not activations:
        weight = dense(stream, shape).to(x.dtype)
        return apply_epilogue(F.linear(x, weight, bias), epilogue)
    q, scale, index = canonical_from_stream(stream, shape)
    if stream.device.type == "cpu":
        check_canonical(q, scale, index, shape)
    r, step = round_tokens(x.reshape(-1, shape.inputs))
    sums = r.double() @ dense_from_canonical(q.double(), index, shape).T
    y = (step * scale) * sums.float()
    if bias is not None:
        y = y + bias.float()
    return apply_epilogue(y, epilogue).to(x.dtype).view(*x.shape[:-1], shape.out)
