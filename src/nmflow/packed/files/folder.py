"""`save` and `load`: a network in a folder, its N:M weights packed, lossless and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from nmflow import disk
from nmflow.errors import CompressError, FileFormatError
from nmflow.packed import build
from nmflow.packed.build import PACKED
from nmflow.packed.files import container, place, writing
from nmflow.packed.files.card import card_of
from nmflow.packed.files.companions import companions, is_pretrained
from nmflow.packed.files.fill import Places, fill
from nmflow.packed.files.stored import Stored
from nmflow.packed.fuse import fuse as fuse_activations
from nmflow.packed.packable import survey
from nmflow.packed.parts import parts_of
from nmflow.packed.swap import Model, replace_modules
from nmflow.select.plan import Names, Patterns

Folder = str | os.PathLike[str]


def save(
    model: nn.Module, folder: Folder, pattern: Patterns | None = None, include: Names = "*",
    exclude: Names = (), *, recipe: object = None, quality: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Write a network to a folder, its N:M weights as kept values and their columns.

    The folder gets `nmflow.json` (patterns, axes, layout version, a SHA-256 per tensor) and one
    safetensors file; `docs/layout.md` says how to read them without nmflow. Nothing is lost:
    `load` gives every weight back bit by bit, but for the sign of a pruned zero. An older network
    in the folder is replaced in one step; other files are left alone.

    A network of transformers or timm also gets its `config.json`, from which `from_pretrained`
    builds it, and a model card (`README.md`; one that you wrote is left alone).

    Args:
        model: what `compress` returned; or a dense model whose weights hold N:M, such as after
            `flow.finalize()`, which is left as it is.
        folder: made if it is not there.
        pattern: as for `compress`; for the weights of `model` that are dense.
        include: as for `compress`.
        exclude: as for `compress`.
        recipe: how the network was trained, for the card: a recipe or a text.
        quality: figures for the card, such as `{"accuracy": 0.91}`. Naming a recipe or figures
            writes a card for a network of your own, too.

    Raises:
        CompressError: the folder cannot be written, no weight holds a pattern, or the model has
            state that is no tensor.

    Example:
        >>> import nmflow, tempfile
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> model[0].weight.data *= nmflow.mask(model[0].weight, "1:16")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, folder)
        ...     again = load(folder, nn.Sequential(nn.Linear(64, 32)))
        >>> again[0].pattern
        Pattern('1:16')
    """
    weights: dict[str, Stored] = {}
    tensors, inside = _plain_state(model)
    for path, module in inside.items():
        dense = build.unpack(module)
        held = parts_of(module)
        for own, parameter in dense.named_parameters():
            name = f"{path}.{own}" if path else own
            if own in held:
                axis = 0 if getattr(module, "stored", "") == "Conv1D" else 1
                weights[name] = Stored.of_layers(parameter, axis, held[own])
            else:
                tensors[name] = parameter.detach()
    # transformers ties and resizes embeddings while it loads, so it reads them as they are.
    pretrained = is_pretrained(model)
    for found in survey(model, pattern, include, exclude) if tensors else ():
        name = found.layer.name
        if found.runs and name in tensors and not (pretrained and found.why_not):
            run = "dense" if inside or found.why_not else "packed"
            weights[name] = Stored.of(tensors.pop(name), found.layer.dim, found.runs, run)
    if not weights:
        raise CompressError(
            "model has no weight that holds an N:M pattern: prune it first (flow.finalize()), or "
            "name the pattern"
        )
    aliases = {a: first for a, first in _aliases(model).items() if a in tensors}
    plain = {n: t for n, t in tensors.items() if n not in aliases}
    beside = companions(model)
    card = card_of(model, weights, plain, recipe, quality) if beside or recipe or quality else ""
    writing.write(folder, weights, plain, aliases, beside, card)


