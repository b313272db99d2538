"""Packed layers that are computed together: a feed-forward block, or q, k and v, in one call.

At few tokens a call costs as much as its product. The layers stay where they are, with their names,
weights and biases, so files, `decompress` and exports know nothing of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.kernels.calls import is_plain_call, version_of
from nmflow.kernels.layout import LANES, Shape
from nmflow.packed.modules import PackedLinear

_PATIENCE = 2  # products of siblings in a row that nobody asks for


def _unwatched(x: Tensor, layer: PackedLinear) -> bool:
    """Whether nobody looks at single products: no gradient, compiler, mode, hook of torch."""
    return not torch.is_grad_enabled() and is_plain_call(x, next(iter(layer._buffers.values())))  # pyright: ignore[reportArgumentType]


class Chain:
    """A feed-forward block whose last layer computes all: `last(act(first(x)))`.

    With a gate it is `last(act(gate(x)) * up(x))`. Inside a call of the module that holds the
    block, the first layer hands x on as it is, and `up` stands for 1. Everywhere else every layer
    computes its own product: in training mode, since dropout may lie between; under autograd;
    where a hook looks at a module inside; and where somebody calls a layer himself.

    Args:
        firsts: the first layer, or the gate and `up`; their activation is their epilogue.
        last: the layer that reads what they give.
    """

    def __init__(self, firsts: tuple[PackedLinear, ...], last: PackedLinear) -> None:
        self.firsts, self.last = firsts, last
        self._inside: set[int] = set()  # threads in a call of the module that holds the block

    @property
    def layers(self) -> tuple[PackedLinear, ...]:
        """In the order of their products."""
        return *self.firsts, self.last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inside": set()}

    def watch(self, parent: nn.Module) -> None:
        """Compute all at once inside calls of the module that holds the block."""
        inner = tuple(m for m in parent.modules() if m is not parent and not _has_ours(m))
        parent.register_forward_pre_hook(functools.partial(_enter, self, inner))
        parent.register_forward_hook(functools.partial(_leave, self), always_call=True)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """As inside such a call."""
        self._inside.add(threading.get_ident())
        try:
            yield
        finally:
            self._inside.discard(threading.get_ident())

    def role(self, layer: PackedLinear) -> str:
        """What a layer does, in a few words."""
        return "computes its whole block" if layer is self.last else "computed by its block's last"

    def run(self, layer: PackedLinear, x: Tensor) -> Any:
        """What a layer's forward gives."""
        if torch.compiler.is_compiling() or threading.get_ident() not in self._inside:
            return layer.product(x)
        if layer is not self.last:
            return x if layer is self.firsts[0] else 1.0
        first, *others = self.firsts
        if _unwatched(x, layer):
            h = first.at_once(x)
            for other in others:
                h.mul_(other.at_once(x))
            return layer.at_once(h)
        h = first.product(x)
        for other in others:
            h = h * other.product(x)
        return layer.product(h)


