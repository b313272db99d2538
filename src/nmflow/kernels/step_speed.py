"""Whether a layer trains faster on kept places than dense, measured on its own input."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from nmflow.kernels.calls import autocast_dtype
from nmflow.kernels.step_ops import kept_linear

_KNOWN: dict[tuple[object, ...], tuple[float, float]] = {}


def seconds(
    x: Tensor, weight: Tensor, kept: Tensor | None, n: int, m: int, panel: int
) -> tuple[float, float]:
    """The seconds of a dense forward and backward pass, and of one on kept places.

    Layers of one shape and pattern, with as many tokens and threads, are measured once.

    Args:
        x: `(..., in)`, the layer's input, before autocast.
        weight: W̃, `(out, in)`.
        kept: its mask as bits, or None.
        n: N, the number kept of every M.
        m: M.
        panel: V.
    """
    dtype = autocast_dtype(x, weight) or x.dtype
    key = (x.numel(), *weight.shape, n, m, panel, x.requires_grad, torch.get_num_threads(),
           x.device, dtype, weight.dtype)  # fmt: skip
    if key not in _KNOWN:
        w, held = weight.detach(), kept
        given = x.detach().to(dtype).requires_grad_(x.requires_grad)
        ways = (
            lambda x, w: F.linear(x, w),
            lambda x, w: kept_linear(x, w, None, held, n, m, panel),
        )
        with torch.cuda.device_of(x):  # where events are recorded
            one, other = (min(_time(way, given, w) for _ in range(3)) for way in ways)
        _KNOWN[key] = one, other
    return _KNOWN[key]


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Compute beside a step, hidden from everything that watches the step.

    Activation checkpointing counts what a layer saves, and then computes the layer once more,
    without the work done here.
    """
    with _disable_current_modes(), saved_tensors_hooks(_same, _same):
        yield


def _time(way: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> float:
    given = x.detach().requires_grad_(x.requires_grad), w.detach().requires_grad_()
    asked = [t for t in given if t.requires_grad]
    began, end = time.perf_counter(), None
    if x.is_cuda:  # time on the device; otherwise the host does not wait for it
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    with torch.enable_grad():
        y = way(*given)
        torch.autograd.grad(y, asked, y.detach())
    if end is not None:
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3  # pyright: ignore[reportPossiblyUnbound]
    return time.perf_counter() - began


def _same(saved: Tensor) -> Tensor:
    return saved
