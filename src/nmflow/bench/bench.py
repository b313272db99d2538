"""`bench`: packed against the best dense way in the same run, by layer and end to end."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.bench import ways
from nmflow.bench.results import Bench, Measured, rows_of
from nmflow.bench.rivals import RIVALS, check_names, race
from nmflow.errors import CompressError
from nmflow.kernels import explain
from nmflow.masks import mask
from nmflow.numbers import is_whole
from nmflow.packed.bfloat16 import with_bfloat16
from nmflow.packed.compress import compress
from nmflow.packed.int8 import with_int8
from nmflow.packed.layout import as_matrix
from nmflow.packed.measure import dense_ways, rounded_ways, time_ways
from nmflow.packed.modules import PackedLinear
from nmflow.packed.packable import survey
from nmflow.packed.report import report_of
from nmflow.select.plan import Names, Patterns, plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bench(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    pattern: Patterns | None = "1:16",
    include: Names = "all",
    exclude: Names = (),
    *,
    tokens: Sequence[int] = (1, 16, 197),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    layers: bool = True,
    network: bool = True,
    rivals: Sequence[str] = tuple(RIVALS),
    seconds: float = 0.2,
    name: str = "",
    progress: Callable[[str], None] = lambda what: None,
) -> Bench:
    """Measure packed layers and the whole network against the best dense way, in one run.

    Layers are those of the chosen weights, one of each shape and pattern: `F.linear`, oneDNN,
    packed oneDNN and packed, in turns; in float32 also packed with 8-bit values and inputs, packed
    in bfloat16 products, and the dense ways that round: oneDNN in bfloat16, and torch's int8
    dynamic quantization. The network runs unchanged, with packed oneDNN in every linear layer where
    that is faster (`"dense, best"`), and compressed. In float32, it also runs compressed to 8-bit
    values and inputs (`"packed int8"`), and as people deploy it: torch's int8 dynamic quantization,
    bfloat16, `torch.compile` (dense and packed), and onnxruntime (float32, its int8 dynamic
    quantization, and packed). `skipped` has the rivals that cannot run here, with the reason.

    Args:
        model: a network; a copy is pruned by magnitude to `pattern`.
        example_inputs: keyword arguments of its forward pass.
        pattern: as for `plan`; None takes the patterns that the weights hold.
        include: as for `plan`.
        exclude: as for `plan`.
        tokens: token counts of the layers.
        dtypes: of `"float32"`, `"bfloat16"`, `"float16"`.
        layers: measure layers.
        network: measure the network.
        rivals: of `"int8"`, `"bfloat16"`, `"compile"` (which takes a minute to compile) and
            `"onnxruntime"` (the extra `onnx`).
        seconds: time for each way, about; five times as long for networks.
        name: what to call the network.
        progress: called with a few words before each part.

    Raises:
        CompressError: an unknown dtype, rival or token count, or nothing to pack.
        PlanError, PatternError: as for `plan`.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise CompressError(f"dtypes has {dtype!r}: choose from {', '.join(DTYPES)}")
    if not all(is_whole(t, 1) for t in tokens):
        raise CompressError(f"tokens is {tokens!r}: give positive numbers of tokens")
    check_names(rivals)
    model = pruned(model, pattern, include, exclude)
    found = Bench()
    for dtype in dtypes:
        typed = copy.deepcopy(model).to(DTYPES[dtype]).eval()
        if layers:
            found.rows += _layers(typed, tokens, dtype, seconds, progress)
        if network:
            others = tuple(rivals) if dtype == "float32" else ()
            part = _network(typed, example_inputs, dtype, others, seconds, name, progress)
            found.rows += part.rows
            found.shares |= part.shares
            found.skipped |= part.skipped
    return found


def pruned(
    model: nn.Module, pattern: Patterns | None, include: Names = "all", exclude: Names = ()
) -> nn.Module:
    """A copy of a model, its chosen weights pruned by magnitude; with None just the copy."""
    model = copy.deepcopy(model)
    if pattern is not None:
        for target in plan(model, pattern, include, exclude, remainder="skip"):
            w = model.get_parameter(target.name).detach()
            if target.rows is not None:
                w = w.narrow(target.out_dim, target.rows[0], target.rows[1] - target.rows[0])
            w.mul_(mask(w, target.pattern, target.dim, stacked=target.stacked))
    return model


