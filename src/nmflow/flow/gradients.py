"""The gradient rules, what a dense weight receives of g = ∂L/∂W̃, and the pull beside them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nmflow import masks
from nmflow.masks import native as native_masks

_BLOCK = 1 << 15
"""Weights in one block of a rule on a CPU: temporary results then stay in the cache."""


def masked(g: Tensor, kept: Tensor, fading: Tensor | None, delta: float) -> None:
    r"""The masked (chain) rule, in place: `g ⊙ (m + (1 - m) ⊙ m' · δ)`."""
    if fading is None and masks.one_pass_holds(g, kept):
        native_masks.hold(g, kept, delta, g)
        return
    factor = torch.full((), delta, dtype=g.dtype, device=g.device)
    one, zero = torch.ones_like(factor), torch.zeros_like(factor)
    if fading is None:
        for part, m in _blocks(g, kept):
            part.mul_(torch.where(m, one, factor))
    else:
        for part, m, other in _blocks(g, kept, fading):
            part.mul_(torch.where(m, one, torch.where(other, factor, zero)))


def refined(g: Tensor, dense: Tensor, kept: Tensor, lam: float, scale: Tensor | None) -> None:
    r"""SR-STE's term, in place: `g + λ·(1 - m) ⊙ W`.

    Args:
        g: the gradient, multiplied by `scale` if it is given.
        dense: W.
        kept: m.
        lam: λ.
        scale: the loss scale that a fused optimizer divides by inside its step; the term is
            scaled alike, so that λ is what it says.
    """
    if masks.one_pass_holds(dense, kept, g):
        lam *= 1.0 if scale is None else float(scale)
        native_masks.hold(dense, kept, 1.0, g, values=g, pull=lam)
        return
    for part, w, m in _blocks(g, dense, kept):
        pull = w.masked_fill(m, 0.0)
        part.add_(pull if scale is None else pull.mul_(scale.to(pull.device)), alpha=lam)


def drawn(
    dense: Tensor,
    shown: Tensor,
    lr: float | Tensor,
    pull: float,
    kept: Tensor | None = None,
    delta: float = 0.0,
) -> None:
    r"""The pull of W to W̃, in place: `W + min(1, lr·μ)·(W̃ - W)`.

    Args:
        dense: W.
        shown: W̃.
        lr: the learning rate of W, a number or a tensor of one, which is not read on the host.
        pull: μ.
        kept: m, if it is available: then W̃ = W ⊙ (m + (1 - m)·δ) need not be read.
        delta: δ.
    """
    if kept is not None and masks.one_pass_holds(dense, kept):
        amount = min(1.0, float(lr) * pull) * (1.0 - delta)
        native_masks.hold(dense, kept, 1.0, dense, pull=-amount)
        return
    if isinstance(lr, Tensor):  # no `float`, which would wait for the device
        amount = (lr.to(dense.device, dense.dtype) * pull).clamp(max=1.0)
    else:
        amount = min(1.0, lr * pull)
    dense.lerp_(shown if kept is None else masks.project(dense, kept, None, delta), amount)


def _blocks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, a block at a time on a CPU, all at once elsewhere."""
    if first.device.type != "cpu" or first.numel() <= _BLOCK:
        yield (first, *others)
        return
    rows = max(1, _BLOCK * first.shape[0] // first.numel())
    yield from zip(first.split(rows), *(x.split(rows) for x in others), strict=True)
