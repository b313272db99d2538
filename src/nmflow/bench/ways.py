"""A dense network in the ways that torch has: on oneDNN's packed weights, and in int8."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nmflow.packed.compress import replace_modules
from nmflow.packed.faster import on_onednn
from nmflow.packed.modules import PackedLinear
from nmflow.select.weights import is_hf_conv1d


def tokens_of(model: nn.Module, example: Mapping[str, Any]) -> dict[nn.Module, int]:
    """How many rows each linear layer, dense or packed, multiplies in one run of an example."""
    seen: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[module] = max(seen.get(module, 0), math.prod(args[0].shape[:-1]))

    kinds = (nn.Linear, PackedLinear)
    linears = [m for m in model.modules() if type(m) in kinds]
    handles = [m.register_forward_hook(note) for m in linears]
    try:
        with torch.inference_mode():
            model(**example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def as_linears(model: nn.Module) -> nn.Module:
    """A copy whose HF `Conv1D` layers are `nn.Linear`, which oneDNN and int8 know.

    The model itself where it has none.
    """
    new: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if is_hf_conv1d(module):
            stored, bias = module.get_parameter("weight"), module.get_parameter("bias")
            inputs, outputs = stored.shape
            linear = nn.Linear(inputs, outputs, device="meta", dtype=stored.dtype)
            linear.weight = nn.Parameter(stored.detach().T.contiguous())
            linear.bias = nn.Parameter(bias.detach().clone())
            new[module] = linear.train(module.training)
    return replace_modules(model, new, inplace=False) if new else model


def best_dense(model: nn.Module, example: Mapping[str, Any]) -> nn.Module:
    """A copy of a dense network whose linear layers use oneDNN's packed weights where faster."""
    model = as_linears(model)
    return replace_modules(model, on_onednn(tokens_of(model, example)), inplace=False)


def int8_dynamic(model: nn.Module) -> nn.Module | None:
    """The dense network with torch's int8 dynamic quantization; None where torch has none."""
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, and still what runs
        return quantize(copy.deepcopy(as_linears(model)), {nn.Linear}, dtype=torch.qint8)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for exported files."""
    return tempfile.TemporaryDirectory(prefix="nmflow-bench-")
