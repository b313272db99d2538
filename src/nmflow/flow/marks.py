"""Marks of a parameter: they show whether anybody has written it since it was last seen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmflow import native
from nmflow.masks import native as native_masks
from nmflow.masks import triton
from nmflow.masks.launches import Prints

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(slots=True, eq=False)
class Mark:
    """A tensor as it was.

    Attributes:
        version: torch's count of the writes that autograd knows.
        address: where the values lie, which `p.data = x` changes.
        whole: the `fingerprint` of the values, which `p.data.copy_(x)` changes; on their device.
            If one launch took many fingerprints, it has all of them.
        rows: the rows of `whole` that belong to this tensor; None is all.
    """

    version: int
    address: int
    whole: Tensor
    rows: slice | None = None

    @classmethod
    def of(cls, x: Tensor, prints: Tensor | None = None) -> Mark:
        """The mark of a tensor now; `prints` is its fingerprint, if it was already taken."""
        return cls(x._version, x.data_ptr(), fingerprint(x) if prints is None else prints)

    @property
    def prints(self) -> Tensor:
        """The fingerprint of this tensor alone."""
        return self.whole if self.rows is None else self.whole[self.rows]

    def moved(self, x: Tensor) -> bool:
        """Whether torch's version or the address of `x` has changed; no value is read."""
        return (self.version, self.address) != (x._version, x.data_ptr())

    def same(self, x: Tensor) -> Tensor:
        """Whether the values of `x` are those of the mark, as a bool scalar on its device."""
        return (fingerprint(x) == self.prints).all()


def fingerprint(x: Tensor) -> Tensor:
    r"""A whole number for each row of a tensor's memory, by its bits, in one pass.

    `Σⱼ cⱼ·wⱼ mod 2⁶⁴` over the words w of a row, with odd constants c. A row in which one word
    changed always gets another number. A row in which several words changed, or swapped places,
    keeps its number with a chance of about 2⁻⁶⁴.

    Args:
        x: a tensor of any dtype and layout; read only.

    Returns:
        int64, one number for each row; a single number if `x` has no rows.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
        >>> bool((fingerprint(a) == fingerprint(b)).any())
        False
    """
    if x.numel() == 0:
        return torch.zeros(1, dtype=torch.int64, device=x.device)
    rows = _rows(x)
    size = _word(rows)
    odd = _odd(rows.shape[1] * x.element_size() // size, x.device)
    if x.device.type == "cpu" and size > 1 and native.available():
        return native_masks.prints(rows, odd)
    words = rows.view(_WORDS[size]).to(torch.int64)
    if x.device.type == "cpu":
        return torch.mv(words, odd)
    return (words * odd).sum(1)


def prints_of(xs: Sequence[Tensor]) -> Prints | None:
    """Returns what takes the `fingerprint` of all tensors in one launch; None if nothing can."""
    sizes = set()
    for x in xs:
        if not (_together(x) and x.is_contiguous() and x.device == xs[0].device):
            return None
        sizes.add(_word(_rows(x)))
    if len(sizes) != 1:
        return None
    size = sizes.pop()
    odd = [_odd(_rows(x).shape[1] * x.element_size() // size, x.device) for x in xs]
    return Prints(xs, odd, _WORDS[size])


def _together(x: Tensor) -> bool:
    """Whether a kernel can take many tensors like it in one launch."""
    return x.device.type == "cuda" and x.numel() > 0 and not triton.why_not()


def _rows(x: Tensor) -> Tensor:
    """A tensor as a matrix of the rows of its memory."""
    if not x.is_contiguous():
        # The order does not matter, only that it is the same each time.
        x = x.permute(_by_stride(x)).contiguous()
    return x.reshape(x.shape[0], -1) if x.ndim else x.reshape(1, 1)


def blank(x: Tensor) -> tuple[Tensor, Tensor]:
    """The factors for a row's words, and memory for the fingerprint, of a contiguous tensor."""
    rows = x.reshape(x.shape[0], -1) if x.ndim else x.reshape(1, 1)
    words = rows.shape[1] * x.element_size() // _word(rows)
    return _odd(words, x.device), torch.empty(len(rows), dtype=torch.int64, device=x.device)


def _word(rows: Tensor) -> int:
    """The bytes of the largest words into which a row divides."""
    row = rows.shape[1] * rows.element_size()
    return next(size for size in _WORDS if row % size == 0)


@functools.lru_cache(maxsize=256)
def _odd(count: int, device: torch.device) -> Tensor:
    """Odd constants, the same in every process."""
    draw = torch.Generator().manual_seed(0x5EED)
    some = torch.randint(-(1 << 62), 1 << 62, (count,), generator=draw, device="cpu")
    return (some * 2 + 1).to(device)


def _by_stride(x: Tensor) -> list[int]:
    return sorted(range(x.ndim), key=lambda axis: -x.stride(axis))
