"""This rank's part of a parameter: the whole of it, or its shard where it is a DTensor."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmflow.errors import FlowError
from nmflow.select.target import Target

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


_PLAIN = {Tensor, torch.nn.Parameter}


def sharded(x: Tensor) -> TypeIs[DTensor]:
    """Whether `x` is a DTensor.

    A DTensor exists only if its module is imported. That takes seconds, so this does not import it.
    """
    if type(x) in _PLAIN:  # asked hundreds of times a step
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(x, getattr(module, "DTensor", ()))


def local(x: Tensor) -> Tensor:
    """The memory of `x` on this rank, which autograd does not follow."""
    if sharded(x):
        with torch.no_grad():
            return x.to_local()
    return x.detach() if x.requires_grad else x


def bare(x: Tensor) -> Tensor:
    """`local`, for reading only: `x` itself where nothing is sharded."""
    return local(x) if sharded(x) else x


def summed(value: Tensor, x: Tensor) -> Tensor:
    """The sum over the whole of `x`, from what each rank has summed over its own part."""
    if not sharded(x):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placed = [Partial() if p.is_shard() else Replicate() for p in x.placements]
    return DTensor.from_local(value, x.device_mesh, placed).full_tensor()


@dataclass(frozen=True)
class Region:
    """The rows of one target on this rank.

    Attributes:
        target: the target that the rows belong to.
        start: the first row, in this rank's part of the parameter, along the output axis.
        count: how many rows; 0 where this rank holds none of the target.
        whole: whether the rows are all of this rank's part.
    """

    target: Target
    start: int
    count: int
    whole: bool

    def of(self, part: Tensor) -> Tensor:
        """View the region in a tensor that is shaped like this rank's part."""
        if self.whole:
            return part
        return part.narrow(self.target.out_dim, self.start, self.count)


def region(param: Tensor, target: Target, longest: int) -> Region:
    """Find a target's rows on this rank.

    Args:
        param: the parameter, sharded or not.
        target: the target.
        longest: the largest M that the recipe uses on it; a shard must not cut such a group.

    Raises:
        FlowError: a shard cuts a group of M inputs or a panel of rows.
    """
    out, part = target.out_dim, local(param)
    offsets = _offsets(param)
    held, total = part.shape[target.dim], param.shape[target.dim]
    if (offsets[target.dim] % longest or held % longest) and held != total:
        raise FlowError(
            f"'{target.name}' is sharded along its grouped axis {target.dim}, into a part of "
            f"{held} from {offsets[target.dim]}, which cuts groups of {longest}: shard another axis"
        )
    first, last = target.rows or (0, param.shape[out])
    start = min(max(first - offsets[out], 0), part.shape[out])
    stop = max(min(last - offsets[out], part.shape[out]), start)
    panel = target.pattern.panel
    begins, ends = offsets[out] + start - first, offsets[out] + stop - first
    if stop > start and (begins % panel or (ends % panel and ends != last - first)):
        raise FlowError(
            f"'{target.name}' is sharded into rows {offsets[out] + start} to "
            f"{offsets[out] + stop}, which cuts a panel of {panel} rows of the pattern "
            f"'{target.pattern}': choose a panel that divides a shard, or fewer ranks"
        )
    # A rank may hold no expert of a stack at all, though each has its rows.
    count = stop - start if part.numel() else 0
    return Region(target, start, count, count == part.shape[out])


def _offsets(param: Tensor) -> tuple[int, ...]:
    if not sharded(param):
        return (0,) * param.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return tuple(offset)
