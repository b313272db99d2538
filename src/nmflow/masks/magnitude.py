"""Magnitude masks, panels, and the projection of one weight: pure functions of tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nmflow import native
from nmflow.errors import PatternError, WeightError
from nmflow.masks import native as native_masks
from nmflow.masks import triton as gpu
from nmflow.pattern import Pattern

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mask(w: Tensor, pattern: str | Pattern, dim: int = 1, *, stacked: bool = False) -> Tensor:
    r"""Magnitude mask of a weight: True at the N largest `|w|` of every M along `dim`.

    `m = 1` for the N largest of each group `|w[M*g : M*(g+1)]|`, else 0. Ties go to the lowest
    index, so every group has exactly N True in every dtype and on every device. With a panel of V
    rows, `|w|` is summed over V consecutive output rows, which then share their kept columns.

    Args:
        w: the weight, `(out, in)`, a convolution's `(out, in, kh, kw)`, or any shape; float16,
            bfloat16, float32 or float64. Read only.
        pattern: `"N:M"` or `"N:M@V"`, N the number kept.
        dim: the axis that is cut into groups, as a rule the input axis. Panels run along the
            output axis: 0, or 1 where `dim` is 0.
        stacked: whether axis 0 counts matrices, such as experts': `w` is `(experts, out, in)` with
            `dim` 2, or `(experts, in, out)` with `dim` 1, and panels run along `out`.

    Returns:
        A bool tensor of the shape of `w`, on its device.

    Raises:
        WeightError: `w` is not a float tensor, or holds a NaN or an infinity.
        PatternError: the axis is missing or is not divisible by M.

    Example:
        >>> import torch
        >>> mask(torch.tensor([[1.0, -3.0, 2.0, 2.0]]), "2:4").tolist()
        [[False, True, True, False]]

    References:
        arXiv 2402.04744, section 2. Differs from the released code: groups never straddle rows.
    """
    pattern = Pattern(pattern)
    check_groups(w, pattern, dim, stacked)
    kept, finite = select(w.detach(), pattern, dim, stacked)
    if not bool(finite):
        raise WeightError(
            "w holds a NaN or an infinity, which no magnitude mask can order: correct the weight "
            "before you mask it"
        )
    return kept


def holds(w: Tensor, pattern: str | Pattern, dim: int = 1, *, stacked: bool = False) -> bool:
    """Say whether a weight keeps a pattern: at most N non-zeros in every group of M along `dim`.

    Args:
        w: the weight, as for `mask`.
        pattern: `"N:M"`; with a panel, at most N columns of a group are used by its V rows.
        dim: the grouped axis.
        stacked: as for `mask`.

    Raises:
        PatternError: the axis is missing or is not divisible by M.

    Example:
        >>> import torch
        >>> holds(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), "1:4")
        True
    """
    pattern = Pattern(pattern)
    check_groups(w, pattern, dim, stacked)
    used = _grouped(w.detach() != 0, pattern, dim, stacked)
    if pattern.panel > 1:
        used = _panels(used.to(torch.uint8), pattern.panel).amax(1) != 0
    return bool((used.sum(-1) <= pattern.n).all())


def project(w: Tensor, kept: Tensor, fading: Tensor | None = None, delta: float = 0.0) -> Tensor:
    r"""What the network computes with: `W̃ = W ⊙ (m + (1 - m) ⊙ m' · δ)`.

    Args:
        w: the dense weight W.
        kept: the bool mask m.
        fading: the bool mask m' of the weights that may still fade; None lets all of them.
        delta: δ, the value of the mask where `kept` is False; 0 prunes exactly.

    Returns:
        A new tensor of the shape and dtype of `w`.

    Example:
        >>> import torch
        >>> w = torch.tensor([[4.0, 2.0]])
        >>> project(w, torch.tensor([[True, False]]), delta=0.5).tolist()
        [[4.0, 1.0]]

    References:
        arXiv 2402.04744, MDGF; `m'` is nmflow's, for the hybrid of MDGF and SDGF.
    """
    # torch.where, not a product: a product would make -0.0 of pruned negatives.
    if delta == 0.0:
        return torch.where(kept, w, torch.zeros((), dtype=w.dtype, device=w.device))
    if fading is None:
        return torch.where(kept, w, w * delta)
    faded = torch.where(fading, w * delta, torch.zeros((), dtype=w.dtype, device=w.device))
    return torch.where(kept, w, faded)


def check_groups(w: Tensor, pattern: Pattern, dim: int, stacked: bool = False) -> None:
    """Raise unless `w` is a float tensor whose axis `dim` divides into groups of M."""
    if not isinstance(w, Tensor) or w.dtype not in _DTYPES:
        kind = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise WeightError(
            f"w is {kind}: a mask needs a tensor of float16, bfloat16, float32 or float64"
        )
    if not -w.ndim <= dim < w.ndim:
        raise PatternError(
            f"dim is {dim}, but w has the shape {tuple(w.shape)}: name one of its axes"
        )
    if stacked and (w.ndim != 3 or dim % 3 == 0):
        raise PatternError(
            f"dim is {dim} of a stack of shape {tuple(w.shape)}: a stack of matrices has three "
            "axes, and its groups run along 1 or 2"
        )
    if w.shape[dim] % pattern.m:
        raise PatternError(
            f"pattern is '{pattern}', but axis {dim} of the shape {tuple(w.shape)} has length "
            f"{w.shape[dim]}: choose an M that divides it"
        )


def select(w: Tensor, pattern: Pattern, dim: int, stacked: bool = False) -> tuple[Tensor, Tensor]:
    """Mask without checks, and a bool scalar that says whether all of `w` was finite.

    The scalar stays on the device of `w`, so that a training step need not wait for it.
    """
    if one_pass_serves(w, pattern, dim, stacked=stacked):
        kept = torch.empty_like(w, dtype=torch.bool)
        return kept, one_pass(w, pattern, dim, mask=kept, stacked=stacked)
    size = _grouped(w, pattern, dim, stacked).abs()
    if pattern.panel > 1:
        wide = size if size.dtype == torch.float64 else size.float()
        size_out = wide.shape[0]
        first, *rest = _panels(wide, pattern.panel).unbind(1)
        # Row by row, as the compiled kernel adds: `sum` has an order of its own, and rounds by it.
        size = functools.reduce(torch.add, rest, first)
        # A sum may overflow where no weight is infinite, and still orders the columns.
        finite = torch.isfinite(w).all()
    else:
        finite = torch.isfinite(size.amax()) if size.numel() else torch.tensor(True)
    kept = _largest(size, pattern.n)
    if pattern.panel > 1:
        kept = kept.repeat_interleave(pattern.panel, 0)[:size_out]
    kept = kept.flatten(-2)
    return (kept.transpose(0, 1) if stacked else kept).movedim(-1, dim), finite


def touched(places: Tensor, pattern: Pattern, dim: int, stacked: bool = False) -> Tensor:
    """Every place whose group of M, or panel of them, has a True among `places`."""
    some = _grouped(places, pattern, dim, stacked).any(-1)
    if pattern.panel > 1:
        wide = _panels(some.to(torch.uint8), pattern.panel).amax(1) != 0
        some = wide.repeat_interleave(pattern.panel, 0)[: some.shape[0]]
    some = some.unsqueeze(-1).expand(*some.shape, pattern.m).flatten(-2)
    return (some.transpose(0, 1) if stacked else some).movedim(-1, dim)


def largest_groups(
    w: Tensor, pattern: Pattern, dim: int, share: float, stacked: bool = False
) -> Tensor:
    """Every place of a share of the groups of M, those of the largest Σ|w|; ties to the first.

    With a panel, the groups of its rows go together.
    """
    sums = _grouped(w, pattern, dim, stacked).abs().sum(-1)
    wide = _panels(sums, pattern.panel).sum(1) if pattern.panel > 1 else sums
    count = int(share * wide.numel())
    first = wide.flatten().argsort(descending=True, stable=True)[:count]
    some = torch.zeros(wide.numel(), dtype=torch.bool, device=w.device)
    some = some.index_fill_(0, first, True).view_as(wide)
    if pattern.panel > 1:
        some = some.repeat_interleave(pattern.panel, 0)[: sums.shape[0]]
    some = some.unsqueeze(-1).expand(*some.shape, pattern.m).flatten(-2)
    return (some.transpose(0, 1) if stacked else some).movedim(-1, dim)


def one_pass_serves(
    w: Tensor, pattern: Pattern, dim: int, out: Tensor | None = None, stacked: bool = False
) -> bool:
    """Say whether a kernel takes this weight, and `out`, as they lie in memory."""
    if w.device.type != "cpu":
        return gpu.serves(w, pattern) and (out is None or gpu.alike(w, out))
    return (
        w.dtype != torch.float64
        and (pattern.panel == 1 or dim % w.ndim != (1 if stacked else 0))
        and w.is_contiguous()
        and (out is None or out.is_contiguous())
        and native.available()
    )


def one_pass(
    w: Tensor,
    pattern: Pattern,
    dim: int,
    delta: float = 0.0,
    *,
    scale: Tensor | None = None,
    pull: float = 0.0,
    stacked: bool = False,
    **tensors: Any,
) -> Tensor:
    """The kernel of the device; whether `w` was finite, as a bool scalar where `w` is.

    Args:
        w: a weight that `one_pass_serves` takes.
        pattern: the pattern.
        dim: the grouped axis.
        delta: δ.
        scale: multiplies `pull`; a tensor of one number.
        pull: as for `native.project` and `gpu.project`.
        stacked: as for `mask`.
        **tensors: `mask`, `out` and `values`, as for them.
    """
    if w.device.type != "cpu":
        return gpu.project(w, pattern, dim, delta, pull=pull, scale=scale, **tensors)
    pull *= 1.0 if scale is None else float(scale)
    n, m, panel = pattern.n, pattern.m, pattern.panel
    if not stacked or panel == 1:  # groups alone need not know where a matrix ends
        return torch.tensor(
            native_masks.project(w, n, m, delta, dim=dim, panel=panel, pull=pull, **tensors)
        )
    fine = [
        native_masks.project(
            one, n, m, delta, dim=dim % 3 - 1, panel=panel, pull=pull,
            **{key: None if x is None else x[i] for key, x in tensors.items()},
        )
        for i, one in enumerate(w)
    ]  # fmt: skip
    return torch.tensor(all(fine))


def _grouped(w: Tensor, pattern: Pattern, dim: int, stacked: bool) -> Tensor:
    """View `(out, ..., groups, M)`: the grouped axis last, the output axis first."""
    last = w.movedim(dim, -1)
    return (last.transpose(0, 1) if stacked else last).unflatten(-1, (-1, pattern.m))


def _panels(x: Tensor, rows: int) -> Tensor:
    """View `(panels, rows, ...)`, the last panel filled up with zeros."""
    short = -x.shape[0] % rows
    if short:
        x = torch.cat([x, x.new_zeros(short, *x.shape[1:])])
    return x.unflatten(0, (-1, rows))


def _largest(size: Tensor, n: int) -> Tensor:
    """Exactly `n` True per group of the last axis, at the largest; ties to the lowest index."""
    m = size.shape[-1]
    if n == m or size.numel() == 0:
        return torch.ones_like(size, dtype=torch.bool)
    if gpu.serves(size, pattern := Pattern(f"{n}:{m}")):  # the sums of panels
        kept = torch.empty_like(size, dtype=torch.bool)
        gpu.project(size, pattern, -1, mask=kept)
        return kept
    if n == 1:  # argmax is documented to return the first maximum
        kept = torch.zeros_like(size, dtype=torch.bool)
        return kept.scatter_(-1, size.argmax(-1, keepdim=True), True)
    if n == m - 1:  # all but the smallest, the last of equal ones
        kept = torch.ones_like(size, dtype=torch.bool)
        return kept.scatter_(-1, m - 1 - size.flip(-1).argmin(-1, keepdim=True), False)
    # topk breaks ties as it likes, so it only gives the threshold; the first ties fill the rest.
    threshold = size.topk(n, sorted=False).values.amin(-1, keepdim=True)
    above, equal = size > threshold, size == threshold
    room = n - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))
