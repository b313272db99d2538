"""The values of kept weights under recipes that change them: pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nmflow.pattern import Pattern


def soft_threshold(
    w: Tensor, kept: Tensor, pattern: Pattern, dim: int = 1, *, stacked: bool = False
) -> Tensor:
    r"""The part of each kept |w| above the largest |w| of its group that is not kept.

    `sign(w) · max(|w| - t, 0)` where `kept`, else 0. It is continuous in w: a weight that replaces
    another begins at 0.

    Args:
        w: a weight, as for `mask`.
        kept: its mask.
        pattern: the mask's pattern.
        dim: the grouped axis.
        stacked: not used; all forms have the same signature.

    Example:
        >>> w = torch.tensor([[3.0, -5.0, 1.0, 2.0]])
        >>> soft_threshold(w, w.abs() > 2, Pattern("2:4")).tolist()
        [[1.0, -3.0, 0.0, 0.0]]

    References:
        arXiv 2409.09099.
    """
    size = w.abs().masked_fill(kept, 0.0)
    t = size.unflatten(dim, (-1, pattern.m)).amax(dim % w.ndim + 1, keepdim=True)
    t = t.expand(*(t.shape[: dim % w.ndim + 1]), pattern.m, *t.shape[dim % w.ndim + 2 :])
    over = (w.abs() - t.flatten(dim % w.ndim, dim % w.ndim + 1)).clamp_(min=0.0)
    return torch.where(kept, torch.copysign(over, w), 0.0)


def least_squares(w: Tensor, sparse: Tensor) -> float:
    """The β that minimizes ‖w - β·sparse‖², `⟨w, sparse⟩ / ⟨sparse, sparse⟩`; 1 if all are 0."""
    wide, thin = w.flatten().double(), sparse.flatten().double()
    square = float(thin @ thin)
    return float(wide @ thin) / square if square else 1.0


def importance(
    w: Tensor, pattern: Pattern, dim: int = 1, *, stacked: bool = False, tau: float = 1e-2
) -> Tensor:
    r"""How much a weight is enhanced: how far it is above the threshold of its row.

    `q = σ((|w| - t)/τ)` for the share N/M of a row's largest |w|, else 0, with t halfway between
    the smallest of them and the largest of the others. For a convolution with several places, the
    same over all weights of a place is added.

    Args:
        w: a weight, as for `mask`.
        pattern: its density is the share.
        dim: the grouped axis.
        stacked: as for `mask`.
        tau: τ.

    References:
        arXiv 2312.07061, and the authors' code.
    """
    out = 0 if dim % w.ndim else 1
    size = w.abs()
    if stacked:
        rows = size.movedim(3 - dim % w.ndim, 1)
        return _along(rows, 2, pattern, tau).movedim(1, 3 - dim % w.ndim)
    q = _along(size.movedim(out, 0), 1, pattern, tau).movedim(0, out)
    if math.prod(w.shape[2:]) > 1:
        q = q + _along(size.movedim((0, 1), (-2, -1)), w.ndim - 2, pattern, tau).movedim(
            (-2, -1), (0, 1)
        )
    return q


FORMS = ("", "soft-threshold", "multi-axis")
"""Forms of a kept weight: unchanged, the part above a threshold, and enhanced if important."""


def _along(size: Tensor, first: int, pattern: Pattern, tau: float) -> Tensor:
    """q along the axes from `first` on, taken as one."""
    flat = size.flatten(first)
    count = flat.shape[-1]
    pruned = (pattern.m - pattern.n) * count // pattern.m
    if not 0 < pruned < count:
        return torch.ones_like(size) if pruned == 0 else torch.zeros_like(size)
    order = flat.argsort(dim=-1, stable=True, descending=True)
    top = flat.gather(-1, order[..., count - pruned - 1 : count - pruned + 1])
    among = torch.zeros_like(flat, dtype=torch.bool)
    among.scatter_(-1, order[..., : count - pruned], True)
    soft = torch.sigmoid((flat - top.mean(-1, keepdim=True)) / tau)
    return torch.where(among, soft, 0.0).unflatten(-1, size.shape[first:])
