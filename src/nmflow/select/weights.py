"""The weights of a model: the axis of their groups, their roles, and why some have no groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from nmflow.select.fused import cut
from nmflow.select.heads import told_heads, with_head
from nmflow.select.layer import Layer, Part
from nmflow.select.roles import clean, owners, role_of
from nmflow.select.stacks import UNTOLD, Stack, experts_of, stack_of
from nmflow.select.target import out_dim

RNN = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
MHA = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# timm's StdConv2d and ScaledStdConv2d, BiT's WeightStandardizedConv2d.
_STANDARDIZED = re.compile(r"StdConv|Standardi[sz]ed")
_NEAR = 3  # how many enclosing modules may give a weight its role


@dataclass
class _Owner:
    """A module that holds a parameter, under one of its names."""

    name: str
    path: str
    module: nn.Module
    holder: nn.Module | None
    own: str = ""
    kinds: tuple[str, ...] = ()
    experts: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters of its module."""
        own = self.module.named_parameters(recurse=False)
        return {name: () if is_lazy(p) else tuple(p.shape) for name, p in own}


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, without importing transformers."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def axis(
    module: nn.Module,
    own: str,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> Stack:
    """The grouped axis of parameter `own` of a module, or why it has none.

    1 (inputs) for Linear, convolutions, attention, recurrent layers and embeddings; 0 for HF's
    `Conv1D`, stored (in, out), and for transposed convolutions, stored (in, out, …); for experts
    that are kept as one parameter see `stack_of`.
    """
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) and own in MHA:
        return Stack()
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and RNN.fullmatch(own):
        return Stack()
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return Stack(why_not="parametrized: the network computes with a function of it")
    known = isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag, *_CONV, *_TRANSPOSED))
    if not known and not is_hf_conv1d(module):
        no = f"a parameter of {kind}, which is not a layer that nmflow can group"
        return stack_of(module, own, shapes, config) or Stack(why_not=no)
    if own != "weight":
        return Stack(why_not=f"{own!r} is not the weight that {kind} multiplies with")
    if _STANDARDIZED.search(kind):
        return Stack(why_not=f"{kind} standardizes it: the network computes with a function of it")
    if isinstance(module, _TRANSPOSED):
        if module.groups > 1:
            no = "a grouped transposed convolution: its groups would span several inputs' groups"
            return Stack(0, why_not=no)
        return Stack(0)
    if isinstance(module, _CONV) and is_depthwise(module):
        return Stack(why_not="a depthwise convolution: one input channel for each output")
    return Stack(0 if is_hf_conv1d(module) else 1)


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output of a convolution reads one input channel."""
    return isinstance(module, _CONV) and 1 < module.groups == module.in_channels


def layers_of(model: nn.Module) -> list[Layer]:
    """Every parameter of at least two dimensions, tied ones once, in the order of the model.

    If no module is an output head by name and the model names none, the head is the model's last
    `nn.Linear`. It must not be part of a block that repeats, nor the only weight. And its name must
    give it no other role, unless it lies directly in a model without attention (a plain `fc1`,
    `fc2`, `fc3`).
    """
    held_by = _owners(model)
    beside = owners(p for group in held_by.values() for o in group for p in _paths(o))
    told = told_heads(model)
    channels = _channels(model)
    layers: list[Layer] = []
    linear: list[bool] = []
    found = False
    for name, parameter in model.named_parameters():
        held = held_by[id(parameter)]
        if is_lazy(parameter):
            text = "not initialized yet: run one batch through the model first"
            layers.append(Layer(name, (), paths=_globs(held), why_not=text))
        elif parameter.ndim >= 2:
            shape = tuple(parameter.shape)
            axes = [axis(o.module, o.own, o.shapes, o.config) for o in held]
            roles = [_role(o, shape, a, beside) for o, a in zip(held, axes, strict=True)]
            # A head that is tied to an embedding counts as a head, though presets treat both alike.
            found = found or "head" in roles or id(parameter) in told
            if id(parameter) in told:
                roles.append("head")
            elif reads_input(held[0].module, channels):
                roles.append("stem")
            layers.append(_layer(name, parameter, held, axes, roles))
        else:
            continue
        linear.append(isinstance(held[0].module, nn.Linear))
    return with_head(layers, linear, "attn" in beside.values(), found)


def reads_input(module: nn.Module, channels: set[int]) -> bool:
    """Whether a convolution reads an image or a sound, by its channels."""
    return isinstance(module, _CONV) and module.groups == 1 and module.in_channels in channels


def _channels(model: nn.Module) -> set[int]:
    """The channels of raw inputs: grey images, colour images, and those in configs."""
    found = {1, 3}
    for module in model.modules():
        for name in ("num_channels", "in_channels"):
            value = _config(module).get(name)
            found |= {value} if isinstance(value, int) and value <= 16 else set()
    return found


def _role(owner: _Owner, shape: tuple[int, ...], at: Stack, beside: Mapping[str, str]) -> str:
    where = _paths(owner)[0]
    if isinstance(owner.module, nn.Embedding | nn.EmbeddingBag):
        return "position" if role_of(where, shape) == "position" else "embedding"
    if at.stacked or is_hf_conv1d(owner.module):
        shape = (shape[out_dim(at.dim, at.stacked)], shape[at.dim])
    elif not isinstance(owner.module, (*_CONV, *_TRANSPOSED)) and not at.why_not:
        shape = shape[:2]  # attention's own, (model, heads, size)
    around = beside.get(path_of(where), "")
    return role_of(where, shape, around, owner.kinds, owner.experts)


def _layer(
    name: str, parameter: nn.Parameter, held: list[_Owner], axes: list[Stack], roles: list[str]
) -> Layer:
    at = axes[0]
    why_not = next((a.why_not for a in axes if a.why_not), "")
    if len({a.dim for a in axes if not a.why_not}) > 1:
        why_not = f"tied to {held[1].name}, which groups along another axis"
    if not parameter.is_floating_point():
        why_not = f"of dtype {parameter.dtype}, which is not floating point"
    shape = tuple(parameter.shape)
    # A weight tied to an embedding or a head has that role, whatever its first name is.
    telling = ("position", "embedding", "head", "stem")
    role = next((r for r in telling if r in roles), roles[0])
    holder, out, length = held[0].holder, shape[out_dim(at.dim, at.stacked)], shape[at.dim]
    cuts = cut(_paths(held[0])[0], role, out, length, type(holder).__name__, heads_of(holder))
    notes = [f"tied with {', '.join(o.name for o in held[1:])}"] if len(held) > 1 else []
    notes += [f"{shape[0]} matrices"] if at.stacked else []
    return Layer(
        name, shape, at.dim, tuple(Part(*part) for part in cuts), _globs(held), why_not,
        not parameter.requires_grad, "; ".join(notes), at.stacked, at.unit,
        _is_matrix(held[0], shape, at, role),
    )  # fmt: skip


def _is_matrix(owner: _Owner, shape: tuple[int, ...], at: Stack, role: str) -> bool:
    module = owner.module
    if is_depthwise(module) or owner.own.endswith("bias"):
        return False
    layer = isinstance(module, (nn.Linear, *_CONV, *_TRANSPOSED)) or is_hf_conv1d(module)
    stack = not layer and (not at.why_not or at.why_not == UNTOLD)
    return layer or stack or (role != "other" and len(shape) == 2 and min(shape) > 1)


def _config(module: nn.Module | None) -> dict[str, Any]:
    """The stored fields of a module's configuration, without computed properties."""
    config = getattr(module, "config", None)
    return getattr(config, "__dict__", {})


