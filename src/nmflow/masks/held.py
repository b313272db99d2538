"""A weight, or its gradient, under masks that exist already."""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow import native
from nmflow.masks import native as native_masks
from nmflow.masks.magnitude import project


def one_pass_holds(w: Tensor, kept: Tensor, *others: Tensor) -> bool:
    """Say whether the compiled kernel takes a weight, its mask and other tensors like it."""
    return (
        w.device.type == "cpu"
        and w.dtype in native.DTYPES
        and kept.is_contiguous()
        and all(x.is_contiguous() and x.dtype == w.dtype for x in (w, *others))
        and native.available()
    )


def hold(
    w: Tensor,
    kept: Tensor,
    out: Tensor,
    *,
    fading: Tensor | None = None,
    delta: float = 0.0,
    prints: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Write `W ⊙ (m + (1 - m) ⊙ m' · δ)` into `out`; returns whether W was finite, on its device.

    Args:
        w: the dense weight W.
        kept: the bool mask m.
        out: like `w`.
        fading: the bool mask m'; None is all places.
        delta: δ.
        prints: factors, and memory for the fingerprint of each row of `out`: for the kernel only.
    """
    if (fading is None or delta == 0.0) and one_pass_holds(w, kept, out):
        odd, sums = prints or (None, None)
        return torch.tensor(native_masks.hold(w, kept, delta, out, odd=odd, prints=sums))
    out.copy_(project(w, kept, fading, delta))
    return torch.isfinite(w).all()
