"""The kept values of a tensor together, and apart again."""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow import native
from nmflow.masks import native as native_masks


class Places:
    """The kept places of a mask, row by row of its memory.

    Args:
        kept: a contiguous bool mask.
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        rows = kept.reshape(kept.shape[0], -1)
        self.starts = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(rows.sum(1), 0, out=self.starts[1:])

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.starts[-1])

    def together(self, x: Tensor) -> Tensor:
        """The values of `x`, shaped like the mask, at these places: one after another."""
        x = x.contiguous()
        if not self._served(x):
            return x[self.kept]
        values = x.new_empty(self.count)
        native_masks.take(x, self.kept, self.starts, values)
        return values

    def apart(
        self, values: Tensor, out: Tensor, prints: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Write values to these places of `out`, and 0 elsewhere.

        Args:
            values: as `together` gives them.
            out: shaped like the mask.
            prints: factors, and where the fingerprint of each row of `out` goes: for the kernel
                only, see `serves`.
        """
        if self._served(out):
            native_masks.put(values, self.kept, self.starts, out, prints)
        else:
            assert prints is None
            out.zero_()[self.kept] = values

    def _served(self, x: Tensor) -> bool:
        return serves(x)


def serves(x: Tensor) -> bool:
    """Whether the compiled kernel takes a tensor."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous()
        and native.available()
        and native.isa() == "avx512"
    )
