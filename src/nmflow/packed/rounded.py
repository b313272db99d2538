"""Shared by packed layers with rounded values: the error of outputs, and modules of many."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nmflow.packed.modules import PackedLinear

_TOKENS = 32


def output_error(linear: PackedLinear, product: Callable[[Tensor], Tensor]) -> float | None:
    """The root mean square error of a product, relative to the exact layer's, without bias.

    On 32 tokens of normal inputs; None where the values are on `meta`.
    """
    if linear.values.is_meta:
        return None
    drawn = torch.randn(_TOKENS, linear.in_features, generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(linear.values.device)
    with torch.no_grad():
        matrix = linear.dense().float()
        want = drawn @ (matrix if linear.stored == "Conv1D" else matrix.T)
        got = product(drawn)
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def each_linear(module: nn.Module, of: Callable[[PackedLinear], PackedLinear]) -> nn.Module:
    """A packed module with its packed linear layers replaced; other modules in it are kept."""
    if isinstance(module, PackedLinear):
        return of(module)
    made = copy.copy(module)
    made._modules = {n: m and each_linear(m, of) for n, m in module._modules.items()}
    return made
