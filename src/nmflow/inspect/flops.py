"""Floating-point operations of one pass, counted op by op and assigned to weights.

The ops' own formulas are those of `torch.utils.flop_counter`; what this module adds is whose weight
each matrix product used.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nmflow.errors import DataError
from nmflow.select.target import Target

_ATEN = torch.ops.aten
_CONVS = {_ATEN.convolution, _ATEN._convolution}
# A copy in another dtype or memory layout is still the same weight.
_COPIES = {_ATEN._to_copy, _ATEN.clone}
# Experts that are indexed out of their stack are still the same weight.
_PICKS = {_ATEN.index, _ATEN.index_select}
_GROUPED = {op for op in [getattr(_ATEN, "_grouped_mm", None)] if op is not None}
# Formulas that torch's registry lacks.
_OWN = {_ATEN.mv, _ATEN.addmv, *_GROUPED}


@dataclass(frozen=True)
class Use:
    """One matrix product with a weight: elements `start` to `stop` of the parameter it read."""

    start: int
    stop: int
    flops: int
    is_conv: bool


@dataclass
class Passes:
    """The cost of one forward pass, and of one backward pass if there was one.

    Attributes:
        forward: the products of each parameter in the forward pass, by its name.
        backward_input: the same in the computation of the input's gradient.
        trained: parameters that received a gradient; each costs its forward products once more.
        other_forward: products without a weight: attention's own.
        other_backward: the same in the backward pass.
    """

    forward: dict[str, list[Use]] = field(default_factory=dict)
    backward_input: dict[str, list[Use]] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    other_forward: int = 0
    other_backward: int = 0

    @property
    def forward_total(self) -> int:
        """Every product of the forward pass."""
        return self.other_forward + sum(u.flops for uses in self.forward.values() for u in uses)

    @property
    def backward_total(self) -> int:
        """Every product of the backward pass."""
        products = [u.flops for uses in self.backward_input.values() for u in uses]
        products += [u.flops for name in self.trained for u in self.forward.get(name, [])]
        return self.other_backward + sum(products)


def count(model: nn.Module, example_inputs: Any, backward: bool = False) -> Passes:
    """Count the FLOPs (2 a multiply-add) of matrix products and convolutions.

    The model runs once in evaluation mode and in eager kernels, without the fused paths of
    attention and of recurrent layers, which would hide products. Norms, activations and softmax are
    not counted. The model does not change, and neither do its gradients.

    Args:
        model: the model, plain or compiled.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of named
            ones; its tensors are taken to the model's device, where it has one.
        backward: whether to count a backward pass from every output as well.

    Raises:
        DataError: inputs of another kind, or outputs without a gradient when `backward` is asked.
    """
    args, kwargs = split_inputs(example_inputs)
    places = {p.device for p in model.parameters()}
    if len(places) == 1:
        (place,) = places
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(place), (args, kwargs))
    counter = _Counter(model)
    with _open(model), torch.set_grad_enabled(backward):
        with counter:
            outputs = model(*args, **kwargs)
        passes = counter.passes
        if not backward:
            return passes
        ends = [t for t in _tensors(outputs) if t.requires_grad]
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not ends or not trainable:
            raise DataError(
                "the model's outputs for example_inputs have no gradient: training FLOPs need a "
                "model with trainable parameters whose output depends on them"
            )
        counter.is_backward = True
        with counter:
            grads = torch.autograd.grad(
                ends, list(trainable.values()), [torch.ones_like(t) for t in ends],
                allow_unused=True,
            )  # fmt: skip
    passes.trained = {n for n, g in zip(trainable, grads, strict=True) if g is not None}
    for name in passes.trained:
        # Products for a weight's gradient contain no weight, so they were counted as others.
        own = passes.forward.get(name, [])
        passes.other_backward -= sum(use.flops for use in own if not use.is_conv)
    return passes


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a forward call."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise DataError(
        f"example_inputs is of type {type(example_inputs).__name__}: give a tensor, a tuple of "
        "arguments, or a mapping of named ones"
    )


class _Counter(TorchDispatchMode):
    """Counts every product as a weight's or as another."""

    def __init__(self, model: nn.Module) -> None:
        # Not above: it imports Triton, where that is installed.
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self.formulas = flop_registry
        self.passes = Passes()
        self.is_backward = False
        self._held: dict[int, list[tuple[int, int, str]]] = {}
        self._alive: list[Tensor] = []
        for name, parameter in model.named_parameters():
            self._hold(parameter, name, int(parameter.storage_offset()), parameter.numel())

    def _hold(self, tensor: Tensor, name: str, start: int, size: int) -> None:
        # The storage, not the address: parameters on the meta device have no address.
        spans = self._held.setdefault(tensor.untyped_storage()._cdata, [])
        spans.append((start, start + size, name))
        self._alive.append(tensor)

    def _find(self, value: Any) -> tuple[str, int, int] | None:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return None
        at = int(value.storage_offset())
        for start, stop, name in self._held.get(value.untyped_storage()._cdata, ()):
            if start <= at < stop:
                return name, at - start, min(at + int(value.numel()), stop) - start
        return None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        counted = packet in self.formulas or packet in _OWN
        if not counted and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if counted:
            self._book(packet, args, kwargs, out)
        elif packet in _COPIES:
            found = self._find(args[0])
            if found is not None and found[1] == 0 and out.numel() == found[2]:
                self._hold(out, found[0], 0, out.numel())
        elif packet in _PICKS:
            found = self._find(args[0])
            if found is not None:
                self._hold(out, found[0], 0, out.numel())
        return out

    def _book(self, packet: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        if packet is _ATEN.convolution_backward:
            self._book_conv_backward(args)
            return
        if packet in (_ATEN.mv, _ATEN.addmv):
            flops = 2 * args[packet is _ATEN.addmv].numel()
        elif packet in _GROUPED:
            flops = _grouped(args[0], args[1])
        else:
            flops = int(self.formulas[packet](*args, **kwargs, out_val=out))
        found = next(filter(None, map(self._find, args)), None)
        # addmm's first argument is the bias, which is not a factor of the product.
        if packet in (_ATEN.addmm, _ATEN.addmv, _ATEN.baddbmm):
            found = next(filter(None, map(self._find, args[1:3])), None)
        self._add(found, flops, packet in _CONVS)

    def _book_conv_backward(self, args: Sequence[Any]) -> None:
        grad, x, weight, _, stride, padding, dilation, transposed, _, groups, wanted = args
        flops = int(
            self.formulas[_ATEN.convolution](
                x, weight, None, stride, padding, dilation, transposed, [], groups, out_val=grad
            )
        )
        found = self._find(weight)
        if wanted[0]:
            self._add(found, flops, True)
        if wanted[1] and found is None:
            self._add(None, flops, True)

    def _add(self, found: tuple[str, int, int] | None, flops: int, is_conv: bool) -> None:
        if found is not None:
            name, start, stop = found
            book = self.passes.backward_input if self.is_backward else self.passes.forward
            book.setdefault(name, []).append(Use(start, stop, flops, is_conv))
        elif self.is_backward:
            self.passes.other_backward += flops
        else:
            self.passes.other_forward += flops


def _grouped(a: Tensor, b: Tensor) -> int:
    """The FLOPs of a grouped product of experts: each row (or each column) meets one expert."""
    if a.dim() == 2:  # (tokens, in) @ (experts, in, out), or (in, tokens) @ (tokens, out)
        return 2 * int(a.numel()) * int(b.shape[-1])
    return 2 * int(b.numel()) * int(a.shape[-2])


@contextlib.contextmanager
def _open(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and eager kernels, which show every product; restored afterwards."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in training)
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if recurrent:
                # Switching oneDNN off also touches a setting of hardware that may be absent.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", "TF32 acceleration", UserWarning)
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, was in training.items():
            module.training = was


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def flops_of(uses: Sequence[Use], target: Target) -> int:
    """FLOPs of the products with a target's rows, spread evenly over the elements read."""
    total = Fraction(0)
    numel = math.prod(target.shape)
    for use in uses:
        if target.rows is None:
            share = Fraction(1)
        elif target.dim == 0:  # rows are columns of the stored weight, which is used whole
            share = Fraction(target.rows[1] - target.rows[0], target.shape[1])
        else:
            row = numel // target.shape[0]
            start, stop = target.rows[0] * row, target.rows[1] * row
            overlap = max(0, min(stop, use.stop) - max(start, use.start))
            share = Fraction(overlap, use.stop - use.start)
        total += use.flops * share
    return round(total)
