"""The weights of a model or of a saved state: where their groups run, what they do, why not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nmflow.select.roles import attention_owners, clean, cut, role_of

_RNN = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
_MHA = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Names under which a bare state holds weights of HF's Conv1D, which are stored (in, out).
_HF_CONV1D = {"c_attn", "c_fc", "c_proj", "q_attn"}


class Part(NamedTuple):
    """Output rows `start` to `stop` of a weight, and what they do."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layer:
    """A weight of at least two dimensions.

    Attributes:
        name: the parameter's name.
        shape: its shape; of a sharded one, the global shape.
        dim: the axis along which its groups run.
        parts: its output rows by role.
        paths: every text that a glob may match: names and module paths.
        why_not: why it cannot be grouped; empty if it can.
        frozen: whether no gradient reaches it.
        note: a remark for the plan's table.
    """

    name: str
    shape: tuple[int, ...]
    dim: int = 1
    parts: tuple[Part, ...] = ()
    paths: tuple[str, ...] = ()
    why_not: str = ""
    frozen: bool = False
    note: str = ""

    @property
    def out(self) -> int:
        """The number of output rows."""
        return self.shape[0 if self.dim else 1] if self.shape else 0


@dataclass
class _Owner:
    """A module that holds a parameter, under one of its names."""

    name: str
    path: str
    module: nn.Module
    holder: nn.Module | None
    own: str = field(default="")


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, without importing transformers."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def axis(module: nn.Module, own: str, ndim: int) -> tuple[int, str]:
    """The grouped axis of the parameter `own` of a module, or why it has none.

    1 (inputs) for Linear, convolutions, attention, recurrent layers and embeddings; 0 for HF's
    `Conv1D`, stored (in, out), and for transposed convolutions, stored (in, out, …).
    """
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) and own in _MHA:
        return 1, ""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and _RNN.fullmatch(own):
        return 1, ""
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return 1, "parametrized: the network computes with a function of it"
    known = isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag, *_CONV, *_TRANSPOSED))
    if not known and not is_hf_conv1d(module):
        return 1, f"a parameter of {kind}, which is no layer that nmflow can group"
    if own != "weight":
        return 1, f"{own!r} is not the weight that {kind} multiplies with"
    if isinstance(module, _TRANSPOSED):
        if module.groups > 1:
            return (
                0,
                "a grouped transposed convolution: its groups would span several inputs' groups",
            )
        return 0, ""
    if isinstance(module, _CONV) and module.groups > 1 and module.groups == module.in_channels:
        return 1, "a depthwise convolution: one input channel for each output"
    if is_hf_conv1d(module):
        return 0, ""
    return 1, "" if ndim >= 2 else "fewer than two dimensions"


def layers_of(model: nn.Module) -> list[Layer]:
    """Every parameter of at least two dimensions, tied ones once, in the order of the model.

    The output head, where no module is one by name, is the last `nn.Linear` of the model, provided
    that its name gives it no other role, or that it lies directly in a model without attention
    (a plain `fc1`, `fc2`, `fc3`), and that it is not the only weight.
    """
    owners = _owners(model)
    seen: list[tuple[Layer, list[_Owner]]] = []
    attention = attention_owners(p for group in owners.values() for o in group for p in _paths(o))
    for name, parameter in model.named_parameters():
        held = owners[id(parameter)]
        if is_lazy(parameter):
            text = "not initialized yet: run one batch through the model first"
            seen.append((Layer(name, (), paths=_globs(held), why_not=text), held))
        elif parameter.ndim >= 2:
            seen.append((_layer(name, parameter, held, attention), held))
    layers = [layer for layer, _ in seen]
    linear = [isinstance(held[0].module, nn.Linear) for _, held in seen]
    return _with_head(layers, linear, bool(attention))


