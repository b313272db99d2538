"""Is a packed module faster than the best dense way? Measured, at the token counts given."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.kernels import Call, choose
from nmflow.packed.bfloat16 import BFloat16Linear
from nmflow.packed.build import Run
from nmflow.packed.convolution import PackedConv
from nmflow.packed.int8 import Int8Linear
from nmflow.packed.layout import as_matrix
from nmflow.packed.measure import (
    Timing,
    Way,
    conv_ways,
    copies_in_network,
    copies_past_cache,
    dense_ways,
    gpu_ways,
    rotated,
    rounded_ways,
    time_on_gpu,
    time_ways,
)
from nmflow.packed.modules import FusedLinear, PackedLinear
from nmflow.packed.onednn import OneDNNLinear, onednn_takes
from nmflow.packed.report import Times
from nmflow.select.weights import is_hf_conv1d

Runs = dict[str, list[Run]]


@dataclass(frozen=True)
class Verdict:
    """Why a module stays dense (empty: it is packed), its times, and whether on oneDNN."""

    why: str = ""
    times: Times = field(default_factory=dict)
    onednn: bool = False


def kind_of(module: nn.Module, found: Runs) -> tuple[object, ...]:
    """What decides the speed of a module: modules that agree on it are measured once."""
    sizes = tuple((n, tuple(p.shape), p.dtype, str(p.device)) for n, p in module.named_parameters())
    runs = tuple((own, tuple(runs)) for own, runs in found.items())
    return type(module), sizes, runs, str(module)


def judge(
    module: nn.Module, packed: nn.Module, counts: tuple[int, ...], layers: int = 1
) -> Verdict:
    """Race the packed module against the dense ways at every token count.

    The network has `layers` of its kind: on a CPU each way runs on as many copies in turn.
    """
    some = next(module.parameters())
    if some.device.type != "cpu" and (why := _why_slow(packed, some)):
        return Verdict(f"there is no fast packed kernel on {some.device.type}: {why}")
    times: Times = {}
    gain = onednn = 1.0
    with torch.no_grad():
        for t in counts:
            mine, best, names = 0.0, 0.0, []
            try:
                races = _races(module, packed, t, some, layers)
            except torch.OutOfMemoryError as error:
                raise CompressError(
                    f"tokens is {counts}: measuring a {type(module).__name__} at {t} takes more "
                    f"memory than {some.device} has left, so pass measure=False, or fewer tokens"
                ) from error
            for took in races:
                name = min(took.keys() - {"packed"}, key=lambda way: took[way].median)
                mine, best = mine + took["packed"].median, best + took[name].median
                names.append(name)
                if "oneDNN packed" in took and "F.linear" in took:
                    onednn *= took["F.linear"].median / took["oneDNN packed"].median
            times[t] = mine, best, " and ".join(dict.fromkeys(names))
            gain *= best / mine
    if gain > 1:
        return Verdict("", times)
    runs_on = type(module) is nn.Linear and onednn > 1
    why = "the best dense way is faster" + (", so it runs on packed oneDNN" if runs_on else "")
    return Verdict(why, times, runs_on)


def _races(
    module: nn.Module, packed: nn.Module, tokens: int, some: Tensor, layers: int
) -> list[dict[str, Timing]]:
    """The ways of each product of a module, timed."""
    if isinstance(packed, PackedConv):
        x = _conv_input(packed, tokens, some)
        return [_race(conv_ways(module, x), packed, x)]
    races = []
    for matrix, bias, parts in _products(module, packed):
        x = torch.randn(tokens, matrix.shape[1]).to(matrix.device, matrix.dtype)
        if matrix.is_cuda:
            races.append(_race_on_gpu(matrix, bias, parts, x))
            continue
        many = range(copies_in_network(matrix.nbytes, layers))
        ways = [_ways(module, matrix, bias, parts, x, i) for i in many]
        races.append(time_ways(rotated(ways)))
    return races


def is_faster(one: Verdict, other: Verdict) -> bool:
    """Whether the first packed layer was timed, and is as fast as the other at the token counts."""
    return (
        bool(one.times) and math.prod(other.times[t][0] / one.times[t][0] for t in one.times) >= 1
    )


def on_onednn(
    linears: Mapping[nn.Module, int], counts: tuple[int, ...] = ()
) -> dict[nn.Module, nn.Module]:
    """The linear layers of modules that packed oneDNN runs faster at their tokens, placed on it.

    `counts` are the token counts to be fast at, where they are the same for all.
    """
    new: dict[nn.Module, nn.Module] = {}
    faster: dict[tuple[object, ...], bool] = {}
    with torch.no_grad():
        for module, tokens in linears.items():
            if type(module) is not nn.Linear or not onednn_takes(module.weight.dtype):
                continue
            if module.weight.device.type != "cpu":
                continue
            shape = tuple(module.weight.shape)
            key = (shape, module.weight.dtype, tokens, module.bias is None)
            if key not in faster:
                gain = 1.0
                for t in counts or (tokens,):
                    x = torch.randn(t, module.in_features).to(module.weight.dtype)
                    took = time_ways(dense_ways(module.weight, module.bias, x))
                    gain *= took["F.linear"].median / took["oneDNN packed"].median
                faster[key] = gain > 1
            if faster[key]:
                new[module] = OneDNNLinear.of(module, tokens)
    return new


def _why_slow(packed: nn.Module, some: Tensor) -> str:
    """Why a device has no kernel for a packed module; empty where it has."""
    for part in packed.modules():
        if isinstance(part, PackedLinear):
            kind, device = part.computes, some.device.type
            call = Call(part.shape, kind, device, 1, values=part.rounding)
            if (found := choose(call)).backend == "reference":
                return dict(found.refused).get(some.device.type, f"none is for {some.device.type}")
    return ""


def _race_on_gpu(
    matrix: Tensor, bias: Tensor | None, packed: nn.Module, x: Tensor
) -> dict[str, Timing]:
    """cuBLAS and cuSPARSELt against a packed product, all on weights that are not in the L2."""
    size = sum(t.nbytes for t in (*packed.buffers(), *packed.parameters()))
    copies = [copy.deepcopy(packed) for _ in range(copies_past_cache(size, matrix.device))]
    mine: list[Way] = [lambda one=one: one(x) for one in copies]
    with torch.cuda.device_of(matrix):
        return time_on_gpu({**gpu_ways(matrix, bias, x), "packed": mine})


def _ways(
    module: nn.Module,
    matrix: Tensor,
    bias: Tensor | None,
    packed: nn.Module,
    x: Tensor,
    number: int,
) -> dict[str, Way]:
    """The dense ways of a product and the packed one; copy 0 is of the weights themselves."""
    if number:
        matrix, packed = matrix.clone(), copy.deepcopy(packed)
    ways = dense_ways(matrix, bias, x)
    kinds = {type(m) for m in packed.modules()}
    if kinds & {Int8Linear, BFloat16Linear}:
        rounded = rounded_ways(matrix, bias, x)
        if Int8Linear not in kinds:  # a way that rounds more does not compete
            rounded.pop("int8 dynamic", None)
        ways |= rounded
    if is_hf_conv1d(module):
        own = copy.deepcopy(module) if number else module
        ways["addmm"] = lambda: own(x)
    ways["packed"] = lambda: packed(x)
    return ways


def _race(ways: dict[str, Way], packed: nn.Module, x: Tensor) -> dict[str, Timing]:
    if x.is_cuda:
        calls = {**ways, "packed": lambda: packed(x)}
        with torch.cuda.device_of(x):
            return time_on_gpu({name: [way] for name, way in calls.items()})
    return time_ways({**ways, "packed": lambda: packed(x)})


def _products(
    module: nn.Module, packed: nn.Module
) -> list[tuple[Tensor, Tensor | None, nn.Module]]:
    """The matrix products of a module: dense matrix, bias, and the packed module of each."""
    if not isinstance(module, nn.MultiheadAttention):
        axis = 0 if is_hf_conv1d(module) else 1
        matrix = as_matrix(module.get_parameter("weight").detach(), axis).contiguous()
        return [(matrix, module.bias, packed)]  # pyright: ignore[reportReturnType]
    q, k, v, out = packed.q, packed.k, packed.v, packed.out_proj  # pyright: ignore
    bias = [None] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.chunk(3))
    if module._qkv_same_embed_dim:
        fused = FusedLinear([q, k, v])  # pyright: ignore[reportArgumentType]
        first = [(module.in_proj_weight, module.in_proj_bias, fused)]
    else:
        whole = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        first = list(zip(whole, bias, (q, k, v), strict=True))
    return [*first, (module.out_proj.weight, module.out_proj.bias, out)]  # pyright: ignore


def _conv_input(conv: PackedConv, tokens: int, like: Tensor) -> Tensor:
    """An input for about that many output positions."""
    spatial = len(conv.kernel_size)
    side = max(round(tokens ** (1 / spatial)), 1)
    pads = [sum(conv.pads[2 * i : 2 * i + 2]) for i in reversed(range(spatial))]
    sizes = [
        max((side - 1) * s + d * (k - 1) + 1 - pad, 1)
        for k, s, d, pad in zip(conv.kernel_size, conv.stride, conv.dilation, pads, strict=True)
    ]
    return torch.randn(1, conv.in_channels, *sizes).to(like.device, like.dtype)
