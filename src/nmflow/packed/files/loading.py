"""`load`: what `save` wrote, into a dense architecture, once all of it has been checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nmflow.errors import CompressError, FileFormatError
from nmflow.packed import build
from nmflow.packed.build import PACKED
from nmflow.packed.files import container, place
from nmflow.packed.files.fill import Places, fill
from nmflow.packed.files.saving import Folder
from nmflow.packed.files.stored import Stored
from nmflow.packed.fuse import fuse as fuse_activations
from nmflow.packed.swap import Model, replace_modules
from nmflow.packed.together import join
from nmflow.select.modules import check_model


def load(folder: Folder, model: Model, *, fuse: bool = True) -> Model:
    """Load what `save` wrote into a dense model of the same architecture.

    Args:
        folder: what `save` wrote.
        model: the dense architecture. Its weights do not matter and may be on `meta`, which takes
            the least memory; tensors that no file has, such as position ids, are then rebuilt if
            the constructor takes only a `config`, as in transformers. Otherwise, each tensor of the
            file goes to the device of the tensor that it replaces. The model changes in place,
            after everything in the folder has been checked.
        fuse: as for `compress`.

    Returns:
        `model`, its weights replaced (with the dtypes of the file), and its modules packed where
        they were packed when saved, or packable when a dense model was saved. If the root itself
        is packed, the packed module. It is in evaluation mode: a fresh architecture is in training
        mode, where dropout would change every answer.

    Raises:
        FileFormatError: a file is missing, damaged, hostile, or does not fit the model.
        CompressError: `model` is packed already, or has tensors on `meta` that neither the file
            nor a constructor gives.
    """
    check_model(model, CompressError)
    if any(isinstance(module, PACKED) for module in model.modules()):
        raise CompressError("model is packed already: build the dense architecture anew")
    weights, tensors, aliases = container.read(folder)
    slots = _slots(model)
    source = {name: aliases.get(name, name) for name in slots}
    _same_names(list(source.values()), [*weights, *tensors], set(model.state_dict()))
    sites: dict[str, dict[str, str]] = {}
    modules = dict(model.named_modules())
    for name, slot in slots.items():
        key = source[name]
        _fits(name, weights[key] if key in weights else tensors[key], slot)
        if key in weights and weights[key].run == "packed":
            site, own = build.site_of(name, modules)
            if why := place.why_not(modules[site], own, weights[key]):
                raise FileFormatError(f"{name} is packed in the file, but in the model: {why}")
            sites.setdefault(site, {})[own] = key
    found = {name: (source[name], slot.places) for name, slot in slots.items()}
    at, new = fill(model, found, sites, weights, tensors)
    _put(at)  # only now does the model change
    made = replace_modules(model, new, inplace=True)
    if fuse:
        fuse_activations(made)
        join(made)
    return made.eval()


@dataclass
class _Slot:
    """A tensor of the model's state: what it is, and everything that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    places: Places = field(default_factory=list)


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """The tensors of the state by their first names."""
    slots: dict[str, _Slot] = {}
    first: dict[int, str] = {}
    names = set(model.state_dict())
    for path, module in model.named_modules(remove_duplicate=False):
        for own, value in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{path}.{own}" if path else own
            if value is None or name not in names:
                continue
            known = first.setdefault(id(value), name)
            slot = slots.setdefault(known, _Slot(tuple(value.shape), value.dtype))
            slot.places.append((module, own))
    return slots


def _same_names(wanted: Sequence[str], there: Sequence[str], others: set[str]) -> None:
    """Raise if the file lacks a tensor, or has one that the model does not have."""
    known, taken = set(there), {*wanted, *others}
    missing = [name for name in wanted if name not in known]
    extra = [name for name in there if name not in taken]
    if missing or extra:
        raise FileFormatError(
            f"the saved network does not match the model: it lacks {str(missing[:5])[:150]} and "
            f"also has {str(extra[:5])[:150]}, so give the architecture that was saved"
        )


def _fits(name: str, stored: Stored | Tensor, slot: _Slot) -> None:
    """Raise if a stored tensor does not have the shape of its place, or the kind of its dtype."""
    if tuple(stored.shape) != slot.shape:
        raise FileFormatError(
            f"{name} is {tuple(stored.shape)} in the file and {slot.shape} in the model: give the "
            "architecture that was saved"
        )
    if not place.alike(stored.dtype, slot.dtype):
        raise FileFormatError(
            f"{name} is {stored.dtype} in the file, which the model cannot hold: give the "
            "architecture that was saved"
        )


def _put(at: Mapping[tuple[nn.Module, str], Tensor]) -> None:
    """Put tensors where they go: parameters, buffers, or plain attributes."""
    for (module, own), value in at.items():
        if own in module._parameters:
            module._parameters[own] = value  # pyright: ignore[reportArgumentType]
        elif own in module._buffers:
            module._buffers[own] = value
        else:
            module.__dict__[own] = value
