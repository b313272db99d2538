"""Compressing a tensor to its kept values, and expanding it again; and its mask as bits."""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow import native
from nmflow.masks import native as native_masks

_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def to_bits(kept: Tensor) -> Tensor:
    """A bool mask, a row of bits for each index of axis 0.

    Args:
        kept: bool, of any shape.

    Returns:
        uint8 `(rows, b)`: bit `c % 8` of byte `c // 8` is column c; b is a multiple of 8, and bits
        past the last column are 0.

    Example:
        >>> to_bits(torch.tensor([[True, False, True]]))
        tensor([[5, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    """
    rows = kept.reshape(kept.shape[0], -1).to(torch.uint8)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 64))
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=kept.device)
    return (rows.view(len(rows), -1, 8) * powers).sum(-1, dtype=torch.uint8)


def from_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask of a shape from which `to_bits` made these bits."""
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=bits.device)
    rows = (bits.unsqueeze(-1) & powers).bool().view(len(bits), -1)
    return rows[:, : shape[1:].numel()].reshape(shape)


class Places:
    """The kept places of a mask, row by row of its memory.

    Args:
        kept: a bool mask of one axis or more.

    Attributes:
        bits: the mask, as `to_bits` has it.
        starts: int64, the number of places before each row; one entry more than rows.
        shape: the shape of the mask.
    """

    def __init__(self, kept: Tensor) -> None:
        self.shape, self.bits = kept.shape, to_bits(kept)
        counts = kept.reshape(kept.shape[0], -1).sum(1)
        self.starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=self.starts[1:])
        self.count = int(self.starts[-1])

    @property
    def kept(self) -> Tensor:
        """The mask."""
        return from_bits(self.bits, self.shape)

    def together(self, x: Tensor) -> Tensor:
        """The values of `x`, shaped like the mask, at these places: one after another."""
        x = x.contiguous()
        if not serves(x):
            return x[self.kept]
        values = x.new_empty(self.count)
        native_masks.take(x, self.bits, self.starts, values)
        return values

    def apart(
        self, values: Tensor, out: Tensor, prints: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Write values to these places of `out`, and 0 elsewhere.

        Args:
            values: as `together` gives them.
            out: shaped like the mask.
            prints: factors, and memory for the fingerprint of each row of `out`: for the kernel
                only, see `serves`.

        Returns:
            Whether the values are finite, a bool scalar.
        """
        if serves(out):
            return torch.tensor(native_masks.put(values, self.bits, self.starts, out, prints))
        assert prints is None
        out.zero_()[self.kept] = values
        return torch.isfinite(values).all()


def serves(x: Tensor) -> bool:
    """Whether the compiled kernel takes a tensor."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous()
        and native.available()
    )
