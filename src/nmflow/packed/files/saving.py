"""`save`: a network into a folder, its N:M weights packed, lossless and checked."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from nmflow import disk
from nmflow.errors import CompressError
from nmflow.packed import build
from nmflow.packed.build import PACKED
from nmflow.packed.files import writing
from nmflow.packed.files.architecture import built_names
from nmflow.packed.files.card import card_of
from nmflow.packed.files.companions import companions, is_pretrained
from nmflow.packed.files.stored import Stored
from nmflow.packed.packable import check_unsharded, survey
from nmflow.packed.parts import parts_of
from nmflow.select.plan import Names, Patterns
from nmflow.select.weights import path_of

Folder = str | os.PathLike[str]


def save(
    model: nn.Module, folder: Folder, pattern: Patterns | None = None, include: Names = "*",
    exclude: Names = (), *, recipe: object = None, quality: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Write a network to a folder, its N:M weights as kept values and their columns.

    The folder gets `nmflow.json` (patterns, axes, layout version, a SHA-256 per tensor) and one
    safetensors file; `docs/layout.md` says how to read them without nmflow. The files are lossless:
    `load` returns every weight bit by bit, except for the sign of a pruned zero. An older network
    in the folder is replaced in one step; other files do not change.

    A network of transformers or timm also gets its `config.json`, from which `from_pretrained`
    builds it, and a model card (`README.md`; your own card is not overwritten). A network of
    transformers that its config does not build (adapters, another head) is saved as your own.

    Args:
        model: what `compress` returned; or a dense model whose weights hold N:M, such as after
            `flow.finalize()`, which is left as it is.
        folder: created if missing.
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
        ...     again = nmflow.load(folder, nn.Sequential(nn.Linear(64, 32)))
        >>> again[0].pattern
        Pattern('1:16')
    """
    check_unsharded(model)
    weights: dict[str, Stored] = {}
    tensors, inside = _plain_state(model)
    for path, module in inside.items():
        held = parts_of(module)
        for own, parameter in build.parameters_of(module).items():
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
    beside = {} if not_built(model) else companions(model)
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


def not_built(model: nn.Module) -> str:
    """A tensor of a network of transformers that its config builds no place for; or nothing.

    What the config builds beyond the network is no matter: `from_pretrained` says what is missing.
    """
    built = built_names(model) if is_pretrained(model) else None
    if built is None:
        return ""
    tensors, inside = _plain_state(model)
    names = [*tensors]
    for path, module in inside.items():
        names += [f"{path}.{own}" for own in getattr(module, "dense_names", ())]
    return next((name for name in names if name not in built), "")


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
        if _is_inside(name, inside):
            continue
        if not isinstance(value, Tensor):
            raise CompressError(f"{name} is a {type(value).__name__}: only tensors can be saved")
        tensors[name] = value.detach()
    return tensors, inside


def _is_inside(name: str, paths: Collection[str]) -> bool:
    """Whether a name is that of something in one of some modules."""
    while name:
        name = path_of(name)
        if name in paths:
            return True
    return False


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
