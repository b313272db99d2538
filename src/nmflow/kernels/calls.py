"""Shared by the ops of packed weights: torch's library, watchers of calls, batches, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nmflow.errors import CompressError
from nmflow.kernels import reference
from nmflow.kernels.layout import Shape

_C: Any = torch._C
LIBRARY = torch.library.Library("nmflow", "DEF")
register_vmap: Any = torch.library.register_vmap  # torch types its decorator as optional
SHAPE = "int out, int inputs, int n, int m, int panel"
MOST_BOUND = 65_536  # weights that an op keeps bound

# Bound functions of an op. A bound function holds addresses, so its key is all that it relies on:
# the memory (a weak reference identifies a storage, since its address may be used again), the
# version of its contents, and the layout.
Bound = dict[tuple[Any, ...], tuple[Callable[..., None], list[StorageWeakRef]]]


def keep(bound: Bound, key: tuple[Any, ...], run: Callable[..., None], *buffers: Tensor) -> None:
    """Keep a bound function for as long as its buffers live."""
    if len(bound) >= MOST_BOUND:
        bound.clear()
    bound[key] = run, [StorageWeakRef(buffer.untyped_storage()) for buffer in buffers]


def alive(run: Callable[..., None], *buffers: Tensor) -> Callable[..., None]:
    """The bound function, with references to the copies whose addresses it holds."""
    return lambda *args, held=buffers: run(*args)


def version_of(t: Tensor) -> int:
    """How often a tensor was written; inference tensors have no count."""
    return -1 if t.is_inference() else t._version


@functools.lru_cache(4096)
def shape_of(out: int, inputs: int, n: int, m: int, panel: int) -> Shape:
    """The shape from an op's numbers, which are checked once."""
    return Shape.of(out, inputs, f"{n}:{m}@{panel}")


def aligned(t: Tensor, size: int = 0) -> Tensor:
    """The tensor, or a copy of it if its elements are not aligned to their own size."""
    return t.clone() if t.data_ptr() % (size or t.element_size()) else t


def rows_of(x: Tensor, inputs: int) -> Tensor:
    """`(..., inputs)` as rows in order; a copy if they are not, such as expanded ones."""
    flat = x.reshape(-1, inputs)
    return flat.contiguous() if flat.stride(1) != 1 or flat.stride(0) < inputs else flat


def product(
    run: Callable[..., None], x: Tensor, bias: Tensor | None, out: int, inputs: int, epilogue: int
) -> Tensor:
    """`(..., inputs)` to `(..., out)` by a bound function; a copy of x only where it is needed."""
    y = x.new_empty((*x.shape[:-1], out))
    x = aligned(x)
    if x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= inputs):
        if tokens := y.numel() // out:
            run(x, bias, y, tokens, epilogue)
    elif y.numel():
        flat, rows = x.reshape(-1, inputs), y.view(-1, out)
        turned = getattr(run, "turned", None)
        if turned is None or not turned(flat, bias, rows, flat.shape[0], epilogue):
            run(rows_of(flat, inputs), bias, rows, flat.shape[0], epilogue)
    return y


def gradients(
    grad: Tensor, weight: Tensor, of_x: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the bias, from that of `y = x Wᵀ + bias`."""
    rows = tuple(range(grad.dim() - 1))
    bias = (grad.sum(rows) if rows else grad) if of_bias else None
    return grad @ weight if of_x else None, bias


def refuse_features(x: Tensor, inputs: int) -> None:
    """Raise `CompressError` if the last axis of x is not the weight's."""
    if not x.shape or x.shape[-1] != inputs:
        has = f"{x.shape[-1]} features" if x.shape else "no axis"
        raise CompressError(
            f"x has {has}, but the packed weight takes {inputs} features: give the layer's own "
            "inputs"
        )


def is_plain_call(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing watches the call of the op, so that torch's dispatcher can be skipped.

    Watchers are tensor subclasses, modes, autocast, functorch, compilers and profilers.
    """
    if torch.compiler.is_compiling():  # first, since dynamo cannot trace the others
        return False
    return (
        type(x) is Tensor
        and type(weight) is Tensor
        and x.is_cpu
        and weight.is_cpu
        and not _C._len_torch_dispatch_stack()
        and not _C._len_torch_function_stack()
        and _C._functorch.maybe_current_level() is None
        and not _C._autograd._profiler_enabled()
        and _C._get_tracing_state() is None
        and not torch.is_autocast_enabled("cpu")
    )


def over_batch(
    multiply: Callable[[Tensor, Tensor | None, int], Tensor],
    x: Tensor, x_dim: int | None, bias: Tensor | None, bias_dim: int | None, epilogue: int,
) -> tuple[Tensor, int | None]:  # fmt: skip
    """The product over a batch of x, of biases, or of both, and the axis of the batch in it."""
    # x has any number of leading axes, so a batch is one more of them.
    if x_dim is not None:
        x = x.movedim(x_dim, 0)
    if bias is None or bias_dim is None:
        return multiply(x, bias, epilogue), None if x_dim is None else 0
    y = multiply(x, None, 0)
    bias = bias.movedim(bias_dim, 0)
    if x_dim is None:
        y = y.unsqueeze(0)
    y = y + bias.reshape(bias.shape[0], *[1] * (y.dim() - 2), bias.shape[1])
    return reference.apply_epilogue(y, epilogue), 0


def refuse_batched_weights(*dims: int | None) -> None:
    """Raise `CompressError` if `torch.vmap` runs over a packed weight."""
    if any(dim is not None for dim in dims):
        raise CompressError(
            "torch.vmap runs over a packed weight: the kernels take one weight a call, so keep the "
            "weight out of in_dims"
        )


def autocast_dtype(x: Tensor, values: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives `F.linear`; None if there is none, or if it does not apply.

    Autocast never changes doubles, nor tensors that are not floats.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    if any(not t.is_floating_point() or t.dtype == torch.float64 for t in (x, values)):
        return None
    return torch.get_autocast_dtype(kind)
