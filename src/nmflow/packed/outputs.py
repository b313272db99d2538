"""Outputs of two networks that ought to be the same: how far apart they are, and the error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nmflow.errors import CompressError

_SMALLEST = 1e-6  # of a largest value: below it, differences count as they are
_MEDIANS = 30.0  # a value beyond as many of them is a mask's: others are not measured by it


def distance(want: Tensor, got: Tensor) -> float:
    r"""How far a tensor is from another: `max |want - got| / max |want|`, over finite places.

    A NaN or an infinity is only equal to itself; against anything else, and between two shapes, the
    distance is infinite. A value far from all others, such as the least number of a dtype in what
    is masked, is the largest for itself alone.

    Example:
        >>> inf = math.inf
        >>> distance(torch.tensor([-inf, 4.0]), torch.tensor([-inf, 5.0]))
        0.25
        >>> distance(torch.tensor([1.0]), torch.tensor([math.nan]))
        inf
    """
    if want.shape != got.shape:
        return math.inf
    if not want.numel():
        return 0.0
    a, b = want.double(), got.double()
    equal = (a == b) | (a.isnan() & b.isnan())
    off = (a - b).abs().masked_fill(equal, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    sizes = torch.where(a.isfinite(), a, 0.0).abs()
    some = sizes[sizes > 0]
    largest = min(float(some.max()), _MEDIANS * float(some.median())) if some.numel() else 0.0
    return float((off / sizes.clamp_min(max(largest, _SMALLEST))).max())


def check_near(
    want: Sequence[Tensor], got: Sequence[Tensor], near: float, of: str, than: str, mend: str
) -> None:
    """Raise `CompressError` unless outputs are near those that they should be.

    Args:
        want: the outputs of one network.
        got: those of the other.
        near: the largest `distance` that is allowed.
        of: the other network, in words.
        than: the one, in words.
        mend: what the caller can do.
    """
    if len(want) != len(got):
        raise CompressError(f"{of} has {len(got)} outputs and {than} {len(want)}: {mend}")
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        far = distance(a, b)
        if far > near:
            said = f"by {far:.2g} of its largest value, above {near:g}"
            if a.shape != b.shape:
                said = f"in shape, {tuple(b.shape)} and not {tuple(a.shape)}"
            elif math.isinf(far):
                said = "where one of them is a NaN or an infinity"
            raise CompressError(f"output {i} of {of} differs from that of {than} {said}: {mend}")
