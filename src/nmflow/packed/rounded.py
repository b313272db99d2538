"""Rounded values: which of them can be asked for, the error of outputs, and modules of many."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.kernels import int8
from nmflow.packed.modules import PackedLinear

_TOKENS = 32


def check_values(values: str | None, activations: str, dtype: str | None) -> None:
    """Raise a `CompressError` unless the three arguments of `compress` go together."""
    if dtype not in (None, "bfloat16"):
        raise CompressError(
            f"dtype is {dtype!r}: it must be 'bfloat16', or None to multiply in the weight's own"
        )
    if dtype is not None and values is not None:
        raise CompressError(
            f"dtype is {dtype!r} and values {values!r}: values are rounded once, so pass one"
        )
    if values not in (None, "int8"):
        raise CompressError(f"values is {values!r}: it must be 'int8', or None to keep their bits")
    if activations not in int8.ACTIVATIONS:
        raise CompressError(f"activations is {activations!r}: it must be 'float' or 'int8'")
    if values is None and activations != "float":
        raise CompressError(
            "activations is 'int8' and values None: whole numbers are multiplied by whole "
            "numbers, so pass values='int8' too"
        )


def refuse_device(values: str, activations: str, device: torch.device) -> None:
    """Refuse 8-bit values, and 8-bit inputs, where no kernel multiplies them."""
    if device.type not in ("cpu", "meta", "cuda"):
        raise CompressError(
            f"values is {values!r} and the model is on {device}: 8-bit values have kernels on CPUs "
            "and NVIDIA GPUs, so leave values out, or move the model to one of them first"
        )
    if device.type == "cuda" and activations == "int8":
        raise CompressError(
            f"activations is 'int8' and the model is on {device}: 8-bit inputs have kernels on "
            "CPUs alone, so leave activations out, or move the model to the CPU first"
        )


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
