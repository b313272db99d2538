"""Layers that compute on kept places: a class that a `Linear` or HF `Conv1D` has for a while.

Nothing else about the module changes: same object, same parameters, same keys, same hooks. Copies
and pickles of it have the class that it had before.
"""

from __future__ import annotations

import copyreg
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nmflow.errors import CompressError
from nmflow.kernels import cpu_steps, gpu_steps
from nmflow.kernels.calls import autocast_dtype
from nmflow.kernels.step_ops import kept_linear
from nmflow.kernels.step_speed import seconds, unseen
from nmflow.select.weights import is_hf_conv1d
from nmflow.text_table import one_line

WAY = "_nmflow_way"
_C: Any = torch._C
_NEW: Any = copyreg._reconstructor  # type: ignore[attr-defined]


@dataclass
class Way:
    """How a layer computes.

    Attributes:
        pattern: N, M and V of W̃.
        kept: the held mask, `(out, in)` as bits; None if W̃ itself shows the kept places.
        decided: whether the layer computes on kept places; None until it is measured.
        said: why it does not, from its last call or its measurement.
        compiled: whether a compiler traced a call, during which nothing can be measured.
    """

    pattern: tuple[int, int, int]
    kept: Tensor | None
    decided: bool | None
    said: str = ""
    compiled: bool = False

    def dense_call(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a call must be dense, whatever was decided."""
        said = _said(x, weight, self.kept)
        if self.decided is not None or said:
            if said != self.said and self.decided is not False:
                self.said = said
            return bool(said) or self.decided is False
        return False

    def decide(self, x: Tensor, weight: Tensor, transposed: bool) -> None:
        """Measure both ways on a training step's input, and take the faster one."""
        try:
            with unseen():
                weight = weight.t() if transposed else weight
                dense, sparse = seconds(x, weight, self.kept, *self.pattern)
        except (CompressError, torch.OutOfMemoryError) as error:
            self.decided, self.said = False, f"it could not be measured: {one_line(error)}"
            return
        self.decided = sparse < dense
        ratio = f"{dense / sparse:.2f} × as fast as dense"
        self.said = "" if self.decided else f"kept places were {ratio} when they were measured"


def _said(x: Tensor, weight: Tensor, kept: Tensor | None) -> str:
    """Why a call is dense, in one clause; or ""."""
    on, steps = x.device.type, {"cuda": gpu_steps, "cpu": cpu_steps}
    if kept is not None and kept.device != weight.device:
        return f"its held mask is on {kept.device}, and it was moved to {weight.device}"
    if on != weight.device.type or on not in steps:
        return f"it was called on {x.device}"
    given = autocast_dtype(x, weight) or x.dtype
    return steps[on].why_not_dtypes(given, weight.dtype) or _said_by_torch()


def _said_by_torch() -> str:
    if torch.compiler.is_compiling():
        return ""
    if _C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return "it was called under a transform of torch.func, or forward-mode gradients"
    return ""


def _captured(x: Tensor) -> bool:
    """Whether a call is captured in a CUDA graph, in which nothing can be timed."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class OnKept(nn.Module):
    """What the classes of such layers share."""

    transposed = False  # whether the weight is stored (in, out)
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """As the layer itself, within rounding."""
        way: Way = self.__dict__[WAY]
        if way.dense_call(x, self.weight):
            return super().forward(x)
        if torch.compiler.is_compiling():
            way.compiled = True
        elif way.decided is None:
            steps = torch.is_grad_enabled() and self.weight.requires_grad
            if not steps or _captured(x):
                return super().forward(x)  # no step that could be measured
            way.decide(x, self.weight, self.transposed)
            if not way.decided:
                return super().forward(x)
        weight = self.weight.t() if self.transposed else self.weight
        x = x.to(autocast_dtype(x, weight) or x.dtype)
        return kept_linear(x, weight, self.bias, way.kept, *way.pattern)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles have the class that the layer had before."""
        state = {key: value for key, value in vars(self).items() if key != WAY}
        return _NEW, (plain(type(self)), object, None), state


class KeptLinear(OnKept, nn.Linear):
    """A `Linear` that computes on kept places."""


@functools.cache
def _conv1d(base: type[nn.Module]) -> type[nn.Module]:
    return type("KeptConv1D", (OnKept, base), {"transposed": True, "__module__": __name__})


def plain(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer has when it computes dense, as before."""
    return kind.__mro__[2] if issubclass(kind, OnKept) else kind


def served(module: nn.Module) -> bool:
    """Whether a layer has a class that can compute on kept places; subclasses may do more."""
    kind = plain(type(module))
    return kind is nn.Linear or (is_hf_conv1d(module) and kind.__name__ == "Conv1D")


def transposed(module: nn.Module) -> bool:
    """Whether a layer that is served stores its weight `(in, out)`."""
    return is_hf_conv1d(module)


def swap(module: nn.Module, way: Way) -> None:
    """Make a layer compute on kept places from now on."""
    module.__dict__[WAY] = way
    if not isinstance(module, OnKept):
        kind = type(module)
        module.__class__ = KeptLinear if kind is nn.Linear else _conv1d(kind)


def unswap(module: nn.Module) -> None:
    """Make a layer compute dense again, by its own class."""
    if isinstance(module, OnKept):
        own: Any = module
        own.__class__ = plain(type(module))
        own.__dict__.pop(WAY, None)


def way_of(module: nn.Module) -> Way | None:
    """How a layer computes, if it has such a class."""
    return module.__dict__.get(WAY)
