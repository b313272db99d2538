"""Feed-forward blocks: the matrices that write hidden units, and the one that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmflow.flow.casts import forget_casts
from nmflow.select.stacks import UP
from nmflow.select.target import Target


@dataclass(frozen=True)
class Axis:
    """Hidden units along one axis of a parameter.

    Attributes:
        name: the parameter's name.
        param: the parameter.
        dim: the axis.
        times: how often the units repeat along the axis: 2 in a fused gate and up projection.
    """

    name: str
    param: Tensor
    dim: int
    times: int = 1


@dataclass(frozen=True)
class HiddenBlock:
    """Hidden units between matrices; their order does not change the function.

    Attributes:
        name: their part of the network.
        units: their number.
        ups: the matrices that write them, with the pattern of each.
        down: the matrix that reads them.
        axes: every axis along which a parameter has them, biases too.
    """

    name: str
    units: int
    ups: tuple[Target, ...]
    down: Target
    axes: tuple[Axis, ...]


def find_blocks(
    model: nn.Module, targets: Sequence[Target]
) -> tuple[list[HiddenBlock], list[tuple[str, str]]]:
    """Feed-forward blocks among targets: one or more matrices into hidden units, and one out.

    Args:
        model: the network.
        targets: its feed-forward weights, in the model's order.

    Returns:
        The blocks, and (name, reason) of each target in none.
    """
    blocks, left_out = [], []
    open_ups: list[Target] = []
    params = dict(model.named_parameters())

    def leave(ups: list[Target]) -> None:
        left_out.extend((t.label, "no matrix reads its outputs alone") for t in ups)

    for target in targets:
        if target.stacked or target.rows is not None or len(target.shape) != 2:
            left_out.append((target.label, "a stack, a part of a matrix or a convolution"))
            continue
        width, depth = target.shape[1 - target.dim], target.shape[target.dim]
        into = [t for t in open_ups if _near(t, target) and depth * _times(t, depth) == _out(t)]
        if into and not _writes(target) and all(t.shape[t.dim] == width for t in into):
            leave([t for t in open_ups if t not in into])
            blocks.append(_block(model, params, tuple(into), target))
            open_ups = []
        else:
            if open_ups and not _near(open_ups[-1], target):
                leave(open_ups)
                open_ups = []
            open_ups.append(target)
    leave(open_ups)
    return blocks, left_out


def permute_(axes: Sequence[Axis], order: Tensor) -> None:
    """Reorder the hidden units of parameters in place."""
    for axis in axes:
        reorder_(axis.param.data, axis, order)
    forget_casts()


@torch.no_grad()
def reorder_(tensor: Tensor, axis: Axis, order: Tensor) -> None:
    """Reorder the hidden units along an axis of a tensor in place."""
    units = len(order)
    index = torch.cat([order + i * units for i in range(axis.times)]).to(tensor.device)
    tensor.copy_(tensor.index_select(axis.dim, index))


def _block(
    model: nn.Module, params: Mapping[str, Tensor], ups: tuple[Target, ...], down: Target
) -> HiddenBlock:
    units = down.shape[down.dim]
    axes = [Axis(down.name, params[down.name], down.dim)]
    for up in ups:
        times = _times(up, units)
        axes.append(Axis(up.name, params[up.name], 1 - up.dim, times))
        home = up.name.rpartition(".")[0]
        for own, param in model.get_submodule(home).named_parameters(prefix=home, recurse=False):
            if own != up.name and param.ndim and param.shape[0] == units * times:
                axes.append(Axis(own, params.get(own, param), 0, times))
    name = _common(ups[0].name, down.name)
    return HiddenBlock(name or down.name, units, ups, down, tuple(axes))


def _out(target: Target) -> int:
    return target.shape[1 - target.dim]


def _times(target: Target, units: int) -> int:
    return 2 if _out(target) == 2 * units else 1


def _writes(target: Target) -> bool:
    """Whether a name says that a matrix writes hidden units, as where all sizes are the same."""
    return not UP.isdisjoint(target.name.split(".")[-2:])


def _near(one: Target, other: Target) -> bool:
    """Whether two weights lie in one block: they differ in one module, or in one below it."""
    shared = _common(one.name, other.name)
    deep = len(shared.split(".")) if shared else 0
    return max(one.name.count("."), other.name.count(".")) - deep <= 2


def _common(one: str, other: str) -> str:
    same = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        same.append(a)
    return ".".join(same)
