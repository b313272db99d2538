"""From a dense module to its packed one, and back: pure functions of one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.packed.attention import PackedAttention
from nmflow.packed.bfloat16 import BFloat16Linear
from nmflow.packed.convolution import PackedConv
from nmflow.packed.int8 import Int8Linear
from nmflow.packed.layout import as_matrix
from nmflow.packed.modules import FusedLinear, PackedLinear
from nmflow.packed.onednn import OneDNNLinear
from nmflow.packed.parts import Part
from nmflow.pattern import Pattern
from nmflow.select.weights import is_hf_conv1d

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A packed module would not have these.
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
PACKED = (PackedLinear, FusedLinear, PackedConv, PackedAttention)


class Run(NamedTuple):
    """Output rows `start` to `stop` of a weight, which hold `pattern`."""

    start: int
    stop: int
    pattern: Pattern


def site_of(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The module that a packed one replaces for a parameter, and the parameter's name in it."""
    path, _, own = name.rpartition(".")
    parent = path.rpartition(".")[0]
    if path and isinstance(modules.get(parent), nn.MultiheadAttention):
        return parent, f"{path.rpartition('.')[2]}.{own}"
    return path, own


def why_not(module: nn.Module, name: str) -> str:
    """Why the parameter `name` of a module cannot be packed; empty if it can."""
    if isinstance(module, PACKED):
        return "packed already"
    kind = type(module)
    if kind in _LINEAR or is_hf_conv1d(module) or kind is nn.MultiheadAttention:
        pass
    elif kind in _CONV:
        if module.groups != 1:
            return "a grouped convolution has no packed kernel"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding is looked up, not multiplied"
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent layers run on torch's own fused kernels"
    else:
        return f"{kind.__name__} has no packed form"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return f"{kind.__name__} has hooks, which may read its weight"
    if "forward" in module.__dict__:
        return f"the forward of this {kind.__name__} was replaced on the instance"
    parameter = getattr(module, name)
    if parameter is None:  # an attention without biases or without one fused matrix
        return ""
    if type(parameter) not in (nn.Parameter, Tensor) or parameter.layout != torch.strided:
        return f"stored as {type(parameter).__name__}, not as a plain dense tensor"
    return ""


def why_not_runs(module: nn.Module, found: list[Run]) -> str:
    """Why runs of rows of a module's weight cannot be packed; empty if they can."""
    if type(module) in _CONV and [run[:2] for run in found] != [(0, module.out_channels)]:
        return "only some filters of the convolution hold a pattern"
    return ""


def pack_linear(
    matrix: Tensor, bias: nn.Parameter | None, found: list[Run], stored: str = "Linear"
) -> PackedLinear | FusedLinear:
    """A linear layer whose rows are packed in the given runs and dense elsewhere."""
    out = matrix.shape[0]
    if len(found) == 1 and found[0][:2] == (0, out):
        return PackedLinear.pack(matrix, found[0].pattern, bias, stored)
    parts: list[PackedLinear | nn.Linear] = []
    at = 0
    for run in [*sorted(found), None]:
        start = out if run is None else run.start
        if at < start:
            parts.append(dense_linear(matrix[at:start], _rows(bias, at, start)))
        if run is not None:
            part = PackedLinear.pack(
                matrix[run.start : run.stop], run.pattern, _rows(bias, run.start, run.stop)
            )
            parts.append(part)
            at = run.stop
    return FusedLinear(parts, stored)


def pack(module: nn.Module, found: dict[str, list[Run]]) -> nn.Module:
    """The packed module of a dense one, given the runs of each of its weights.

    Raises:
        CompressError: the module has no packed form for these runs.
    """
    if isinstance(module, nn.MultiheadAttention):
        packed = _pack_attention(module, found)
    elif type(module) in _CONV:
        runs = found["weight"]
        matrix, bias = as_matrix(module.get_parameter("weight"), 1), _bias(module)
        if why := why_not_runs(module, runs):
            raise CompressError(why)
        linear = PackedLinear.pack(matrix, runs[0].pattern, bias)
        packed = PackedConv(module, linear)  # pyright: ignore[reportArgumentType]
    else:
        stored = "Conv1D" if is_hf_conv1d(module) else "Linear"
        matrix = as_matrix(module.get_parameter("weight"), 0 if stored == "Conv1D" else 1)
        packed = pack_linear(matrix, _bias(module), found["weight"], stored)
    return packed.train(module.training)


def from_parts(
    module: nn.Module,
    parts: list[Part],
    bias: nn.Parameter | None,
    activations: str,
    dtype: torch.dtype,
) -> nn.Module:
    """The packed module of a linear layer or convolution, from its weight in canonical form.

    Args:
        module: the dense module, for its sizes; its weight is not read.
        parts: its rows.
        bias: `(out,)` or None.
        activations: of parts with 8-bit values.
        dtype: of the weight.
    """
    stored = "Conv1D" if is_hf_conv1d(module) else "Linear"
    made: list[PackedLinear | nn.Linear] = []
    whole = len(parts) == 1
    for part in parts:
        own = bias if whole else _rows(bias, part.start, part.stop)
        name = stored if whole else "Linear"
        index = part.index
        if part.shape is None or index is None:
            made.append(dense_linear(part.values, own))
        elif part.scale is None and part.values.dtype != dtype:
            made.append(BFloat16Linear(part.values, index, part.shape, own, name, dtype))
        elif part.scale is None:
            made.append(PackedLinear(part.values, index, part.shape, own, name))
        else:
            found = (part.values, part.scale, index, part.shape)
            made.append(Int8Linear(*found, own, name, activations, dtype))
    if type(module) in _CONV:
        return PackedConv(module, made[0])  # pyright: ignore[reportArgumentType]
    return made[0] if whole else FusedLinear(made, stored)