def _enter(chain: Chain, inner: tuple[nn.Module, ...], parent: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or chain.last.training:
        return
    looked_at = any(m._forward_hooks or m._forward_pre_hooks for m in inner)
    if not looked_at and not nn.modules.module._has_any_global_hook():
        chain._inside.add(threading.get_ident())


def _leave(chain: Chain, parent: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        chain._inside.discard(threading.get_ident())


def _ours(hook: Any) -> Chain | None:
    """The chain whose hook it is."""
    mine = isinstance(hook, functools.partial) and hook.func in (_enter, _leave)
    return hook.args[0] if mine else None


def _has_ours(module: nn.Module) -> bool:
    return any(_ours(hook) is not None for hook in module._forward_pre_hooks.values())


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody else's hook looks at a module's calls."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(_ours(hook) is None for hook in hooks)


def unwatch(module: nn.Module, chain: Chain | None = None) -> None:
    """Take back what `Chain.watch` did to a module, for one chain or for all."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = _ours(hook)
            if owner is not None and chain in (None, owner):
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


class Siblings:
    """Layers that multiply the same x one after the other: the first computes the rows of all.

    Their buffers become parts of one, which nothing but memory joins: where it is no longer the
    same memory (another dtype, another device, a buffer that was replaced), each computes its own.
    So it does for another x than the first layer's, for an x that was written since, and where
    the others' rows are not asked for twice in a row, as in attention to another text.

    Args:
        layers: of which `why_apart` says nothing.
    """

    def __init__(self, layers: tuple[PackedLinear, ...]) -> None:
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        self._places: list[tuple[dict[str, Any], str, int]] = []
        self.whole: PackedLinear | None = self._join()
        self.unasked = 0
        self._held: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def role(self, layer: PackedLinear) -> str:
        """What a layer does, in a few words."""
        return "computes q, k and v" if layer is self.layers[0] else "computed with q"

    def __getstate__(self) -> dict[str, Any]:
        # A copy is joined when it runs.
        return {**self.__dict__, "_held": None, "whole": None, "_places": []}

    def run(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """What a layer's forward gives."""
        held = self._held
        if held is not None and held[0] is x and not torch.is_grad_enabled():
            y = held[2].pop(id(layer), None) if held[1] == version_of(x) else None
            if y is not None:
                if not held[2]:
                    self._held, self.unasked = None, 0
                return y
        if self.unasked >= _PATIENCE or not _unwatched(x, layer):
            return layer.product(x)
        if layer is not self.layers[0]:
            return layer.product(x)
        whole = self._join() if self.whole is None else self.whole
        if not self.is_whole():
            return layer.product(x)
        self._held = None
        if held is not None:
            self.unasked += 1
            if self.unasked >= _PATIENCE:
                return layer.product(x)
        own, *rest = whole.at_once(x).split(self.sizes, -1)
        others = {id(other): y for other, y in zip(self.layers[1:], rest, strict=True)}
        self._held = x, version_of(x), others
        return own

    def is_whole(self) -> bool:
        """Whether the layers' weights and biases are still parts of the joined ones."""
        for held, name, address in self._places:
            own = held[name]
            if own is None or own.data_ptr() != address:
                return False
        return bool(self._places)

    def _join(self) -> PackedLinear:
        """Join the layers, and note where their parts lie."""
        self.whole = _joined(self.layers)
        self._places = [
            (held, name, own.data_ptr())
            for layer in self.layers
            for held in (layer._buffers, layer._parameters)
            for name, own in held.items()
            if own is not None
        ]
        return self.whole


def why_apart(layers: tuple[PackedLinear, ...]) -> str:
    """Why layers cannot be joined to one, in one clause; empty if they can."""
    first = layers[0]
    for layer in layers:
        if type(layer) is not type(first) or layer.rounding != first.rounding:
            return "they multiply in different ways"
        if layer.in_features != first.in_features or layer.pattern != first.pattern:
            return "their patterns or inputs differ"
        if layer.epilogue or (layer.bias is None) != (first.bias is None):
            return "one has an activation, or a bias, and another has none"
        if layer.like.dtype != first.like.dtype or layer.like.device.type != "cpu":
            return "they have several dtypes, or are not on a CPU"
    for layer in layers[:-1]:
        if layer.out_features % LANES or layer.out_features % layer.pattern.panel:
            return f"{layer.out_features} rows are no whole number of tiles and panels"
    return ""


def _joined(layers: tuple[PackedLinear, ...]) -> PackedLinear:
    """One layer with the rows of several, whose buffers and biases become parts of its own."""
    first = layers[0]
    with torch.inference_mode(False), torch.no_grad():
        whole = copy.copy(first)
        whole._buffers = {
            name: torch.cat([layer.get_buffer(name) for layer in layers]) for name in first._buffers
        }
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        whole._parameters = {
            "bias": nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        }
        whole._modules, whole.computed_with = {}, None
        rows = sum(layer.out_features for layer in layers)
        whole._describe(Shape.of(rows, first.in_features, first.pattern), first.stored)
        for name, buffer in whole._buffers.items():
            parts = buffer.split([len(layer.get_buffer(name)) for layer in layers])  # pyright: ignore[reportOptionalMemberAccess]
            for layer, part in zip(layers, parts, strict=True):
                layer._buffers[name] = part
        bias = whole._parameters["bias"]
        if bias is not None:
            parts = bias.data.split([layer.out_features for layer in layers])
            for layer, part in zip(layers, parts, strict=True):
                layer._parameters["bias"].data = part  # pyright: ignore[reportOptionalMemberAccess]
    return whole
