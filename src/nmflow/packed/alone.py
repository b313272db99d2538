"""Run a part of a network alone on a random input, to see what its forward pass does."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmflow.packed.modules import PackedLinear

# Exceptions of a forward pass that does not run on one plain tensor.
_NOT_ALONE = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError,
)  # fmt: skip


def takes_one(module: nn.Module) -> bool:
    """Whether its forward pass needs exactly one argument."""
    wanted = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(wanted) == 1


def random_input(layer: PackedLinear) -> Tensor:
    """A random input, which leaves the state of the random generator alone."""
    drawn = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    return drawn.to(layer.like)


def run_alone(parent: nn.Module, x: Tensor) -> list[Tensor] | None:
    """The output tensors of a parent for one input, in evaluation mode; None if it does not run.

    Its mode and the state of the CPU's random generator are restored; the generator's start is
    fixed. `torch.manual_seed` would set those of all GPUs too, for good.
    """
    modes = [(module, module.training) for module in parent.modules()]
    try:
        parent.eval()  # so that no statistics move
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            return [leaf for leaf in tree_leaves(parent(x)) if isinstance(leaf, Tensor)]
    except _NOT_ALONE:
        return None
    finally:
        for module, training in modes:
            module.training = training


def alike(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether outputs agree within rounding."""
    near = {"rtol": 0.02, "atol": 0.02, "equal_nan": True}  # two-byte outputs are rounded once less
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x.double(), y.double(), **near)
        for x, y in zip(a, b, strict=True)
    )
