"""q, k and v of self-attention, packed, computed in one call where that is faster.

At few tokens a call costs as much as its product. The layers stay in place, with their names,
weights and biases, so files, `decompress` and exports see no difference.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.kernels.calls import is_plain_call, version_of
from nmflow.kernels.layout import LANES, Shape
from nmflow.packed.measure import time_ways
from nmflow.packed.modules import PackedLinear
from nmflow.select.role_names import K, Q, V

_PATIENCE = 2  # products of siblings in a row that nobody asks for
_LEAST_GAIN = 1.02  # of joining: two timings of the same thing differ by less


def join(model: nn.Module, counts: Sequence[int] = ()) -> list[tuple[str, ...]]:
    """Join q, k and v of self-attention, the layers of one module that are called so, in place.

    Args:
        model: on a CPU; others are left alone.
        counts: token counts at which joining must be faster, by the geometric mean of the times;
            empty joins without timing.

    Returns:
        The paths of each group's layers, in the order of their products.
    """
    places = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    paths = {
        m: path
        for path, m in model.named_modules()
        if isinstance(m, PackedLinear) and places[m] == 1 and m.like.device.type == "cpu"
    }
    known: dict[Any, bool] = {}
    done: list[tuple[str, ...]] = []
    for parent in model.modules():
        layers = _q_k_v(parent, paths)
        if not layers or why_apart(layers):
            continue
        kind = tuple((type(m), m.rounding, m.dims) for m in layers)
        if known.get(kind) is False:
            continue
        siblings = Siblings(layers)
        _set(layers, siblings)
        if kind not in known:
            known[kind] = not counts or _is_faster(siblings, counts)
        if known[kind]:
            done.append(tuple(paths[m] for m in layers))
        else:
            _set(layers, None)
    return done


def _set(layers: tuple[PackedLinear, ...], to: Siblings | None) -> None:
    for layer in layers:
        layer.computed_with = to


def _q_k_v(parent: nn.Module, paths: dict[PackedLinear, str]) -> tuple[PackedLinear, ...]:
    """The query, key and value layers of a module, if it has one each by its names."""
    found: list[PackedLinear] = []
    for names in (Q, K, V):
        called = [m for name, m in parent.named_children() if name in names]
        own = [m for m in called if isinstance(m, PackedLinear) and m in paths]
        if len(own) != 1 or own[0].computed_with is not None:
            return ()
        found += own
    return tuple(found)


def _is_faster(siblings: Siblings, counts: Sequence[int]) -> bool:
    """Race the calls that a forward pass makes, with the layers joined and apart."""
    layers = siblings.layers
    gain = 1.0
    for tokens in counts:
        x = torch.randn(
            tokens, layers[0].in_features, generator=torch.Generator().manual_seed(0)
        ).to(layers[0].like)

        def calls(to: Siblings | None, x: Tensor = x) -> None:
            _set(layers, to)
            for layer in layers:
                layer(x)

        with torch.no_grad():
            took = time_ways(
                {"apart": lambda: calls(None), "together": lambda: calls(siblings)}, 0.02
            )
        gain *= took["apart"].median / took["together"].median
    _set(layers, siblings)
    return gain > _LEAST_GAIN ** len(counts)


def _unwatched(x: Tensor, layer: PackedLinear) -> bool:
    """Whether nothing watches single products: no gradient, compiler or mode."""
    return not torch.is_grad_enabled() and is_plain_call(x, next(iter(layer._buffers.values())))  # pyright: ignore[reportArgumentType]


class Siblings:
    """Layers that multiply the same x one after the other: the first computes the rows of all.

    Their buffers become parts of one buffer, and only memory joins them. Each layer computes its
    own product if the memory is no longer shared (another dtype or device, a replaced buffer), if
    the layers no longer multiply alike, if x is not the first layer's or was written since, and if
    the others' rows are not used twice in a row, as in attention to another text.

    Args:
        layers: layers for which `why_apart` is empty.
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
        """The result of a layer's forward."""
        held = self._held
        if held is not None and held[0] is x and not torch.is_grad_enabled():
            y = held[2].pop(id(layer), None) if held[1] == version_of(x) else None
            if y is not None:
                if not held[2]:
                    self._held, self.unasked = None, 0
                return y
        if layer is not self.layers[0] or self.unasked >= _PATIENCE or not _unwatched(x, layer):
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
        """Whether the layers are still parts of the joined one, which multiplies as they would."""
        how = self.whole.how if self.whole is not None else None
        if any(layer.how != how for layer in self.layers):
            return False
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
    """Why layers cannot be joined into one, in one clause; empty if they can."""
    first = layers[0]
    for layer in layers:
        if type(layer) is not type(first) or layer.how != first.how:
            return "they multiply in different ways"
        if layer.in_features != first.in_features or layer.pattern != first.pattern:
            return "their patterns or inputs differ"
        if layer.epilogue or (layer.bias is None) != (first.bias is None):
            return "one has an activation, or a bias, and another has none"
        if layer.like.dtype != first.like.dtype or layer.like.device.type != "cpu":
            return "they have several dtypes, or are not on a CPU"
    for layer in layers[:-1]:
        if layer.out_features % LANES or layer.out_features % layer.pattern.panel:
            return f"{layer.out_features} rows are not a whole number of tiles and panels"
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
