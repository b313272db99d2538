"""Find packed layers that can be computed together, and join them where that is faster."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmflow.packed.alone import alike, random_input, run_alone, takes_one
from nmflow.packed.blocks import Chain, Siblings, has_hooks, unwatch, why_apart
from nmflow.packed.measure import time_ways
from nmflow.packed.modules import PackedLinear
from nmflow.select.role_names import K, Q, V

_MOST_LAYERS = 16  # of a parent that is run alone: a block, not a network


def join(model: nn.Module, counts: Sequence[int] = ()) -> list[tuple[str, ...]]:
    """Join feed-forward blocks, and q, k and v of self-attention, in place.

    A feed-forward block is found by running a module that holds its layers once, alone, on a random
    input: nothing but the last layer may read what the others give, and the module must give the
    same output then. q, k and v are layers of one module that are called so.

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

    def keep(block: Chain | Siblings, calls: Callable[[Tensor], object]) -> bool:
        kinds = tuple((type(m), m.rounding, m.dims, m.epilogue) for m in block.layers)
        key = type(block), kinds
        if key not in known:
            known[key] = not counts or _is_faster(block, calls, counts)
        if known[key]:
            done.append(tuple(paths[m] for m in block.layers))
        else:
            _set(block, None)
        return known[key]

    for parent in reversed(list(model.modules())):  # blocks come before what holds them
        for chain in _chains(parent, paths):
            if not keep(chain, _chain_calls(chain)):
                unwatch(parent, chain)
    for parent in model.modules():
        found = _q_k_v(parent, paths)
        if found and not why_apart(found):
            siblings = Siblings(found)
            _set(siblings, siblings)
            keep(siblings, lambda x, layers=found: [layer(x) for layer in layers])
    return done


def _set(block: Chain | Siblings, to: Chain | Siblings | None) -> None:
    for layer in block.layers:
        layer.computed_with = to


def _chain_calls(chain: Chain) -> Callable[[Tensor], object]:
    """The calls of the modules as their parent makes them."""
    first, *others = chain.firsts

    def calls(x: Tensor) -> object:
        h = first(x)
        for other in others:
            h = h * other(x)
        return chain.last(h)

    return calls


def _is_faster(
    block: Chain | Siblings, calls: Callable[[Tensor], object], counts: Sequence[int]
) -> bool:
    gain = 1.0
    for tokens in counts:
        layer = block.layers[0]
        x = torch.randn(tokens, layer.in_features, generator=torch.Generator().manual_seed(0))
        x = x.to(layer.like)

        def apart(x: Tensor = x) -> None:
            _set(block, None)
            calls(x)

        def together(x: Tensor = x) -> None:
            _set(block, block)
            with block.opened() if isinstance(block, Chain) else contextlib.nullcontext():
                calls(x)

        with torch.no_grad():
            took = time_ways({"apart": apart, "together": together}, 0.02)
        gain *= took["apart"].median / took["together"].median
    _set(block, block)
    return math.log(gain) > 0


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


def _chains(parent: nn.Module, paths: dict[PackedLinear, str]) -> list[Chain]:
    """The feed-forward blocks that a run of a module shows, joined."""
    layers = [m for m in parent.modules() if m in paths and m.computed_with is None]
    if not 2 <= len(layers) <= _MOST_LAYERS or not takes_one(parent):
        return []
    # What somebody hung in is not run behind his back.
    if any(has_hooks(m) or "forward" in vars(m) for m in parent.modules()):
        return []
    widths = {m.in_features for m in layers}  # pyright: ignore[reportAttributeAccessIssue]
    starts = [m for m in layers if m.out_features in widths]  # pyright: ignore[reportAttributeAccessIssue]
    if not starts:
        return []
    x = random_input(starts[0])  # pyright: ignore[reportArgumentType]
    watch = _Watch(parent, layers)  # pyright: ignore[reportArgumentType]
    before = watch.run(x)
    if before is None:
        return []
    joined = []
    for chain in watch.chains():
        _set(chain, chain)
        chain.watch(parent)
        after = run_alone(parent, x)
        if after is not None and alike(before, after):
            joined.append(chain)
        else:
            _set(chain, None)
            unwatch(parent, chain)
    return joined


class _Watch(TorchDispatchMode):
    """Notes what each layer reads and gives, and every op that reads what one gave."""

    def __init__(self, parent: nn.Module, layers: list[PackedLinear]) -> None:
        super().__init__()
        self.parent = parent
        self.layer_of = {
            id(buffer): layer for layer in layers for buffer in layer._buffers.values()
        }
        self.layers = layers
        self.read: dict[PackedLinear, list[Tensor]] = {layer: [] for layer in layers}
        self.gave: dict[PackedLinear, list[Tensor]] = {layer: [] for layer in layers}
        # Of a tensor, by its id: the layer or the product that reads it, None for anything else.
        self.readers: dict[int, list[PackedLinear | Tensor | None]] = {}
        self.held: list[Any] = []  # so that no id is used twice

    def run(self, x: Tensor) -> list[Tensor] | None:
        """Run the parent, and return its output."""
        handles: list[Any] = []
        for layer in self.layers:
            handles.append(layer.register_forward_hook(self._ran))
        for module in self.parent.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                handles.append(module.register_forward_pre_hook(self._dropped))
        try:
            with self:
                found = run_alone(self.parent, x)
        finally:
            for handle in handles:
                handle.remove()
        for leaf in found or ():
            self.readers.setdefault(id(leaf), []).append(None)
        return found

    def _ran(self, layer: Any, args: Any, output: Tensor) -> None:
        self.read[layer].append(args[0] if len(args) == 1 else output)
        self.gave[layer].append(output)

    def _dropped(self, module: nn.Module, args: Any) -> None:
        """What a dropout reads is not the same in training mode."""
        self.held.append(args)
        self.readers.setdefault(id(args[0]), []).append(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.held.append((args, kwargs, result))
        ours = func.namespace == "nmflow"
        by: PackedLinear | Tensor | None = self.layer_of.get(id(args[1])) if ours else None
        if func is torch.ops.aten.mul.Tensor:
            by = result
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.readers.setdefault(id(leaf), []).append(by)
        return result

    def chains(self) -> list[Chain]:
        """The layers that were run once, and whose outputs nothing reads but one other layer."""
        found: list[Chain] = []
        used: set[PackedLinear] = set()
        gates: dict[int, list[PackedLinear]] = {}  # layers of a product, by its id
        once = [m for m in self.layers if len(self.gave[m]) == 1]
        for layer in once:
            readers = self.readers.get(id(self.gave[layer][0]), [])
            if len(readers) != 1 or readers[0] is None:
                continue
            if isinstance(readers[0], Tensor):
                gates.setdefault(id(readers[0]), []).append(layer)
            else:
                self._add(found, used, (layer,), readers[0])
        for product, layers in gates.items():
            readers = self.readers.get(product, [])
            if len(layers) != 2 or self.read[layers[0]][0] is not self.read[layers[1]][0]:
                continue
            if len(readers) == 1 and isinstance(readers[0], PackedLinear):
                gate_first = sorted(layers, key=lambda layer: not layer.epilogue)
                self._add(found, used, tuple(gate_first), readers[0])
        return found

    def _add(
        self, found: list[Chain], used: set[PackedLinear],
        firsts: tuple[PackedLinear, ...], last: PackedLinear,
    ) -> None:  # fmt: skip
        members = {*firsts, last}
        if used & members or len(self.gave[last]) != 1 or len(members) != len(firsts) + 1:
            return
        if any(m.computes != last.computes for m in firsts):
            return
        used |= members
        found.append(Chain(firsts, last))