def _layers(
    model: nn.Module, tokens: Sequence[int], dtype: str, seconds: float, progress: Callable
) -> list[Measured]:
    rows: list[Measured] = []
    done: set[tuple[Any, ...]] = set()
    for w in survey(model):
        whole = len(w.runs) == 1 and w.runs[0][:2] == (0, w.layer.out)
        if not whole or w.why_not or len(w.layer.shape) != 2:
            continue
        weight = model.get_parameter(w.layer.name)
        matrix = as_matrix(weight.detach(), w.layer.dim).contiguous()
        key = (tuple(matrix.shape), w.runs[0].pattern)
        if key in done:
            continue
        done.add(key)
        bias = nn.Parameter(torch.randn(matrix.shape[0]).to(matrix.dtype), requires_grad=False)
        held: dict[str, nn.Module] = {
            "packed": PackedLinear.pack(matrix, w.runs[0].pattern, bias),
        }
        if dtype == "float32":
            held |= _rounded(held["packed"])
        for t in tokens:
            progress(f"{w.layer.name}, {dtype}, {t} tokens")
            x = torch.randn(t, matrix.shape[1]).to(matrix.dtype)
            with torch.inference_mode():
                race = dense_ways(matrix, bias, x) | rounded_ways(matrix, bias, x)
                race |= {way: lambda one=one, x=x: one(x) for way, one in held.items()}
                took = time_ways(race, seconds)
            kernels = {way: str(explain(one, x)[0][1].kernel) for way, one in held.items()}
            rows += rows_of(took, "layer", w.layer.name, "x".join(map(str, matrix.shape)),
                          str(w.runs[0].pattern), dtype, t, kernels)  # fmt: skip
    return rows


def _rounded(packed: nn.Module) -> dict[str, nn.Module]:
    """A packed float32 layer whose values are rounded, where that is possible."""
    made: dict[str, nn.Module] = {}
    for way, rounded in (
        ("packed int8", lambda: with_int8(packed, "int8")),
        ("packed bfloat16", lambda: with_bfloat16(packed)),
    ):
        with contextlib.suppress(CompressError):
            made[way] = rounded()
    return made


def _network(
    model: nn.Module, example: Mapping[str, Any], dtype: str, rivals: Sequence[str],
    seconds: float, name: str, progress: Callable,
) -> Bench:  # fmt: skip
    floats = {
        k: v.to(DTYPES[dtype]) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in example.items()
    }
    progress(f"the network, {dtype}: choosing the best dense way and the packed layers")
    met = max(ways.tokens_of(model, floats).values(), default=1)
    packed: dict[str, nn.Module] = {"packed": compress(model, tokens=(met,), onednn=True)}
    if dtype == "float32":
        eight: dict[str, Any] = {"values": "int8", "activations": "int8"}
        packed["packed int8"] = compress(model, tokens=(met,), onednn=True, **eight)
    best = ways.best_dense(model, floats)
    held: dict[str, nn.Module] = {"dense": model, "dense, best": best, **packed}
    runs: dict[str, Callable[[], object]] = {
        way: lambda one=one: one(**floats) for way, one in held.items()
    }
    with ways.scratch() as folder:
        others, skipped = race(rivals, model, packed, floats, Path(folder), progress)
        runs |= others
        progress(f"the network, {dtype}: measuring {len(runs)} ways")
        with torch.inference_mode():
            took = time_ways(runs, 5 * seconds)
            shown = ("dense, best", *packed)
            shares = {(w, dtype): where_the_time_goes(runs[w]) for w in shown}
    served = {way: report_of(one).packed for way, one in packed.items()}
    patterns = dict.fromkeys(row.pattern for rows in served.values() for row in rows)
    kernels = {
        way: ", ".join(dict.fromkeys(row.why.removeprefix("by ") for row in rows))
        for way, rows in served.items()
    }
    label = name or type(model).__name__
    rows = rows_of(took, "network", label, "", ", ".join(patterns), dtype, met, kernels)
    return Bench(rows, shares, skipped)


_PARTS = {
    "matrix products": ("nmflow::matmul", "mkldnn::_linear", "aten::addmm", "aten::mm",
                        "aten::linear", "aten::mkldnn_linear", "quantized::"),
    "attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax",
                  "aten::scaled_dot"),
    "norms": ("aten::native_layer_norm", "aten::pow", "aten::rsqrt", "aten::mean",
              "aten::_fused_rms_norm", "aten::mul"),
    "activations": ("aten::gelu", "aten::relu", "aten::silu", "aten::clamp_min", "aten::tanh"),
    "convolution": ("aten::mkldnn_convolution", "aten::convolution", "aten::_convolution"),
    "residuals": ("aten::add",),
}  # fmt: skip


def where_the_time_goes(run: Callable[[], object], times: int = 3) -> dict[str, float]:
    """The share of each part in the CPU time of some runs, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            run()
    sums = dict.fromkeys([*_PARTS, "the rest"], 0.0)
    for event in profiler.key_averages():
        part = next((p for p, names in _PARTS.items() if event.key.startswith(names)), "the rest")
        sums[part] += event.self_cpu_time_total
    total = sum(sums.values()) or 1.0
    return {part: time / total for part, time in sums.items() if time / total >= 0.005}
