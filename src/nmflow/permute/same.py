"""Whether a network computes the same as before, but for rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmflow.errors import PlanError
from nmflow.inspect.flops import split_inputs
from nmflow.packed.outputs import distance
from nmflow.permute.blocks import HiddenBlock

_NEAR = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-9}
"""The tolerance of a dtype, since sums are in another order; else 1e-4."""


def outputs_of(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Copies of a network's floating-point outputs, in evaluation mode.

    Raises:
        PlanError: there are none.
    """
    args, kwargs = split_inputs(example_inputs)
    with _evaluating(model):
        leaves = tree_leaves(model(*args, **kwargs))
    # A copy: an output may be a view of a weight.
    found = [x.detach().clone() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise PlanError(
            f"the outputs of {type(model).__name__} hold no floating-point tensor, by which an "
            "order could be checked: let forward return one, alone or in a tuple, a list or a dict"
        )
    return found


def outputs_and_tolerance(
    model: nn.Module, blocks: Sequence[HiddenBlock], example_inputs: Any
) -> tuple[list[Tensor], float]:
    """`outputs_of` a network, and how near others must be, relative to the largest value.

    The coarsest dtype decides, of weights, of outputs, and of what the blocks compute: autocast
    around the network sets that, or inside of it.
    """
    seen = {axis.param.dtype for block in blocks for axis in block.axes}

    def look(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            seen.add(out.dtype)

    owners = [model.get_submodule(block.down.name.rpartition(".")[0]) for block in blocks]
    hooks = [owner.register_forward_hook(look) for owner in owners]
    try:
        found = outputs_of(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    seen.update(x.dtype for x in found)
    return found, max(_NEAR.get(dtype, 1e-4) for dtype in seen)


def same(before: list[Tensor], after: list[Tensor], near: float) -> bool:
    """Whether outputs are the same but for rounding; a NaN can tell nothing."""
    return len(before) == len(after) and all(
        not bool(one.isnan().any()) and distance(one, other) <= near
        for one, other in zip(before, after, strict=True)
    )


def moved(before: list[Tensor], after: list[Tensor]) -> float:
    """How far outputs have moved: ‖after - before‖ / ‖before‖ of each, added up."""
    total = 0.0
    for one, other in zip(before, after, strict=True):
        if one.shape != other.shape:
            return float("inf")
        finite = one.isfinite() & other.isfinite()
        one, other = one[finite].double(), other[finite].double()
        tiny = torch.finfo(torch.float64).tiny
        total += float((other - one).norm() / one.norm().clamp_min(tiny))
    return total


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
