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
from nmflow.packed import build
from nmflow.packed.build import PACKED, Run
from nmflow.packed.faster import Verdict, judge, kind_of, on_onednn
from nmflow.packed.fuse import Fused
from nmflow.packed.fuse import fuse as fuse_activations
from nmflow.packed.onednn import OneDNNLinear
from nmflow.packed.packable import Found, survey
from nmflow.packed.report import Report, Row
from nmflow.select.plan import Names, Patterns

Runs = dict[str, list[Run]]


def compress(
    model: nn.Module,
    pattern: Patterns | None = None,
    tokens: Sequence[int] = (1, 197),
    include: Names = "*",
    exclude: Names = (),
    measure: bool = True,
    onednn: bool = False,
    fuse: bool = True,
    inplace: bool = False,
) -> Any:
    """Replace every N:M weight by its kept values and their columns, where that is faster.

    A module is packed if the geometric mean over `tokens` of (best dense time / packed time) is
    above 1. Dense are `F.linear`, oneDNN and packed oneDNN, or for a convolution the convolution
    itself, channels last, and oneDNN packed, on about that many output positions. Modules of the
    same kind, sizes and patterns are measured once, with as many threads as torch has. Where a
    linear layer loses to packed oneDNN, it runs on that (`OneDNNLinear`, which holds the weight
    twice); everything else that loses stays as it is.

    Args:
        model: a model whose weights hold N:M, such as after `flow.finalize()`.
        pattern: a pattern, or patterns by preset or glob as for `plan`; None finds the sparsest
            pattern that each weight holds, also for single blocks of rows of a fused `qkv`.
        tokens: the token counts (rows of a layer's input) to be fast at.
        include: presets or globs, as for `plan`; the default takes every weight.
        exclude: presets or globs to leave dense.
        measure: False packs everything that can be packed, without timing.
        onednn: True also measures the linear layers that hold no pattern, and runs them on packed
            oneDNN where that is faster; they then hold their weight twice.
        fuse: let packed layers apply the GELU (erf) or ReLU module that alone reads their output,
            which saves a pass over it.
        inplace: True changes `model`; the default leaves it alone and returns a copy.

    Returns:
        A module that runs like `model`, for inference, with a `Report` as its attribute `report`
        (`nmflow_report` where the model has a `report` of its own).
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
    judged: dict[tuple[object, ...], Verdict] = {}
    verdicts: dict[str, Verdict] = {}
    new: dict[nn.Module, nn.Module] = {}
    for path, found in sites.items():
        module = modules[path]
        try:
            packed = build.pack(module, found)
        except CompressError as error:
            verdicts[path] = Verdict(str(error))
            continue
        key = kind_of(module, found)
        if measure and key not in judged:
            judged[key] = judge(module, packed, counts)
        verdicts[path] = judged[key] if measure else Verdict()
        if not verdicts[path].why:
            new[module] = packed
        elif verdicts[path].onednn and isinstance(module, nn.Linear):
            new[module] = OneDNNLinear.of(module, max(counts))
    report = Report(_row(w, model.get_parameter(w.layer.name), verdicts, counts) for w in weights)
    if onednn:
        new |= on_onednn({m: max(counts) for m in model.modules() if m not in new}, counts)
    made = replace_modules(model, new, inplace)
    report.fused = fuse_activations(made) if fuse else []
    name = "report" if isinstance(getattr(made, "report", report), Report) else "nmflow_report"
    made.__dict__[name] = report  # a plain attribute, past nn.Module's registry
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
        if isinstance(module, Fused):
            new[module] = module.original
        elif isinstance(module, (*PACKED, OneDNNLinear)) and module not in inside:
            inside.update(module.modules())
            new[module] = build.unpack(module)
    if not new:
        raise CompressError("model holds no packed module: give what nmflow.compress returned")
    made = replace_modules(model, new, inplace)
    for name in ("report", "nmflow_report"):
        if isinstance(made.__dict__.get(name), Report):
            del made.__dict__[name]
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
        # One memo for all, so that what was tied stays tied.
        memo: dict[int, Any] = {}
        for old, made in new.items():
            memo[id(old)] = copy.deepcopy(made, memo)
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


def _row(w: Found, parameter: Tensor, verdicts: dict[str, Verdict], counts: tuple[int, ...]) -> Row:
    size = parameter.numel() * parameter.element_size()
    verdict = Verdict(w.why_not) if w.why_not else verdicts[w.site]
    if verdict.why:
        held = 2 * size if verdict.onednn else size
        return Row(w.layer.name, w.layer.shape, w.patterns, "dense", verdict.why, size, held,
                   verdict.times)  # fmt: skip
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
    return Row(w.layer.name, w.layer.shape, w.patterns, "packed", why, size, small, verdict.times)
