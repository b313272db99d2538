"""Scores of weights that know the activations: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow.errors import WeightError


def wanda_score(w: Tensor, norm: Tensor, dim: int = 1) -> Tensor:
    r"""Size of each weight times the size of the input that it multiplies: `|W| · ‖x‖`.

    `S[i, j] = |W[i, j]| · ‖x_j‖₂`, with `x_j` all values of input j over the calibration tokens.
    `mask(wanda_score(w, norm), pattern)` keeps the N largest of every M; with a panel the scores of
    its rows are summed, as magnitudes are, and ties go to the lowest index.

    Args:
        w: the weight, `(out, in)`, `(in, out)` with `dim` 0, a convolution's `(out, in, kh, kw)`,
            or a stack of matrices with three axes. Read only.
        norm: ‖x_j‖₂ of each input, `(in,)`, 0 or more; of a stack also `(experts, in)`.
        dim: the axis of the inputs.

    Returns:
        A tensor of the shape of `w`, in float32, or float64 where `w` is.

    Raises:
        WeightError: `norm` does not fit the axis, or holds a negative number, a NaN or an infinity.

    Example:
        >>> import torch
        >>> w = torch.tensor([[3.0, -1.0]])
        >>> wanda_score(w, torch.tensor([1.0, 4.0])).tolist()
        [[3.0, 4.0]]

    References:
        Sun et al., arXiv 2306.11695.
    """
    axis = dim % w.ndim
    shapes: list[tuple[int, ...]] = [(w.shape[axis],)]
    if w.ndim == 3 and axis > 0:
        shapes.append((w.shape[0], w.shape[axis]))
    if tuple(norm.shape) not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise WeightError(
            f"norm is {tuple(norm.shape)}, but axis {dim} of a weight of {tuple(w.shape)} takes "
            f"{allowed}: give one norm for each input"
        )
    if not bool((torch.isfinite(norm) & (norm >= 0)).all()):
        raise WeightError(
            "norm holds a negative number, a NaN or an infinity: give norms of finite inputs"
        )
    wide = torch.promote_types(w.dtype, torch.float32)
    shape = [1] * w.ndim
    shape[axis] = w.shape[axis]
    if norm.ndim == 2:
        shape[0] = w.shape[0]
    return w.detach().abs().to(wide) * norm.to(w.device, wide).reshape(shape)