def save_beside(
    model: nn.Module, folder: Folder, source: Folder, recipe: object = None,
    quality: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """`save`, with the config and the tokeniser of another folder copied beside the network.

    No file of weights, of code or of nmflow's own is copied.

    Raises:
        CompressError: as `save`; a file of `source` cannot be copied.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with disk.locked(folder):  # all files of one network, not some of another's
            for file in sorted(Path(source).iterdir()):
                if writing.is_companion(file):
                    disk.write_whole(Path(folder, file.name), disk.read_bytes(file))
            save(model, folder, recipe=recipe, quality=quality)
    except OSError as error:
        raise CompressError(f"folder '{folder}' cannot be written: {error}") from error


def load(folder: Folder, model: Model, *, fuse: bool = True) -> Model:
    """Load what `save` wrote into a dense model of the same architecture.

    Args:
        folder: what `save` wrote.
        model: the dense architecture; its own weights do not matter and may be on `meta`, which
            holds the least memory. What no file has, such as position ids, is then built again
            where a constructor takes nothing but a `config`, as in transformers. The model is
            changed in place, once everything in the folder has been checked.
        fuse: as for `compress`.

    Returns:
        `model`, its weights replaced (with the dtypes of the file), and its modules packed where
        they were packed when saved, or packable when a dense model was saved. If the root itself
        is packed, the packed module.

    Raises:
        FileFormatError: a file is missing, damaged, hostile, or does not fit the model.
        CompressError: `model` is packed already, or has tensors on `meta` that neither the file
            nor a constructor gives.
    """
    if any(isinstance(module, PACKED) for module in model.modules()):
        raise CompressError("model is packed already: build the dense architecture anew")
    weights, tensors, aliases = container.read(folder)
    slots, names = _slots(model)
    known = {**dict.fromkeys(weights), **dict.fromkeys(tensors)}
    source = {name: aliases.get(name, name) for name in slots}
    missing = [name for name in slots if source[name] not in known]
    taken = set(source.values())
    extra = [name for name in known if name not in taken and name not in names]
    if missing or extra:
        raise FileFormatError(
            "the saved network is another than the model: it lacks "
            f"{str(missing[:5])[:150]} and has {str(extra[:5])[:150]} besides"
        )
    modules = dict(model.named_modules())
    sites: dict[str, dict[str, list[build.Run]]] = {}
    keys: dict[tuple[str, str], str] = {}
    for name, (shape, places) in slots.items():
        key = source[name]
        size = weights[key].shape if key in weights else tuple(tensors[key].shape)
        if tuple(size) != shape:
            raise FileFormatError(f"{name} is {tuple(size)} in the file and {shape} in the model")
        dtype = weights[key].dtype if key in weights else tensors[key].dtype
        if not place.alike(dtype, _held(*places[0]).dtype):
            raise FileFormatError(f"{name} is {dtype} in the file, which the model cannot hold")
        if key in weights and weights[key].run == "packed":
            site, own = place.site_of(name, modules)
            if why := place.why_not(modules[site], own, weights[key]):
                raise FileFormatError(f"{name} is packed in the file, but in the model: {why}")
            sites.setdefault(site, {})[own] = weights[key].runs
            keys[site, own] = key
    at, new = fill(
        model, {name: (source[name], places) for name, (_, places) in slots.items()},
        {site: {own: keys[site, own] for own in found} for site, found in sites.items()},
        weights, tensors,
    )  # fmt: skip
    for (module, own), value in at.items():  # only now is the model touched
        if own in module._parameters:
            module._parameters[own] = value  # pyright: ignore[reportArgumentType]
        elif own in module._buffers:
            module._buffers[own] = value
        else:
            module.__dict__[own] = value
    made = replace_modules(model, new, inplace=True)
    if fuse:
        fuse_activations(made)
    return made


def _plain_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
    """Tensors of the state outside packed modules, and the outermost packed modules by path."""
    inside: dict[str, nn.Module] = {}
    covered: set[nn.Module] = set()
    for path, module in model.named_modules():
        if isinstance(module, PACKED) and module not in covered:
            covered.update(module.modules())
            inside[path] = module
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if any(name.startswith(f"{path}." if path else "") for path in inside):
            continue
        if not isinstance(value, Tensor):
            raise CompressError(f"{name} is a {type(value).__name__}: only tensors can be saved")
        tensors[name] = value.detach()
    return tensors, inside


def _held(module: nn.Module, own: str) -> Tensor:
    """The parameter or buffer of a name."""
    parameter = module._parameters.get(own)
    return module._buffers[own] if parameter is None else parameter  # pyright: ignore


def _aliases(model: nn.Module) -> dict[str, str]:
    """Second names of tied parameters to their first; shared modules count too."""
    first: dict[int, str] = {}
    again: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) in first:
            again[name] = first[id(value)]
        elif isinstance(value, Tensor):
            first[id(value)] = name
    return again


def _slots(model: nn.Module) -> tuple[dict[str, tuple[tuple[int, ...], Places]], set[str]]:
    """First name of each tensor of the state to its shape and places, and all names."""
    slots: dict[str, tuple[tuple[int, ...], Places]] = {}
    first: dict[int, str] = {}
    names = set(model.state_dict())
    for path, module in model.named_modules(remove_duplicate=False):
        for own, value in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{path}.{own}" if path else own
            if value is None or name not in names:
                continue
            known = first.setdefault(id(value), name)
            slots.setdefault(known, (tuple(value.shape), []))[1].append((module, own))
    return slots, names
