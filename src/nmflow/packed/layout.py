"""How a parameter becomes matrices, and how an index becomes bytes: the facts files rely on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from nmflow.errors import CompressError
from nmflow.kernels.layout import LANES, LARGEST_M
from nmflow.masks import holds
from nmflow.pattern import Pattern

# The layouts of files, stated in docs/layout.md; a reader refuses any other. The second has
# rounded values besides (8-bit, bfloat16), and is written only where there are any, so that older
# readers take the rest.
LAYOUT_VERSIONS = (1, 2)
# A denser weight is not worth its index, and a few zeros are not a pattern.
DENSEST = 0.75
_MOST_RUNS = 8
# Panels that make the kernels faster: multiples of their sixteen lanes, and divisors.
_PANELS = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2)


def as_matrix(w: Tensor, axis: int) -> Tensor:
    """View a parameter as `(out, inputs)`, its groups consecutive along the last axis.

    `axis` is the grouped one: 1 for Linear `(out, in)` and convolutions `(out, in, ...)`, whose
    kernel positions come before the channels in a row; 0 for HF `Conv1D`, stored `(in, out)`.
    """
    return w.movedim(axis, -1).flatten(1)


def from_matrix(matrix: Tensor, size: tuple[int, ...], axis: int) -> Tensor:
    """Undo `as_matrix`: a contiguous parameter of the shape `size`."""
    moved = list(size)
    moved.append(moved.pop(axis))
    return matrix.reshape(moved).movedim(-1, axis).contiguous()


def layout_version(rounded: Iterable[bool]) -> int:
    """The version that a file of weights needs, which have rounded values or not."""
    return LAYOUT_VERSIONS[any(rounded)]


def file_bits(m: int) -> int:
    """Bits per index in a file: 2, 4 or 8, the least that holds 0..M-1."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def index_to_bytes(index: Tensor, m: int) -> Tensor:
    """Put 8 / bits indices into each byte, the first in the lowest bits, rows padded with zeros."""
    per = 8 // file_bits(m)
    rows = torch.nn.functional.pad(index, (0, -index.shape[1] % per)).unflatten(1, (-1, per))
    shift = torch.arange(per, device=index.device) * file_bits(m)
    return (rows.long() << shift).sum(-1).to(torch.uint8)


def bytes_to_index(packed: Tensor, entries: int, m: int) -> Tensor:
    """Undo `index_to_bytes`.

    Raises:
        CompressError: bits are set where a row is padded.
    """
    bits = file_bits(m)
    shift = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    rows = (packed.unsqueeze(-1) >> shift & (1 << bits) - 1).flatten(1)
    if bool(rows[:, entries:].any()):
        raise CompressError("the index has bits set in the padding of a row")
    return rows[:, :entries]


def detect(matrix: Tensor) -> Pattern | None:
    """The sparsest N:M that a matrix `(out, inputs)` holds, the smallest M among equals.

    None where no pattern with a density of at most 0.75 and M up to 256 holds, or all is zero.
    Panels of 2, 4, ... 1024 rows are found too, the largest that holds, in matrices of 16 rows and
    more: few rows may agree by chance.

    Example:
        >>> str(detect(torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])))
        '1:4'
    """
    length = matrix.shape[1]
    used = matrix != 0
    total = int(used.sum())
    if not 0 < total <= DENSEST * matrix.numel():
        return None
    best: Pattern | None = None
    for m in range(2, min(LARGEST_M, length) + 1):
        if length % m or (best is not None and total > best.density * matrix.numel()):
            continue
        n = int(used.unflatten(1, (-1, m)).sum(-1, dtype=torch.int32).max())
        if n <= DENSEST * m and (best is None or n * best.m < best.n * m):
            best = Pattern.of(n, m)
    if best is None:
        return None
    for rows in _PANELS if matrix.shape[0] >= LANES else ():
        if rows <= matrix.shape[0] and holds(matrix, Pattern.of(best.n, best.m, rows)):
            return Pattern.of(best.n, best.m, rows)
    return best


def runs(matrix: Tensor) -> list[tuple[int, int, Pattern]]:
    """Half-open runs of rows that each hold a pattern: the sparse parts of a fused weight.

    Rows are cut where their number of non-zeros changes, as between the Q, K and V of a fused
    projection; the whole matrix comes first, so one pattern for all stays one run.
    """
    whole = detect(matrix)
    kept = (matrix != 0).sum(1)
    cuts = (kept.diff() != 0).nonzero().flatten().add(1).tolist()
    if not cuts or len(cuts) >= _MOST_RUNS:
        return [(0, matrix.shape[0], whole)] if whole else []
    edges = [0, *cuts, matrix.shape[0]]
    found = [(a, b, detect(matrix[a:b])) for a, b in itertools.pairwise(edges)]
    if whole and all(p is None or p.density >= whole.density for _, _, p in found):
        return [(0, matrix.shape[0], whole)]
    return [(a, b, p) for a, b, p in found if p is not None]


def fits(matrix: Tensor, pattern: Pattern) -> str | None:
    """Say why a matrix cannot be packed under a pattern, or None if it can."""
    if pattern.m > LARGEST_M:
        return f"M={pattern.m} is above {LARGEST_M}"
    if matrix.shape[1] % pattern.m:
        return f"its {matrix.shape[1]} inputs are not divisible by M={pattern.m}"
    if not holds(matrix, pattern):
        return f"it does not hold {pattern}"
    return None