def heads_of(holder: nn.Module | None) -> tuple[int, int, int]:
    """Query heads, key heads and the size of a head, by attention's attributes; 0 if unknown."""

    def number(*names: str) -> int:
        values = [getattr(holder, "__dict__", {}).get(name) for name in names]
        values += [_config(holder).get(name) for name in names]
        return next((v for v in values if isinstance(v, int) and v > 0), 0)

    queries = number("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
    keys = number("num_key_value_heads", "num_kv_heads", "kv_n_heads") or queries
    size = number("head_dim", "head_size", "dim_head")
    return queries, keys, size or number("dim_out", "embed_dim") // max(1, queries)


def _owners(model: nn.Module) -> dict[int, list[_Owner]]:
    found: dict[int, list[_Owner]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            above = _above(path, modules)
            around = [module, *above]
            kinds = tuple(type(m).__name__ for m in around[: _NEAR + 1])
            experts = next(filter(None, map(experts_of, around[:3])), 0)
            config = next(filter(None, map(_config, around)), {})
            holder = above[0] if above else None
            held = _Owner(name, path, module, holder, own, kinds, experts, config)
            found.setdefault(id(parameter), []).append(held)
    return found


def _above(path: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The modules around a module, the nearest first, without lists and wrappers."""
    above = []
    while path:
        path = path_of(path)
        if not isinstance(modules[path], nn.ModuleList | nn.Sequential | nn.ModuleDict):
            above.append(modules[path])
    return above


def _paths(owner: _Owner) -> tuple[str, str]:
    """The path that gives the role: the module's, or the parameter's if the module owns several."""
    module, own = owner.module, owner.own
    several = isinstance(module, nn.MultiheadAttention) or (
        own != "weight" and not isinstance(module, (nn.Linear, nn.RNNBase, nn.RNNCellBase))
    )
    return clean(owner.name if several else owner.path), clean(owner.path)


def _globs(held: Iterable[_Owner]) -> tuple[str, ...]:
    texts = [t for o in held for t in (o.name, o.path, clean(o.name), clean(o.path))]
    return tuple(dict.fromkeys(texts))


def path_of(name: str) -> str:
    """The path of the module that owns a parameter, or of the module around a module."""
    return name.rpartition(".")[0]
