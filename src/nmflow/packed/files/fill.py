"""Put a saved network into a dense architecture, one layer at a time, also into one on `meta`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nmflow.errors import CompressError, FileFormatError
from nmflow.packed import build
from nmflow.packed.bfloat16 import with_bfloat16
from nmflow.packed.files.architecture import built_again
from nmflow.packed.files.stored import Stored
from nmflow.packed.int8 import with_int8

Places = list[tuple[nn.Module, str]]
Values = dict[tuple[nn.Module, str], Tensor]
# Where the tensor of a name of the model is in the file, and who holds it in the model.
Slots = Mapping[str, tuple[str, Places]]


def fill(
    model: nn.Module, slots: Slots, sites: Mapping[str, Mapping[str, str]],
    weights: dict[str, Stored], tensors: Mapping[str, Tensor],
) -> tuple[Values, dict[nn.Module, nn.Module]]:  # fmt: skip
    """What goes where; the model is not touched.

    Args:
        model: the dense architecture.
        slots: name in the model to its name in the file and its places.
        sites: path of a module to pack, to its own names of weights, to their names in the file.
        weights: emptied during the call, so that no weight is held twice.
        tensors: the other tensors of the file.

    Returns:
        The tensor of every (module, own name) outside of packed modules, and the packed module of
        every module that gets one.

    Raises:
        FileFormatError: a weight cannot be packed again.
        CompressError: the model holds tensors on `meta` that no file has.
    """
    modules = dict(model.named_modules())
    packed = {holder(modules[site], own) for site, owns in sites.items() for own in owns}
    left = _left_on_meta(model, {place for _, places in slots.values() for place in places})
    uses = Counter(key for key, _ in slots.values())
    made: dict[str, nn.Parameter] = {}
    at: Values = {}

    def take(key: str) -> Stored:
        uses[key] -= 1
        return weights[key] if uses[key] else weights.pop(key)

    for key, places in slots.values():
        if not packed.isdisjoint(places):
            continue
        value = take(key).dense() if key in weights else tensors[key]
        value = value.to(home(*places[0]))
        old = places[0][0]._parameters.get(places[0][1])
        if old is not None:  # tensors that the file shares are shared here, too
            value = made.setdefault(key, nn.Parameter(value, old.requires_grad))
        at.update(dict.fromkeys(places, value))
    new: dict[nn.Module, nn.Module] = {}
    try:
        for site, owns in sites.items():
            module = modules[site]
            stored = {own: take(key) for own, key in owns.items()}
            new[module] = packed_module(module, stored, at).to(home(module, next(iter(owns))))
    except CompressError as error:
        raise FileFormatError(f"the saved network cannot be packed again: {error}") from error
    return {**at, **_rebuilt(model, left)}, new


def home(module: nn.Module, own: str) -> torch.device:
    """The device of the weight of a name, and of the one that replaces it; not `meta`."""
    module, name = holder(module, own)
    held = module._parameters.get(name)
    held = module._buffers[name] if held is None else held
    assert held is not None
    return torch.device("cpu") if held.is_meta else held.device


def holder(module: nn.Module, own: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor of a module's, and its name there: `out_proj.weight`."""
    path, _, name = own.rpartition(".")
    return module.get_submodule(path), name


def packed_module(module: nn.Module, stored: dict[str, Stored], at: Values) -> nn.Module:
    """The packed module of one site; only an attention's weights become dense on the way.

    Args:
        module: the dense module, whose weights are not read.
        stored: its weights by their names in it; emptied.
        at: its other parameters.
    """
    if not isinstance(module, nn.MultiheadAttention):
        weight = stored.pop("weight")
        bias = _parameter(at.get((module, "bias")))
        made = build.from_parts(module, weight.parts, bias, weight.activations, weight.dtype)
        return made.train(module.training)
    found = {own: weight.runs for own, weight in stored.items()}
    eight = [weight for weight in stored.values() if weight.is_int8]
    half = [weight for weight in stored.values() if weight.is_bfloat16]
    rounded = [*eight, *half]
    dtype = torch.float32 if rounded else None  # in which rounded values are exact, and come back
    values = dict(at)
    for own in found:
        values[holder(module, own)] = nn.Parameter(stored.pop(own).dense(dtype))
    packed = build.pack(_shell(module, values), found)
    if not rounded:
        return packed
    made = with_int8(packed, eight[0].activations) if eight else with_bfloat16(packed)
    return made.to(rounded[0].dtype)


def _shell(module: nn.Module, at: Mapping[tuple[nn.Module, str], Tensor]) -> nn.Module:
    """A shallow copy of a module that holds the loaded parameters; the module is left alone."""
    shell = copy.copy(module)
    shell._parameters = {own: _parameter(at.get((module, own))) for own in module._parameters}
    shell._modules = {n: m and _shell(m, at) for n, m in module._modules.items()}
    return shell


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return value if isinstance(value, nn.Parameter) else None


# Tensors that no state dict has (position ids, frequencies, masks) and that the file lacks, too.


def _left_on_meta(model: nn.Module, filled: set[tuple[nn.Module, str]]) -> dict[str, Places]:
    """Paths of modules to the (module, name) of tensors on `meta` that a file does not fill."""
    left: dict[str, Places] = {}
    for path, module in model.named_modules():
        named = {**module.__dict__, **module._parameters, **module._buffers}
        for name, value in named.items():
            if isinstance(value, Tensor) and value.is_meta and (module, name) not in filled:
                left.setdefault(path, []).append((module, name))
    return left


def _rebuilt(model: nn.Module, left: dict[str, Places]) -> Values:
    """Tensors that the constructors of the modules make, which take nothing but a config.

    Raises:
        CompressError: some have no such constructor above them.
    """
    found: Values = {}
    if not left:
        return found
    for path, module in model.named_modules():  # parents first
        inside = {p: places for p, places in left.items() if _is_under(p, path)}
        if inside and (twin := built_again(module)) is not None:
            for p, places in inside.items():
                values = _of_twin(twin, p[len(path) :].removeprefix("."), places)
                if values is not None:
                    found |= values
                    del left[p]
    if left:
        names = [f"{p}.{name}" if p else name for p, places in left.items() for _, name in places]
        raise CompressError(
            f"{', '.join(names[:5])} of the model {'is' if len(names) == 1 else 'are'} on meta and "
            "in no saved network: build the model on the CPU (nothing of it is kept)"
        )
    return found


def _is_under(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(f"{parent}.")


def _of_twin(twin: nn.Module, path: str, places: Places) -> Values | None:
    """The tensors of a module rebuilt, if it is the same class and they have the same shapes."""
    try:
        again = twin.get_submodule(path)
    except AttributeError:
        return None
    values: Values = {}
    for module, name in places:
        value, old = getattr(again, name, None), getattr(module, name)
        if type(again) is not type(module) or not isinstance(value, Tensor):
            return None
        if value.is_meta or value.shape != old.shape:
            return None
        values[module, name] = value.detach().to(old.dtype)
    return values
