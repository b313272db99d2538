"""The two layouts of a packed weight, and conversions between them, in torch on any device.

Canonical: what files hold, row by row, independent of the machine. Tiled: what modules hold and
kernels read, sixteen output rows side by side (version 1, as `csrc/common/nmflow.h` states it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmflow.errors import CompressError
from nmflow.pattern import Pattern

LANES = 16
LARGEST_M = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Shape:
    """What a packed matrix is: `(out, inputs)` with N of every M inputs kept, V rows a panel.

    Example:
        >>> s = Shape.of(3072, 768, "1:16")
        >>> s.entries, s.bits
        (48, 4)
    """

    out: int
    inputs: int
    n: int
    m: int
    panel: int = 1

    @classmethod
    def of(cls, out: int, inputs: int, pattern: str | Pattern) -> Shape:
        """Check the numbers and make a shape of them; raises `CompressError`."""
        p = Pattern(pattern)
        shape = cls(out, inputs, p.n, p.m, p.panel)
        if p.m > LARGEST_M:
            raise CompressError(
                f"pattern is '{p}': packed weights hold M up to {LARGEST_M}, so leave it dense"
            )
        if out < 1 or inputs < 1 or inputs % p.m:
            raise CompressError(
                f"the matrix is ({out}, {inputs}) and the pattern '{p}': it needs at least one row "
                f"and a number of inputs that M={p.m} divides"
            )
        if p.n * p.m * p.panel * out * inputs >= 1 << 62:
            raise CompressError(
                f"the matrix is ({out}, {inputs}) with panels of {p.panel}: too large"
            )
        return shape

    @property
    def pattern(self) -> Pattern:
        """The pattern as a `Pattern`."""
        return Pattern.of(self.n, self.m, self.panel)

    @property
    def entries(self) -> int:
        """Values stored per row."""
        return self.inputs // self.m * self.n

    @property
    def lists(self) -> int:
        """Lists of columns in the canonical form: one per row, or one per panel."""
        return -(-self.out // self.panel)

    @property
    def tiles(self) -> int:
        """Tiles of sixteen rows."""
        return -(-self.out // LANES)

    @property
    def shared(self) -> bool:
        """Whether the tiled form stores one list of columns per panel."""
        return self.panel > 1 and self.panel % LANES == 0

    @property
    def bits(self) -> int:
        """Bits per code in the tiled form."""
        return 4 if self.m <= LANES else 8

    @property
    def groups_per_span(self) -> int:
        """Groups that one code spans: as many whole groups as 16 inputs hold, or one."""
        return LANES // self.m if self.m <= LANES else 1

    def tiled_sizes(self, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the tiled values and of the tiled codes."""
        s, per = self.entries, 32 // self.bits
        values = (
            (self.tiles, -(-s // 2), LANES, 2) if dtype.itemsize == 2 else (self.tiles, s, LANES)
        )
        codes = (self.lists, s) if self.shared else (self.tiles, -(-s // per), LANES)
        return values, codes

    def code_dtype(self) -> torch.dtype:
        """Element type of the tiled codes; int32 stands for the bits of a uint32."""
        return torch.uint8 if self.shared else torch.int32


def canonical_from_dense(w: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Pick the kept weights of a matrix: `values (out, S)` and `index (lists, S)` uint8.

    The non-zeros are kept (for a panel, the columns with any). A group with fewer is filled up
    with its lowest free columns, so that every group has exactly N in increasing order.

    Raises:
        CompressError: a group holds more than N, or the dtype cannot be packed.
    """
    if w.dtype not in DTYPES:
        raise CompressError(f"the weight is {w.dtype}: packed weights are floats of 16 to 64 bits")
    used = (w != 0).unflatten(-1, (-1, shape.m))
    if shape.panel > 1:
        short = shape.lists * shape.panel - shape.out
        if short:
            used = torch.cat([used, used.new_zeros(short, *used.shape[1:])])
        used = used.unflatten(0, (-1, shape.panel)).any(1)
    count = used.sum(-1, keepdim=True, dtype=torch.int32)
    if int(count.max()) > shape.n:
        raise CompressError(
            f"the weight keeps up to {int(count.max())} of {shape.m} but the pattern is "
            f"'{shape.pattern}': prune it first (flow.finalize()) or name the pattern it holds"
        )
    free = ~used
    chosen = used | (free & (free.cumsum(-1, dtype=torch.int32) <= shape.n - count))
    index = chosen.nonzero()[:, -1].view(shape.lists, shape.entries).to(torch.uint8)
    return w.gather(1, columns(index, shape)), index


def columns(index: Tensor, shape: Shape) -> Tensor:
    """Input columns `(out, S)` int64 of a canonical index."""
    start = torch.arange(shape.inputs // shape.m, device=index.device) * shape.m
    full = index.long() + start.repeat_interleave(shape.n)
    if shape.panel > 1:
        full = full.repeat_interleave(shape.panel, 0)[: shape.out]
    return full


def dense_from_canonical(values: Tensor, index: Tensor, shape: Shape) -> Tensor:
    """The matrix `(out, inputs)`, with +0.0 at every place that is not kept."""
    dense = values.new_zeros(shape.out, shape.inputs)
    return dense.scatter_(1, columns(index, shape), values)


def check_canonical(values: Tensor, index: Tensor, shape: Shape) -> None:
    """Raise `CompressError` unless sizes, types and every index are right."""
    if tuple(values.shape) != (shape.out, shape.entries) or values.dtype not in DTYPES:
        raise CompressError(
            f"values are {values.dtype} {tuple(values.shape)}, not floats of the shape "
            f"{(shape.out, shape.entries)}"
        )
    check_index(index, shape)


def check_index(index: Tensor, shape: Shape) -> None:
    """Raise `CompressError` unless an index has its size and its columns lie in their groups."""
    if tuple(index.shape) != (shape.lists, shape.entries) or index.dtype != torch.uint8:
        raise CompressError(
            f"the index is {index.dtype} {tuple(index.shape)}, not uint8 of the shape "
            f"{(shape.lists, shape.entries)}"
        )
    runs = index.unflatten(1, (-1, shape.n)).to(torch.int16)
    if int(runs.max()) >= shape.m or bool((runs.diff(dim=-1) <= 0).any()):
        raise CompressError(
            f"the index holds a column outside 0..{shape.m - 1}, or one that does not increase "
            "within its group"
        )


def tiled_from_canonical(values: Tensor, index: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Canonical to tiled; the inputs must have passed `check_canonical`."""
    tall = _pad(values, shape.tiles * LANES, 0)
    if values.dtype.itemsize == 2:
        tall = _pad(tall, tall.shape[1] + tall.shape[1] % 2, 1)
        tiled = tall.view(shape.tiles, LANES, -1, 2).permute(0, 2, 1, 3).contiguous()
    else:
        tiled = tall.view(shape.tiles, LANES, -1).permute(0, 2, 1).contiguous()
    group = torch.arange(shape.entries, device=index.device) // shape.n
    code = index + (group % shape.groups_per_span * shape.m).to(torch.uint8)
    if shape.shared:
        return tiled, code
    if shape.panel > 1:
        code = code.repeat_interleave(shape.panel, 0)[: shape.out]
    per = 32 // shape.bits
    code = _pad(_pad(code, shape.tiles * LANES, 0), -(-shape.entries // per) * per, 1)
    parts = code.view(shape.tiles, LANES, -1, per).unbind(-1)
    words = parts[0].to(torch.int32)
    for i, part in enumerate(parts[1:], 1):  # word by word, to save memory
        words |= part.to(torch.int32) << i * shape.bits
    return tiled, words.permute(0, 2, 1).contiguous()


def canonical_from_tiled(values: Tensor, codes: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Tiled to canonical."""
    if values.dtype.itemsize == 2:
        rows = values.permute(0, 2, 1, 3).reshape(shape.tiles * LANES, -1)
    else:
        rows = values.permute(0, 2, 1).reshape(shape.tiles * LANES, -1)
    rows = rows[: shape.out, : shape.entries].contiguous()
    if shape.shared:
        code = codes.long()
    else:
        per = 32 // shape.bits
        shift = torch.arange(per, device=codes.device) * shape.bits
        code = codes.permute(0, 2, 1).unsqueeze(-1).long() >> shift & (1 << shape.bits) - 1
        code = code.reshape(shape.tiles * LANES, -1)[: shape.out : shape.panel, : shape.entries]
    group = torch.arange(shape.entries, device=codes.device) // shape.n
    return rows, (code - group % shape.groups_per_span * shape.m).to(torch.uint8)


def check_tiled(values: Tensor, codes: Tensor, shape: Shape) -> None:
    """Raise `CompressError` unless both buffers have the sizes that the shape demands."""
    want = shape.tiled_sizes(values.dtype)
    if (
        values.dtype not in DTYPES
        or codes.dtype != shape.code_dtype()
        or (tuple(values.shape), tuple(codes.shape)) != want
    ):
        raise CompressError(
            f"packed buffers are {values.dtype} {tuple(values.shape)} and {codes.dtype} "
            f"{tuple(codes.shape)}, but {shape} needs {want[0]} and {want[1]}: pack it again"
        )


def _pad(x: Tensor, length: int, axis: int) -> Tensor:
    """Pad `x` with zeros along an axis."""
    size = list(x.shape)
    if size[axis] == length:
        return x
    size[axis] = length - size[axis]
    return torch.cat([x, x.new_zeros(size)], axis)
