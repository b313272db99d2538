"""SparseGPT: prune a matrix and update the kept weights to compensate; a pure function."""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow.errors import PatternError, WeightError
from nmflow.masks import mask
from nmflow.numbers import check_positive
from nmflow.pattern import Pattern

DAMPING, BLOCK = 0.01, 128


def sparsegpt(
    w: Tensor,
    gram: Tensor,
    pattern: str | Pattern,
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Tensor:
    r"""Prune a matrix to N:M so that its outputs on the calibration inputs change little.

    Columns go from left to right. With `H = X Xᵀ + damping · mean(diag) · I`, and at column j the
    inverse over the columns that are still free, `G = (H[j:, j:])⁻¹`: at the first column of a
    group, the N of M with the largest `wⱼ² / G₀₀` are kept, summed over the rows of a panel; ties
    go to the lowest index. Each pruned weight is then spread over the columns to its right by
    optimal brain surgeon's update, `w[j:] ← w[j:] - wⱼ / G₀₀ · G[0, :]`. Weights of inputs that are
    always 0 become 0.

    Args:
        w: the weight, `(out, in)`, float; not changed.
        gram: `X Xᵀ` over the calibration tokens, `(in, in)`.
        pattern: `"N:M"` or `"N:M@V"`.
        damping: as a share of the mean of the diagonal, above 0.
        block: columns after which updates reach the rest of the matrix, rounded up to whole groups.
            It changes the speed only.

    Returns:
        The pruned weight in float32, or in float64 if `w` is. It holds the pattern exactly.

    Raises:
        WeightError: shapes that do not fit, a NaN or an infinity, or a Gram matrix that cannot be
            inverted.
        PatternError: M does not divide the inputs.

    Example:
        >>> import torch
        >>> sparsegpt(torch.tensor([[2.0, 1.0]]), torch.ones(2, 2), "1:2", damping=1e-6)
        tensor([[0.0000, 3.0000]])

    References:
        Frantar and Alistarh, arXiv 2301.00774. Differs from the released code: panels, and ties.
    """
    pattern = Pattern(pattern)
    _check(w, gram, pattern, damping)
    wide = torch.promote_types(w.dtype, torch.float32)
    out, h = w.detach().to(wide, copy=True), gram.to(wide, copy=True)
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    out[:, dead] = 0.0
    diagonal += damping * diagonal.mean()
    upper = _factor(h)
    width = -(-block // pattern.m) * pattern.m
    for start in range(0, out.shape[1], width):
        stop = min(start + width, out.shape[1])
        part, inverse = out[:, start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(part)
        for j in range(stop - start):
            if j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                score = (part[:, group] / inverse.diagonal()[group]).square()
                kept = mask(score, pattern)
            error = torch.where(kept[:, j % pattern.m], 0.0, part[:, j]) / inverse[j, j]
            part[:, j:] -= error[:, None] * inverse[j, j:]
            part[:, j].masked_fill_(~kept[:, j % pattern.m], 0.0)
            errors[:, j] = error
        out[:, stop:] -= errors @ upper[start:stop, stop:]
    return out


def _factor(h: Tensor) -> Tensor:
    """The upper Cholesky factor of H⁻¹; row j holds the inverse of the columns from j on."""
    lower, failed = torch.linalg.cholesky_ex(h)
    if not bool(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed):
        raise WeightError(
            "gram cannot be inverted: give more calibration tokens or a larger damping"
        )
    return upper


def _check(w: Tensor, gram: Tensor, pattern: Pattern, damping: float) -> None:
    if w.ndim != 2 or not w.is_floating_point():
        raise WeightError(
            f"w is {w.dtype} of shape {tuple(w.shape)}: give a matrix (out, in) of floats"
        )
    if tuple(gram.shape) != (w.shape[1], w.shape[1]):
        raise WeightError(
            f"gram is {tuple(gram.shape)}: a weight of {tuple(w.shape)} takes "
            f"({w.shape[1]}, {w.shape[1]})"
        )
    if w.shape[1] % pattern.m:
        raise PatternError(
            f"pattern is '{pattern}', but w has {w.shape[1]} inputs: choose an M that divides them"
        )
    if not (bool(torch.isfinite(w).all()) and bool(torch.isfinite(gram).all())):
        raise WeightError("w or gram holds a NaN or an infinity: give finite ones")
    check_positive("damping", damping, WeightError, f", such as {DAMPING}")
