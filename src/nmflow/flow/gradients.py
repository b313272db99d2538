"""The gradient rules: what a dense weight receives of g = ∂L/∂W̃."""

from __future__ import annotations

import torch
from torch import Tensor


def masked(g: Tensor, kept: Tensor, fading: Tensor | None, delta: float) -> None:
    r"""The masked (chain) rule, in place: `g ⊙ (m + (1 - m) ⊙ m' · δ)`."""
    factor = torch.full((), delta, dtype=g.dtype, device=g.device)
    one, zero = torch.ones_like(factor), torch.zeros_like(factor)
    g.mul_(torch.where(kept, one, factor if fading is None else torch.where(fading, factor, zero)))


def refined(g: Tensor, dense: Tensor, shown: Tensor, lam: float, scale: Tensor | None) -> None:
    r"""SR-STE's term, in place: `g + λ·(1 - m) ⊙ W`, with `(1 - m) ⊙ W = W - W̃` where δ is 0.

    Args:
        g: the gradient, multiplied by `scale` where there is one.
        dense: W.
        shown: W̃.
        lam: λ.
        scale: the loss scale that a fused optimizer divides by inside its step; the term is
            scaled alike, so that λ is what it says.
    """
    pull = (dense - shown).mul_(lam)
    g.add_(pull if scale is None else pull.mul_(scale.to(pull.device)))