def layers_of_state(state: Mapping[str, torch.Size | tuple[int, ...]]) -> list[Layer]:
    """The same of a bare state, from names and shapes alone: no module says what a weight is.

    Weights called `c_attn`, `c_fc`, `c_proj` or `q_attn` are taken as HF's `Conv1D`, stored
    (in, out), unless the shape of a fused `c_attn` or of a `c_fc` in the state says otherwise.
    """
    names = [n for n in state if len(state[n]) >= 2]
    names.sort(key=lambda n: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", n)])
    attention = attention_owners(p for n in names for p in (clean(n), clean(_path(n))))
    stored_in_out = _stored_in_out(state)
    layers = []
    for name in names:
        shape = tuple(state[name])
        path, _, own = name.rpartition(".")
        dim = 0 if path.rpartition(".")[2] in _HF_CONV1D and stored_in_out else 1
        why = "" if own == "weight" or own in _MHA or _RNN.fullmatch(own) else "not called 'weight'"
        where = clean(path if own == "weight" else name)
        role = role_of(where, len(shape), _owner_of(where) in attention)
        length, out = shape[dim], shape[0 if dim else 1]
        parts = tuple(Part(*part) for part in cut(where, role, out, length))
        paths = tuple(dict.fromkeys((name, path, clean(name), clean(path))))
        layers.append(Layer(name, shape, dim, parts, paths, why))
    return _with_head(layers, [len(x.shape) == 2 for x in layers], bool(attention))


def _layer(name: str, parameter: nn.Parameter, held: list[_Owner], attention: set[str]) -> Layer:
    axes = [axis(o.module, o.own, parameter.ndim) for o in held]
    dim, why_not = axes[0]
    if len({d for d, why in axes if not why}) > 1:
        why_not = f"tied to {held[1].name}, which groups along another axis"
    elif any(why for _, why in axes):
        why_not = next(why for _, why in axes if why)
    if not parameter.is_floating_point():
        why_not = f"of dtype {parameter.dtype}, which is not floating point"
    shape = tuple(parameter.shape)
    roles = []
    for owner in held:
        where = _paths(owner)[0]
        if isinstance(owner.module, nn.Embedding | nn.EmbeddingBag):
            spoken = role_of(where, len(shape))
            roles.append("position" if spoken == "position" else "embedding")
        else:
            roles.append(role_of(where, len(shape), _owner_of(where) in attention))
    # A weight tied to an embedding or a head is one, whatever its first name is.
    role = next((r for r in ("position", "embedding", "head") if r in roles), roles[0])
    holder = type(held[0].holder).__name__
    out, length = shape[0 if dim else 1], shape[dim]
    parts = tuple(Part(*part) for part in cut(_paths(held[0])[0], role, out, length, holder))
    note = f"tied with {', '.join(o.name for o in held[1:])}" if len(held) > 1 else ""
    return Layer(name, shape, dim, parts, _globs(held), why_not, not parameter.requires_grad, note)


def _with_head(layers: list[Layer], linear: list[bool], attention: bool) -> list[Layer]:
    usable = [i for i, layer in enumerate(layers) if not layer.why_not]
    if any(part.role == "head" for i in usable for part in layers[i].parts):
        return layers
    last = max((i for i in usable if linear[i]), default=None)
    candidates = [i for i in usable if layers[i].parts[0].role not in ("embedding", "position")]
    if last is None or len(candidates) < 2:
        return layers
    layer = layers[last]
    flat = min(path.count(".") for path in layer.paths) == 0
    if layer.parts[0].role == "other" or (flat and not attention and layer.parts[0].role == "ff"):
        layers[last] = replace(layer, parts=(Part("head", 0, layer.out),))
    return layers


def _owners(model: nn.Module) -> dict[int, list[_Owner]]:
    owners: dict[int, list[_Owner]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            holder = modules.get(path.rpartition(".")[0])
            owners.setdefault(id(parameter), []).append(_Owner(name, path, module, holder, own))
    return owners


def _paths(owner: _Owner) -> tuple[str, str]:
    """Where roles are read: the module's path, or the parameter's if the module owns several."""
    several = isinstance(owner.module, nn.MultiheadAttention)
    return clean(owner.name if several else owner.path), clean(owner.path)


def _globs(held: Iterable[_Owner]) -> tuple[str, ...]:
    texts = [t for o in held for t in (o.name, o.path, clean(o.name), clean(o.path))]
    return tuple(dict.fromkeys(texts))


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _owner_of(path: str) -> str:
    return path.rpartition(".")[0]


def _stored_in_out(state: Mapping[str, torch.Size | tuple[int, ...]]) -> bool:
    """Whether GPT-2's names stand for (in, out): a fused or widening weight tells by its shape."""
    for name, shape in state.items():
        telling = name.endswith((".c_attn.weight", ".c_fc.weight")) and len(shape) == 2
        if telling and shape[0] != shape[1]:
            return shape[0] < shape[1]
    return True