def unpack(module: nn.Module) -> nn.Module:
    """The dense module that a packed one stands for, with its exact weights."""
    if isinstance(module, OneDNNLinear):
        dense: nn.Module = nn.Linear(module.in_features, module.out_features, False, "meta")
        dense.weight, dense.bias = module.weight, module.bias
    elif isinstance(module, PackedAttention):
        dense = _unpack_attention(module)
    elif isinstance(module, PackedConv):
        dense = _unpack_conv(module)
    elif isinstance(module, PackedLinear | FusedLinear):
        bias = _whole_bias(module)
        if module.stored == "Conv1D":
            from transformers.pytorch_utils import Conv1D  # it held the weight before

            with torch.device("meta"):
                dense = Conv1D(module.out_features, module.in_features)
            dense.weight = nn.Parameter(module.dense())
            dense.bias = bias  # pyright: ignore[reportAttributeAccessIssue]
        else:
            dense = dense_linear(module.dense(), bias)
    else:
        raise CompressError(f"{type(module).__name__} is not a packed module")
    return dense.train(module.training)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of the dense module that a packed one stands for, by their names in it.

    Weights are made where they are read, but for those of attention.
    """
    if isinstance(module, PackedAttention):
        return dict(unpack(module).named_parameters())
    assert isinstance(module, PackedLinear | FusedLinear | PackedConv)
    bias = module.bias
    return {"weight": module.weight, **({} if bias is None else {"bias": bias})}


def dense_linear(matrix: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An `nn.Linear` of a matrix `(out, in)`, a copy of it if it is a view."""
    out, inputs = matrix.shape
    linear = nn.Linear(inputs, out, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.detach().clone())
    linear.bias = bias  # pyright: ignore[reportAttributeAccessIssue]
    return linear


def _bias(module: nn.Module) -> nn.Parameter | None:
    return module._parameters["bias"]


def _rows(bias: nn.Parameter | None, start: int, stop: int) -> nn.Parameter | None:
    if bias is None:
        return None
    return nn.Parameter(bias.detach()[start:stop].clone(), requires_grad=bias.requires_grad)


def _whole_bias(module: PackedLinear | FusedLinear) -> nn.Parameter | None:
    if isinstance(module, PackedLinear):
        return module.bias
    bias = module.bias
    return None if bias is None else nn.Parameter(bias.detach().clone())


def _pack_attention(module: nn.MultiheadAttention, found: dict[str, list[Run]]) -> PackedAttention:
    size = module.embed_dim
    bias = module.in_proj_bias
    projections: list[nn.Module] = []
    for i, own in enumerate(("q_proj_weight", "k_proj_weight", "v_proj_weight")):
        a, b = i * size, (i + 1) * size
        if module._qkv_same_embed_dim:
            matrix = module.in_proj_weight[a:b]
            runs = [
                Run(max(r.start, a) - a, min(r.stop, b) - a, r.pattern)
                for r in found.get("in_proj_weight", [])
                if r.start < b and r.stop > a
            ]
        else:
            matrix, runs = getattr(module, own), found.get(own, [])
        rows = _rows(bias, a, b)
        projections.append(pack_linear(matrix, rows, runs) if runs else dense_linear(matrix, rows))
    out = module.out_proj
    runs = found.get("out_proj.weight", [])
    out_bias = out.bias
    last = pack_linear(out.weight, out_bias, runs) if runs else dense_linear(out.weight, out_bias)
    q, k, v = projections
    return PackedAttention(module, q, k, v, last)


def _unpack_attention(module: PackedAttention) -> nn.MultiheadAttention:
    dense = nn.MultiheadAttention(
        module.embed_dim, module.num_heads, module.dropout, bias=module.had_bias,
        add_bias_kv=module.bias_k is not None, add_zero_attn=module.add_zero_attn,
        kdim=module.kdim, vdim=module.vdim, batch_first=module.batch_first, device="meta",
    )  # fmt: skip
    parts = [_as_dense(p) for p in (module.q, module.k, module.v)]
    if module.was_one_matrix:
        dense.in_proj_weight = nn.Parameter(torch.cat([p.weight for p in parts]).detach())
    else:
        for own, part in zip(("q", "k", "v"), parts, strict=True):
            setattr(dense, f"{own}_proj_weight", nn.Parameter(part.weight.detach()))
    if module.had_bias:
        dense.in_proj_bias = nn.Parameter(torch.cat([p.bias for p in parts]).detach())
    out = _as_dense(module.out_proj)
    dense.out_proj.weight, dense.out_proj.bias = out.weight, out.bias
    dense.bias_k, dense.bias_v = module.bias_k, module.bias_v
    return dense


def _unpack_conv(module: PackedConv) -> nn.Module:
    kind = _CONV[len(module.kernel_size) - 1]
    dense = kind(
        module.in_channels, module.out_channels, module.kernel_size, module.stride,  # pyright: ignore
        module.padding, module.dilation, bias=False, padding_mode=module.padding_mode,  # pyright: ignore
        device="meta",
    )  # fmt: skip
    dense.weight = nn.Parameter(module.dense())
    dense.bias = module.bias
    return dense


def _as_dense(part: nn.Module) -> nn.Linear:
    made = part if isinstance(part, nn.Linear) else unpack(part)
    assert isinstance(made, nn.Linear)
    return made
