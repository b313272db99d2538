"""`compress` and `decompress`: packed modules where they pay, dense ones where they do not."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nmflow.errors import CompressError
from nmflow.kernels import Call, choose
from nmflow.numbers import is_whole
from nmflow.packed import build
from nmflow.packed.bfloat16 import with_bfloat16
from nmflow.packed.build import PACKED, Run
from nmflow.packed.faster import Verdict, is_faster, judge, kind_of, on_onednn
from nmflow.packed.fuse import Fused
from nmflow.packed.fuse import fuse as fuse_activations
from nmflow.packed.int8 import with_int8
from nmflow.packed.modules import PackedLinear
from nmflow.packed.onednn import OneDNNLinear
from nmflow.packed.packable import Found, check_unsharded, survey
from nmflow.packed.parts import parts_of
from nmflow.packed.proof import check_same, run_once
from nmflow.packed.report import Report, Row, hang
from nmflow.packed.rounded import check_values, refuse_device
from nmflow.packed.swap import Model, replace_modules, undone
from nmflow.packed.together import join
from nmflow.select.modules import check_model
from nmflow.select.plan import Names, Patterns

Runs = dict[str, list[Run]]


def compress(
    model: Model,
    pattern: Patterns | None = None,
    include: Names = "*",
    exclude: Names = (),
    *,
    tokens: Sequence[int] = (1, 197),
    measure: bool = True,
    onednn: bool = False,
    fuse: bool = True,
    inplace: bool = False,
    example_inputs: Any = None,
    values: str | None = None,
    activations: str = "float",
    dtype: str | None = None,
) -> Model:
    """Replace every N:M weight by its kept values and their columns, where that is faster.

    A module is packed if the geometric mean over `tokens` of (best dense time / packed time) is
    above 1. The dense ways are `F.linear`, oneDNN and packed oneDNN; for a convolution, itself,
    channels last, and packed oneDNN, on about that many output positions. On an NVIDIA GPU they
    are cuBLAS and, for 2:4, cuSPARSELt, timed in CUDA graphs on copies of the weights that do not
    fit into the L2 (twice its bytes for each way, at a time). Modules of the same kind, sizes and
    patterns are measured once, with torch's number of threads. On a CPU, the measurement rotates
    through as many copies of the weight as the network has (64 MB at most), so that they are not
    always in the nearest cache. A linear layer that loses to packed oneDNN runs on that
    (`OneDNNLinear`, which holds the weight twice); all other layers that lose stay as they are.

    Args:
        model: a model whose weights hold N:M, such as after `flow.finalize()`.
        pattern: a pattern, or patterns by preset or glob as for `plan`; None finds the sparsest
            pattern that each weight holds, also for single blocks of rows of a fused `qkv`.
        include: presets or globs, as for `plan`; the default takes every weight.
        exclude: presets or globs to leave dense.
        tokens: the token counts (rows of a layer's input) that you serve.
        measure: False packs everything that can be packed, without timing.
        onednn: True also measures the linear layers that hold no pattern, and runs them on packed
            oneDNN where that is faster; they then hold their weight twice.
        fuse: let packed layers apply a GELU, ReLU or SiLU module that is the only reader of their
            output, which saves a pass over it; and, on a CPU, compute q, k and v of self-attention
            in one call, where that is faster at `tokens`.
        inplace: True changes `model`; packed layers stay the same objects, also for others that
            hold them. An error leaves it as it was. The default does not change `model` and
            returns a copy.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, run once
            in `model` and in the result: every packed layer that runs in one must run in the other,
            and outside training their outputs must agree.
        values: `"int8"` rounds the kept values to 8 bits with one scale per row,
            `W[o] = s[o] q[o]`, which `decompress` returns; the report has each layer's error. None
            keeps their bits.
        activations: with `values="int8"`, `"float"` multiplies unrounded inputs. `"int8"` rounds
            each token to 8 bits first, which is faster and less exact, and runs on CPUs only.
        dtype: `"bfloat16"` makes the packed layers of a float32 network multiply in bfloat16: kept
            values are stored so, x is rounded, and y is float32 again. The report has each layer's
            error. With `measure`, layers that are as fast in float32 stay in float32. None
            multiplies in the dtype of the weight.

    Returns:
        A model that runs like `model`, for inference. `report_of` shows which weights are packed,
        and why the others stay dense. `nn.Linear`, HF `Conv1D`, `nn.MultiheadAttention` and
        ungrouped convolutions are packed. If `model` is such a layer itself, you get the packed
        layer.

    Raises:
        CompressError: no weight holds a pattern that can be packed, `tokens` is empty or not
            positive, `values`, `activations` or `dtype` is none of those above, `values` is given
            for a model on a device without kernels for them, `activations="int8"` for one on a GPU,
            a measurement takes more memory than a GPU has, or the copy would still run layers of
            `model` (see `inplace`).
        PatternError, PlanError: as for `plan`.

    Example:
        >>> import nmflow
        >>> layer = nn.Linear(64, 32)
        >>> layer.weight.data *= nmflow.mask(layer.weight, "1:16")
        >>> packed = compress(nn.Sequential(layer), measure=False)
        >>> row = nmflow.report_of(packed)[0]
        >>> row.pattern, row.kept
        ('1:16', 'packed')
    """
    check_unsharded(model)
    counts = tuple(tokens) if isinstance(tokens, Iterable) else ()
    if not counts or not all(is_whole(t, 1) for t in counts):
        raise CompressError(
            f"tokens is {tokens!r}: give positive numbers of tokens, such as (1, 128)"
        )
    check_values(values, activations, dtype)
    weights = survey(model, pattern, include, exclude)
    sites = sites_of(weights)
    if not sites:
        packed = any(isinstance(module, PACKED) for module in model.modules())
        raise CompressError(_PACKED if packed else _nothing(weights))
    modules = dict(model.named_modules())
    if values is not None:
        for weight in (w for path in sites for w in modules[path].parameters(recurse=False)):
            refuse_device(values, activations, weight.device)
    alike = Counter(kind_of(modules[path], found) for path, found in sites.items())
    judged: dict[tuple[object, ...], Verdict] = {}
    not_rounded: frozenset[tuple[object, ...]] = frozenset()
    verdicts: dict[str, Verdict] = {}
    made_of: dict[str, nn.Module] = {}
    new: dict[nn.Module, nn.Module] = {}
    for path, found in sites.items():
        module = modules[path]
        try:
            packed = exact = build.pack(module, found)
            if values is not None:
                packed = with_int8(packed, activations)
            elif dtype is not None:
                packed = with_bfloat16(packed)
        except CompressError as error:
            verdicts[path] = Verdict(str(error))
            continue
        key = kind_of(module, found)
        if measure and key not in judged:
            judged[key] = judge(module, packed, counts, alike[key])
            if dtype is not None and packed is not exact:  # rounding that gains nothing is none
                other = judge(module, exact, counts, alike[key])
                if is_faster(other, judged[key]):
                    judged[key], not_rounded = other, not_rounded | {key}
        packed = exact if key in not_rounded else packed
        verdicts[path] = judged[key] if measure else Verdict()
        made_of[path] = packed
        if not verdicts[path].why:
            new[module] = packed
        elif verdicts[path].onednn and isinstance(module, nn.Linear):
            new[module] = OneDNNLinear.of(module, max(counts))
    report = Report(
        _row(w, model.get_parameter(w.layer.name), verdicts, made_of.get(w.site), counts)
        for w in weights
    )
    before = None
    if example_inputs is not None:
        before = run_once(model, [p for p in sites if modules[p] in new], example_inputs)
    if onednn:
        new |= on_onednn({m: max(counts) for m in model.modules() if m not in new}, counts)
    with undone(model, new) if inplace else contextlib.nullcontext():
        made = replace_modules(model, new, inplace)
        if fuse:
            report.fused = fuse_activations(made)
            report.together = join(made, counts if measure else ())
        if before is not None:
            check_same(before, run_once(made, before.calls, example_inputs), values is not None)
    hang(made, report)
    return made


def decompress(model: Model, *, inplace: bool = False) -> Model:
    """Replace every packed module by its dense one, with exactly the weights that were packed.

    Kept weights come back bit by bit and pruned ones as +0.0 (`torch.equal` holds; a pruned -0.0
    loses its sign).

    Args:
        model: what `compress` or `load` returned.
        inplace: True changes `model`; the default returns a copy.

    Raises:
        CompressError: nothing in it is packed.
    """
    check_model(model, CompressError)
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
    hang(made, None)
    return made


_PACKED = (
    "model is packed already, and nothing else in it can be: to pack it in another way, give what "
    "nmflow.decompress(model) returns"
)


def _nothing(weights: Sequence[Found]) -> str:
    """Why no weight is packed: none holds a pattern, or those that do have no packed form."""
    held = [w for w in weights if w.runs]
    said = "; ".join(f"{w.layer.name}: {w.why_not}" for w in (held or weights)[:8])
    if held:
        return (
            f"model holds N:M weights and none of them can be packed ({said}): leave the network "
            "dense, it is right as it is"
        )
    if not weights:
        return "model has no weight of two or more dimensions: there is nothing to pack"
    return (
        "model has no N:M weight that can be packed: prune it first (flow.finalize()), or name "
        f"its pattern ({said})"
    )


def sites_of(weights: Sequence[Found]) -> dict[str, Runs]:
    """Module paths to the runs of each of their weights that can be packed."""
    sites: dict[str, Runs] = {}
    for w in weights:
        if w.runs and not w.why_not:
            sites.setdefault(w.site, {})[w.own] = w.runs
    return sites


def _row(
    w: Found, parameter: Tensor, verdicts: dict[str, Verdict], packed: nn.Module | None,
    counts: tuple[int, ...],
) -> Row:  # fmt: skip
    size = 0 if is_lazy(parameter) else parameter.numel() * parameter.element_size()
    verdict = Verdict(w.why_not) if w.why_not else verdicts[w.site]
    if verdict.why or packed is None:
        held = 2 * size if verdict.onednn else size
        return Row(w.layer.name, w.layer.shape, w.patterns, "dense", verdict.why, size, held,
                   verdict.times)  # fmt: skip
    small, kernels, errors = 0, [], []
    for part in parts_of(packed)[w.own]:
        if not isinstance(part, PackedLinear):
            small += part.get_parameter("weight").nbytes
            continue
        small += sum(buffer.nbytes for buffer in part.buffers())
        if part.error is not None:
            errors.append(part.error)
        for t in counts:
            device, threads = parameter.device.type, torch.get_num_threads()
            call = Call(part.shape, part.computes, device, t, threads, values=part.rounding)
            chosen = choose(call)
            other = "" if part.computes == parameter.dtype else ", in bfloat16"
            kernels.append(f"{chosen.backend} ({chosen.kernel}{other})")
    why = "by " + ", ".join(dict.fromkeys(kernels))
    return Row(w.layer.name, w.layer.shape, w.patterns, "packed", why, size, small, verdict.times,
               max(errors, default=None))  # fmt: skip
