"""`compress` and `decompress`: packed modules where they pay, dense ones where they do not."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.kernels import Call, choose
from nmflow.kernels.layout import Shape
from nmflow.layers import is_hf_conv1d
from nmflow.packed import build
from nmflow.packed.build import PACKED, Run
from nmflow.packed.layout import as_matrix
from nmflow.packed.measure import conv_ways, dense_ways, time_ways
from nmflow.packed.modules import PackedConv
from nmflow.packed.report import Report, Row, Times
from nmflow.packed.survey import Found, survey
from nmflow.targets import Names, Patterns

Runs = dict[str, list[Run]]


def compress(
    model: nn.Module,
    pattern: Patterns | None = None,
    tokens: Sequence[int] = (1, 197),
    include: Names = "*",
    exclude: Names = (),
    measure: bool = True,
    inplace: bool = False,
) -> Any:
    """Replace every N:M weight by its kept values and their columns, where that is faster.

    A module is packed if the geometric mean over `tokens` of (best dense time / packed time) is
    above 1. Dense are `F.linear`, oneDNN and packed oneDNN, or for a convolution the convolution
    itself, channels last, and oneDNN packed, on about that many output positions. Modules of the
    same kind, sizes and patterns are measured once, with as many threads as torch has.

    Args:
        model: a model whose weights hold N:M, such as after `flow.finalize()`.
        pattern: a pattern, or patterns by preset or glob as for `plan`; None finds the sparsest
            pattern that each weight holds, also for single blocks of rows of a fused `qkv`.
        tokens: the token counts (rows of a layer's input) to be fast at.
        include: presets or globs, as for `plan`; the default takes every weight.
        exclude: presets or globs to leave dense.
        measure: False packs everything that can be packed, without timing.
        inplace: True changes `model`; the default leaves it alone and returns a copy.

    Returns:
        A module that runs like `model`, for inference, with a `Report` as its attribute `report`.
        Packed are `nn.Linear`, HF `Conv1D`, `nn.MultiheadAttention` and ungrouped convolutions;
        what stays dense is in the report with the reason.

    Raises:
        CompressError: no weight holds a pattern, or `tokens` is empty or not positive.
        PatternError, PlanError: as for `plan`.

    Example:
        >>> import nmflow
        >>> layer = nn.Linear(64, 32)
        >>> layer.weight.data *= nmflow.mask(layer.weight, "1:16")
        >>> packed = compress(nn.Sequential(layer), measure=False)
        >>> packed.report[0].pattern, packed.report[0].kept
        ('1:16', 'packed')
    """
    counts = tuple(tokens)
    if not counts or not all(isinstance(t, int) and t > 0 for t in counts):
        raise CompressError(f"tokens is {tokens!r}: give at least one positive number of tokens")
    weights = survey(model, pattern, include, exclude)
    sites = sites_of(weights)
    if not sites:
        said = "; ".join(f"{w.layer.name}: {w.why_not}" for w in weights[:8])
        raise CompressError(
            "model has no N:M weight that can be packed: prune it first (flow.finalize()), or "
            f"name its pattern ({said})"
        )
    modules = dict(model.named_modules())
    judged: dict[tuple[object, ...], tuple[str, Times]] = {}
    verdicts: dict[str, tuple[str, Times]] = {}  # site to (why it stays dense, or empty; times)
    new: dict[nn.Module, nn.Module] = {}
    for path, found in sites.items():
        module = modules[path]
        try:
            packed = build.pack(module, found)
        except CompressError as error:
            verdicts[path] = str(error), {}
            continue
        key = _kind(module, found)
        if measure and key not in judged:
            judged[key] = _judge(module, packed, counts)
        verdicts[path] = judged[key] if measure else ("", {})
        if not verdicts[path][0]:
            new[module] = packed
    report = Report(_row(w, model.get_parameter(w.layer.name), verdicts, counts) for w in weights)
    made = replace_modules(model, new, inplace)
    made.__dict__["report"] = report  # a plain attribute, past nn.Module's registry
    return made


def decompress(model: nn.Module, inplace: bool = False) -> Any:
    """Give every packed module its dense one back, with exactly the weights that were packed.

    Kept weights come back bit by bit and pruned ones as +0.0 (`torch.equal` holds; a pruned -0.0
    loses its sign).

    Args:
        model: what `compress` or `load` returned.
        inplace: True changes `model`; the default returns a copy.

    Raises:
        CompressError: nothing in it is packed.
    """
    new: dict[nn.Module, nn.Module] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():  # parents come before their children
        if isinstance(module, PACKED) and module not in inside:
            inside.update(module.modules())
            new[module] = build.unpack(module)
    if not new:
        raise CompressError("model holds no packed module: give what nmflow.compress returned")
    made = replace_modules(model, new, inplace)
    made.__dict__.pop("report", None)
    return made


def sites_of(weights: Sequence[Found]) -> dict[str, Runs]:
    """Module paths to the runs of each of their weights that can be packed."""
    sites: dict[str, Runs] = {}
    for w in weights:
        if w.runs and not w.why_not:
            sites.setdefault(w.site, {})[w.own] = w.runs
    return sites


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module], inplace: bool) -> nn.Module:
    """Put new modules in the place of old ones, in `model` or in a deep copy of it."""
    if not inplace:
        # Old modules count as copied already, so their dense weights are never copied.
        memo = {id(old): copy.deepcopy(made) for old, made in new.items()}
        model = copy.deepcopy(model, memo)
    else:
        for parent in list(model.modules()):
            for name, child in parent._modules.items():  # named_children skips repeated ones
                if child is not None and child in new:
                    parent._modules[name] = new[child]
        model = new.get(model, model)
    for module in model.modules():
        _set_fast_path(module)
    return model


def _set_fast_path(module: nn.Module) -> None:
    """Keep `nn.TransformerEncoder` from its fused path, which reads dense weights directly."""
    for kind, flag in (
        (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
        (nn.TransformerEncoder, "use_nested_tensor"),
    ):
        if isinstance(module, kind):
            packed = any(isinstance(child, PACKED) for child in module.modules())
            if packed and not hasattr(module, "nmflow_fast_path"):
                module.nmflow_fast_path = getattr(module, flag)
                setattr(module, flag, 0)
            elif not packed and hasattr(module, "nmflow_fast_path"):
                setattr(module, flag, module.nmflow_fast_path)
                del module.nmflow_fast_path


def _kind(module: nn.Module, found: Runs) -> tuple[object, ...]:
    """What decides how fast a module is: modules that agree on it are measured once."""
    sizes = tuple((n, tuple(p.shape), p.dtype, str(p.device)) for n, p in module.named_parameters())
    runs = tuple((own, tuple(runs)) for own, runs in found.items())
    return type(module), sizes, runs, getattr(module, "stride", None)


def _judge(module: nn.Module, packed: nn.Module, counts: tuple[int, ...]) -> tuple[str, Times]:
    """Why a module stays dense (empty if packed is faster), and the times by token count."""
    some = next(module.parameters())
    if some.device.type != "cpu":
        return f"no packed kernel on {some.device.type} is faster", {}
    times = {}
    with torch.no_grad():
        for t in counts:
            if isinstance(packed, PackedConv):
                times[t] = _race(conv_ways(module, x := _conv_input(packed, t, some)), packed, x)
                continue
            mine, best, names = 0.0, 0.0, []
            for matrix, bias, parts in _products(module, packed):
                x = torch.randn(t, matrix.shape[1]).to(matrix.dtype)
                ways = dense_ways(matrix, bias, x)
                if is_hf_conv1d(module):
                    ways["addmm"] = lambda x=x: module(x)
                p, d, name = _race(ways, parts, x)
                mine, best, names = mine + p, best + d, [*names, name]
            times[t] = mine, best, " and ".join(dict.fromkeys(names))
    gain = math.prod(dense / mine for mine, dense, _ in times.values())
    return ("" if gain > 1 else "the best dense way is faster"), times


def _race(ways: dict, packed: nn.Module, x: Tensor) -> tuple[float, float, str]:
    took = time_ways({**ways, "packed": lambda: packed(x)})
    mine = took.pop("packed").median
    best = min(took, key=lambda name: took[name].median)
    return mine, took[best].median, best


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
        fused = build.FusedLinear([q, k, v])  # pyright: ignore[reportArgumentType]
        first = [(module.in_proj_weight, module.in_proj_bias, fused)]
    else:
        whole = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        first = list(zip(whole, bias, (q, k, v), strict=True))
    return [*first, (module.out_proj.weight, module.out_proj.bias, out)]  # pyright: ignore


def _conv_input(conv: PackedConv, tokens: int, like: Tensor) -> Tensor:
    """An input that gives about that many output positions."""
    spatial = len(conv.kernel_size)
    side = max(round(tokens ** (1 / spatial)), 1)
    pads = [sum(conv.pads[2 * i : 2 * i + 2]) for i in reversed(range(spatial))]
    sizes = [
        max((side - 1) * s + d * (k - 1) + 1 - pad, 1)
        for k, s, d, pad in zip(conv.kernel_size, conv.stride, conv.dilation, pads, strict=True)
    ]
    return torch.randn(1, conv.in_channels, *sizes).to(like.dtype)


def _row(
    w: Found, parameter: Tensor, verdicts: dict[str, tuple[str, Times]], counts: tuple[int, ...]
) -> Row:
    size = parameter.numel() * parameter.element_size()
    why, times = (w.why_not, {}) if w.why_not else verdicts[w.site]
    if why:
        return Row(w.layer.name, w.layer.shape, w.patterns, "dense", why, size, size, times)
    out, inputs = w.layer.out, parameter.numel() // w.layer.out
    small, kernels = 0, []
    for run in w.runs:
        shape = Shape.of(run.stop - run.start, inputs, run.pattern)
        values, codes = shape.tiled_sizes(parameter.dtype)
        small += math.prod(values) * parameter.element_size()
        small += math.prod(codes) * shape.code_dtype().itemsize
        for t in counts:
            call = Call(shape, parameter.dtype, parameter.device.type, t, torch.get_num_threads())
            chosen = choose(call)
            kernels.append(f"{chosen.backend} ({chosen.kernel})")
    dense = out - sum(run.stop - run.start for run in w.runs)
    small += dense * inputs * parameter.element_size()
    why = "by " + ", ".join(dict.fromkeys(kernels))
    return Row(w.layer.name, w.layer.shape, w.patterns, "packed", why, size, small, times)
