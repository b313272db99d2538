"""Ops of training on kept places, behind `torch.library`: `nmflow::kept_linear`, its backward.

`cpu_steps` computes them, or on a GPU `gpu_steps`, where `fits` stays on the device. Both ops
depend on their inputs alone. Each forward pass packs the weight anew, so it sees every write; the
backward pass gets the packed weight. A weight with a group that keeps more than N is multiplied
dense: the result is always that of `F.linear`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmflow.errors import CompressError
from nmflow.kernels import cpu_steps, gpu_steps, reference
from nmflow.kernels.calls import LIBRARY, refuse_features
from nmflow.kernels.layout import LANES, Shape
from nmflow.masks.kept_values import to_bits

LIBRARY.define(
    "kept_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? kept, int n, int m, int panel) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "kept_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor values, Tensor codes, "
    "Tensor fits, int n, int m, int panel, bool[3] wanted) -> (Tensor, Tensor, Tensor)"
)


def kept_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None, n: int, m: int,
    panel: int,
) -> Tensor:  # fmt: skip
    r"""`y = x Wᵀ + bias` for a weight that keeps N of every M, on the kept places alone.

    The gradient of the weight is `dyᵀ x` at the kept places and 0 elsewhere, as under the masked
    rule; the gradients of x and the bias are the usual ones. The places that are not 0, and those
    in `kept`, are kept; a group with fewer than N of them is filled with its lowest others. If a
    group keeps more than N, or no kernel serves the call, all of it is dense, as in `F.linear`.

    On a CPU, panels of multiples of 16 rows multiply a bfloat16 x in bfloat16, with sums in
    float32; other patterns multiply it in float32. Results are rounded to even.

    Args:
        x: `(..., in)`.
        weight: W̃, `(out, in)`, of the dtype of x, or float32 if x has two bytes a number (on a
            CPU: bfloat16).
        bias: `(out,)` or None.
        kept: a bool mask like the weight, or its bits from `masks.kept_values.to_bits`, or None.
        n: N, the number kept of every M.
        m: M.
        panel: V, consecutive rows that share their kept places.

    Returns:
        `(..., out)`.

    Raises:
        CompressError: sizes or devices that do not fit.

    Example:
        >>> w = torch.tensor([[0.0, 2.0], [3.0, 0.0]], requires_grad=True)
        >>> kept_linear(torch.ones(1, 2), w, None, None, 1, 2, 1).sum().backward()
        >>> w.grad
        tensor([[0., 1.],
                [1., 0.]])
    """
    if kept is not None and kept.dtype == torch.bool:
        kept = to_bits(kept)
    return torch.ops.nmflow.kept_linear(x, weight, bias, kept, n, m, panel)[0]


@functools.lru_cache(4096)
def _served(out: int, inputs: int, n: int, m: int, panel: int, isa: str) -> Shape | None:
    shape = Shape.of(out, inputs, f"{n}:{m}@{panel}")
    return None if cpu_steps.why_not(shape) else shape


def _of(weight: Tensor, n: int, m: int, panel: int) -> Shape:
    out, inputs = weight.shape
    return Shape(out, inputs, n, m, panel)


def _shape(x: Tensor, weight: Tensor, n: int, m: int, panel: int) -> Shape | None:
    """The shape of a weight if there are kernels for it and x, else None."""
    fits = weight.device.type == "cpu" and weight.numel() > 0 and x.shape[-1:] == weight.shape[1:]
    isa = cpu_steps.isa()
    if not (fits and isa) or cpu_steps.why_not_dtypes(x.dtype, weight.dtype):
        return None
    return _served(*weight.shape, n, m, panel, isa)


@functools.cache
def _halves(isa: str) -> bool:
    """Whether the product runs in bfloat16: panels of multiples of 16 rows do."""
    return bool(isa) and cpu_steps.halves(Shape(LANES, LANES, 1, LANES, LANES))


def _packs(x: Tensor, shape: Shape) -> torch.dtype:
    """The dtype of the values that a call on a CPU packs."""
    half = x.dtype == torch.bfloat16 and x.is_cpu and shape.shared and _halves(cpu_steps.isa())
    return torch.bfloat16 if half else torch.float32


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None) -> None:
    """Refuse what a kernel would read past."""
    if weight.dim() != 2:
        raise CompressError(f"the weight has {weight.dim()} axes: give a matrix (out, in)")
    out, inputs = weight.shape
    refuse_features(x, inputs)
    wanted = {"bias": (bias, (out,)), "kept": (kept, (out, -(-inputs // 64) * 8))}
    for name, (t, size) in wanted.items():
        if t is not None and (t.shape != size or t.device != weight.device):
            raise CompressError(
                f"{name} is {tuple(t.shape)} on {t.device}, and the weight {tuple(weight.shape)} "
                f"on {weight.device}: it takes {size}{' bytes of bits' * (t is kept)} there"
            )


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None, n: int, m: int, panel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, bias, kept)
    if shape := gpu_steps.served(x, weight, n, m, panel):
        packed = gpu_steps.pack(weight, kept, shape, x.dtype)
        y = gpu_steps.forward(_rows(x), weight, *packed, bias, shape)
        return y.view(*x.shape[:-1], shape.out), *packed
    asked = _of(weight, n, m, panel)
    own = _packs(x, asked)
    if shape := _shape(x, weight, n, m, panel):
        values, codes, fits = cpu_steps.pack(weight.float().contiguous(), kept, shape)
        values = values if own == torch.float32 else cpu_steps.halved(values, shape)
        if fits:
            bias = None if bias is None else bias.to(own).contiguous()
            y = cpu_steps.forward(_rows(x, own), values, codes, bias, shape).to(x.dtype)
            return y.view(*x.shape[:-1], shape.out), values, codes, torch.tensor(True)
    else:
        sizes, kind = asked.tiled_sizes(own), asked.code_dtype()
        values = weight.new_zeros(sizes[0], dtype=own)
        codes = weight.new_zeros(sizes[1], dtype=kind)
    if x.dtype.itemsize == 2:  # as autocast does
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.linear(x, weight, bias)
    return y, values, codes, torch.zeros((), dtype=torch.bool, device="cpu")


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, values: Tensor, codes: Tensor, fits: Tensor,
    n: int, m: int, panel: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dw, bias = (dy.new_empty(0) for _ in range(3))
    if fits.dtype == torch.int32:  # of `gpu_steps`
        shape, rows = _of(weight, n, m, panel), _rows(dy)
        if wanted[0]:
            dx = gpu_steps.input_grad(rows, weight, values, codes, fits, shape).view(x.shape)
        if wanted[1]:
            dw = gpu_steps.weight_grad(_rows(x), rows, codes, fits, shape, weight.dtype)
        return dx, dw, rows.sum(0) if wanted[2] else bias
    if not bool(fits):
        flat = dy.reshape(-1, dy.shape[-1])
        dx = dy @ weight.to(dy.dtype) if wanted[0] else dx
        dw = (flat.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if wanted[1] else dw
        return dx, dw, flat.sum(0) if wanted[2] else bias
    own = values.dtype
    shape, rows = _of(weight, n, m, panel), _rows(dy, own)
    if wanted[0]:
        dx = cpu_steps.input_grad(rows, values, codes, shape).to(x.dtype).view(x.shape)
    if wanted[1]:
        dw, found = cpu_steps.weight_grad(_rows(x, own), rows, values, codes, shape, wanted[2])
        return dx, dw.to(weight.dtype), bias if found is None else found.to(dy.dtype)
    return dx, dw, rows.sum(0).to(dy.dtype) if wanted[2] else bias


def _rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype or x.dtype).contiguous()


for _key in ("CPU", "CUDA", "MPS", "XPU"):
    LIBRARY.impl("kept_linear", _forward, _key)
    LIBRARY.impl("kept_linear_backward", _backward, _key)


@torch.library.register_fake("nmflow::kept_linear", lib=LIBRARY)
def _forward_fake(x, weight, bias, kept, n, m, panel):
    shape = _of(weight, n, m, panel)
    if gpu_steps.served(x, weight, n, m, panel):
        values, codes = gpu_steps.sizes(shape)
        return (
            x.new_empty((*x.shape[:-1], shape.out)),
            x.new_empty(values),
            x.new_empty(codes, dtype=torch.uint8),
            x.new_empty((), dtype=torch.int32),
        )
    own = _packs(x, shape)
    values, codes = shape.tiled_sizes(own)
    return (
        x.new_empty((*x.shape[:-1], shape.out)),
        weight.new_empty(values, dtype=own),
        weight.new_empty(codes, dtype=shape.code_dtype()),
        torch.empty((), dtype=torch.bool, device="cpu"),
    )


@torch.library.register_fake("nmflow::kept_linear_backward", lib=LIBRARY)
def _backward_fake(dy, x, weight, values, codes, fits, n, m, panel, wanted):
    sizes = (x.shape, weight.shape, weight.shape[:1])
    dx, dw, bias = (
        dy.new_empty(size if want else (0,)) for size, want in zip(sizes, wanted, strict=True)
    )
    return dx, dw.to(weight.dtype) if wanted[1] else dw, bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, *ctx.pattern = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, *output[1:])


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, values, codes, fits = ctx.saved_tensors
    wanted = [bool(w) for w in ctx.needs_input_grad[:3]]
    found = torch.ops.nmflow.kept_linear_backward(
        dy, x, weight, values, codes, fits, *ctx.pattern, wanted
    )
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), *[None] * 4


torch.library.register_autograd(
    "nmflow::kept_linear", _gradients, setup_context=_setup, lib=LIBRARY
)


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, _, codes, fits, *ctx.pattern, ctx.wanted = inputs
    ctx.save_for_backward(dy, x, weight, codes, fits)


def _gradients_twice(ctx: Any, *given: Tensor) -> tuple[Any, ...]:
    """Of dx = dy W, dw = K ⊙ dyᵀ x and Σ dy, with K the kept places; dense, and differentiable."""
    dy, x, weight, codes, fits = ctx.saved_tensors
    to_dx, to_dw, to_bias = (g if w else None for g, w in zip(given, ctx.wanted, strict=True))
    kind, weight = weight.dtype, weight.to(dy.dtype)
    kept = weight.new_ones(weight.shape)
    if bool(fits):
        shape = _of(weight, *ctx.pattern)
        ones = torch.ones(shape.tiled_sizes(torch.float32)[0], device=weight.device)
        kept = reference.dense(ones, codes, shape).to(dy.dtype)
    of_dy, of_x, of_w = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(weight)
    flat = dy.reshape(-1, dy.shape[-1])
    if to_dx is not None:
        of_dy = of_dy + to_dx @ weight.t()
        of_w = of_w + kept * (flat.t() @ to_dx.reshape(-1, to_dx.shape[-1]))
    if to_dw is not None:
        to_dw = to_dw.to(dy.dtype)
        of_dy, of_x = of_dy + x @ (kept * to_dw).t(), of_x + dy @ (kept * to_dw)
    if to_bias is not None:
        of_dy = of_dy + to_bias
    return of_dy, of_x, of_w.to(kind), *[None] * 7


torch.library.register_autograd(
    "nmflow::kept_linear_backward", _gradients_twice, setup_context=_setup_twice, lib=LIBRARY
)
