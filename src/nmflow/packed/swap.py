"""Replace dense modules by packed ones, and back, whoever holds them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

from nmflow.errors import CompressError
from nmflow.packed import references
from nmflow.packed.build import PACKED
from nmflow.packed.files.companions import is_pretrained, saves_adapters
from nmflow.packed.files.pretrained import SavePretrained
from nmflow.packed.fuse import Fused
from nmflow.packed.modules import PackedLinear

Model = TypeVar("Model", bound=nn.Module)
# Ways of transformers to save a network, which another process would load into dense classes.
_SAVES = ("save_pretrained", "push_to_hub")


def replace_modules(model: Model, new: dict[nn.Module, nn.Module], inplace: bool) -> Model:
    """Replace old modules by new ones, in `model` or in a deep copy of it.

    In place, an old module becomes the new one and stays the same object, so that whoever holds it
    (a list, a closure, a replaced `forward`) holds the new one. In a copy, functions that hold
    modules of the model are made anew as well.

    Raises:
        CompressError: the copy would still run modules of `model`; nothing is changed.
    """
    if inplace:
        for parent in list(model.modules()):
            for name, child in parent._modules.items():  # named_children skips repeated ones
                if isinstance(child, Fused) and child in new:
                    parent._modules[name] = new[child]
        for old, made in new.items():
            if not isinstance(old, Fused):
                old.__class__, old.__dict__ = made.__class__, made.__dict__
    else:
        model = _copied(model, new)
    for module in model.modules():
        _set_fast_path(module)
        _set_saves(module)
    return model


@contextlib.contextmanager
def undone(model: nn.Module, new: Iterable[nn.Module]) -> Iterator[None]:
    """Where the block raises, put back a model whose modules `new` it replaced in place.

    With the fusions and the joined layers that the block made.
    """
    were = [(module, module.__class__, module.__dict__) for module in new]
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    held = [(layer, layer.epilogue, layer.computed_with) for layer in packed]
    children = [(m, dict(m._modules)) for m in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, own in were:
            module.__class__, module.__dict__ = kind, own
        for module, own in children:
            module._modules.update(own)
        for layer, epilogue, joined in held:
            layer.epilogue, layer.computed_with = epilogue, joined
        for module in model.modules():
            _set_fast_path(module)
            _set_saves(module)
        raise


def _copied(model: Model, new: dict[nn.Module, nn.Module]) -> Model:
    """A deep copy of a model with new modules instead of old ones."""
    for name, module in model.named_modules():
        if (held := references.outside(type(module).forward, new)) is not None:
            raise CompressError(
                f"forward of {name or 'the model'} ({type(module).__name__}) takes a layer "
                f"({held}) from outside of the module, so a copy would run the old one: pass "
                "inplace=True"
            )
    # Old modules count as copied already, so their dense weights are never copied.
    # One memo for all, so that what was tied stays tied.
    memo: dict[int, Any] = {}
    for old, made in new.items():
        memo[id(old)] = copy.deepcopy(made, memo)
    references.renew(references.inside(model), memo)
    try:
        made = copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        # A tensor that the forward pass computes and keeps (the old weight_norm), a lock, a handle.
        raise CompressError(
            f"model cannot be copied ({_first(error)}): pass inplace=True"
        ) from error
    was = set(model.modules())
    for name, module in made.named_modules():
        own = module.__dict__.get("forward")
        if own is not None and references.reaches(own, was):
            raise CompressError(
                f"forward of {name or 'the model'} was replaced on the instance by something that "
                "holds the old network, so a copy would run that: pass inplace=True, or remove it "
                "first (del model.forward)"
            )
    return made


def _first(error: Exception) -> str:
    """The first sentence of another package's error."""
    return str(error).partition(". ")[0].strip().rstrip(".")


def _set_fast_path(module: nn.Module) -> None:
    """Keep `nn.TransformerEncoder` from its fused path, which reads dense weights directly."""
    for kind, flag in (
        (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
        (nn.TransformerEncoder, "use_nested_tensor"),
    ):
        if isinstance(module, kind):
            packed = _holds_packed(module)
            if packed and not hasattr(module, "nmflow_fast_path"):
                module.nmflow_fast_path = getattr(module, flag)
                setattr(module, flag, 0)
            elif not packed and hasattr(module, "nmflow_fast_path"):
                setattr(module, flag, module.nmflow_fast_path)
                del module.nmflow_fast_path


class Refusal:
    """Replaces a method that must not be used on a packed network."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raise `CompressError`."""
        raise CompressError(
            f"{self.name} writes packed layers that no dense class can load: save the network with "
            f"nmflow.save(model, folder), or call nmflow.decompress(model).{self.name}(...)"
        )


def _set_saves(module: nn.Module) -> None:
    """Save packed networks of transformers packed; refuse ways that would give random weights."""
    if any(cls.__module__.startswith("sentence_transformers.") for cls in type(module).__mro__):
        return  # it calls `save_pretrained` of the network inside
    methods = [name for name in _SAVES if callable(getattr(type(module), name, None))]
    if not methods:
        return
    packed = _holds_packed(module)
    if is_pretrained(module):
        if packed:
            module.__dict__.setdefault("save_pretrained", SavePretrained(module))
        elif isinstance(module.__dict__.get("save_pretrained"), SavePretrained):
            del module.__dict__["save_pretrained"]
        return
    if saves_adapters(module):  # what it trains beside adapters is whole copies of modules
        inside = [m for path, m in module.named_modules() if ".modules_to_save." in path]
        packed = any(isinstance(m, PACKED) for m in inside)
    for name in methods:
        if packed and name not in module.__dict__:
            module.__dict__[name] = Refusal(name)
        elif not packed and isinstance(module.__dict__.get(name), Refusal):
            del module.__dict__[name]


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(child, PACKED) for child in module.modules())
