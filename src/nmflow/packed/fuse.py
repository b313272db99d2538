"""Let a packed layer apply the activation after it, if a run shows no other reader."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmflow.packed.alone import alike, random_input, run_alone, takes_one
from nmflow.packed.modules import PackedLinear


class Fused(nn.Module):
    """Replaces an activation that the packed layer before it applies; returns its input."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x


# Activations of transformers by the names of their classes, whose forward has no settings.
_OF_TRANSFORMERS = {"NewGELUActivation": 4, "FastGELUActivation": 4, "SiLUActivation": 3}
_OF_TRANSFORMERS |= {"PytorchGELUTanh": 4, "GELUTanh": 4}


def epilogue_of(module: nn.Module) -> int:
    """The number of the kernels' epilogue that an activation is, of `reference.EPILOGUES`."""
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return 0
    if type(module) is nn.GELU:
        return 4 if module.approximate == "tanh" else 1
    if type(module) in (nn.ReLU, nn.SiLU):
        return 2 if type(module) is nn.ReLU else 3
    if type(module).__module__ != "transformers.activations":
        return 0
    if type(module).__name__ == "GELUActivation":
        return 1 if getattr(module, "act", None) is F.gelu else 0
    return _OF_TRANSFORMERS.get(type(module).__name__, 0)


def fuse(model: nn.Module) -> list[str]:
    """Fuse activations into the packed layers before them, in place.

    A parent that holds both runs once, alone, on a random input. The two are fused if each ran
    once, if the activation read the layer's very output and no other op did, and if the parent then
    gives the same output. Layers that the model holds twice are left alone, and so are parents with
    hooks, which must not see random inputs.

    Returns:
        The paths of the layers that now apply their activation.
    """
    done = []
    places = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    for path, parent in list(model.named_modules()):
        if any(m._forward_hooks or m._forward_pre_hooks for m in parent.modules()):
            continue
        layers = {
            n: m
            for n, m in parent.named_children()
            if isinstance(m, PackedLinear) and places[m] == 1
        }
        activations = {n: m for n, m in parent.named_children() if epilogue_of(m)}
        for name, layer in layers.items():
            if layer.epilogue or not activations:
                continue
            found = _follows(parent, layer, activations)
            if found is not None and _fused(parent, layer, found, activations[found]):
                del activations[found]
                done.append(f"{path}.{name}" if path else name)
    return done


def _fused(parent: nn.Module, layer: PackedLinear, name: str, activation: nn.Module) -> bool:
    """Fuse the two, and undo it if that changes the parent's output."""
    x = random_input(layer)
    before = run_alone(parent, x)
    layer.epilogue = epilogue_of(activation)
    setattr(parent, name, Fused(activation))
    after = run_alone(parent, x)
    if before is not None and after is not None and alike(before, after):
        return True
    layer.epilogue = 0
    setattr(parent, name, activation)
    return False


class _Watch(TorchDispatchMode):
    """Notes which ops read a layer's output, and which activation was running then."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None
        self.calls = 0
        self.running: str | None = None
        self.entered: list[str] = []
        self.readers: list[str | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(leaf is self.output for leaf in tree_leaves((args, kwargs)) if leaf is not None):
            self.readers.append(self.running)
        return func(*args, **(kwargs or {}))


def _follows(
    parent: nn.Module, layer: PackedLinear, activations: dict[str, nn.Module]
) -> str | None:
    """The name of the activation that reads the layer's output, if nothing else does."""
    if not takes_one(parent):
        return None
    watch = _Watch()

    def ran(module: nn.Module, args: Any, output: Tensor) -> None:
        watch.output, watch.calls = output, watch.calls + 1

    handles = [layer.register_forward_hook(ran)]
    for name, module in activations.items():
        handles += _watched(watch, name, module)
    try:
        with watch:
            result = run_alone(parent, random_input(layer))
    finally:
        for handle in handles:
            handle.remove()
    if result is None:
        return None
    escapes = any(leaf is watch.output for leaf in tree_leaves(result))
    readers = set(watch.readers)  # an activation of several ops reads it several times
    if watch.calls != 1 or len(readers) != 1 or escapes:
        return None
    name = readers.pop()
    return name if name is not None and watch.entered.count(name) == 1 else None


def _watched(watch: _Watch, name: str, module: nn.Module) -> list[Any]:
    def enter(module: nn.Module, args: Any) -> None:
        watch.running = name
        watch.entered.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.running = None

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
