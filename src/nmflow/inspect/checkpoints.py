"""Weights of a saved network, read one at a time; nothing in a file is ever executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmflow.errors import FileFormatError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("state_dict", "model_state_dict", "model", "module")
# What torch.load raises on files that are cut, changed or of another kind.
_LOAD_ERRORS = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError,
    KeyError, IndexError, AttributeError, TypeError,
)  # fmt: skip


@dataclass(frozen=True)
class SavedState:
    """A saved state dict.

    Attributes:
        shapes: the shape of every tensor by its name.
        floating: whether its dtype is floating point.
        read: loads one tensor.
    """

    shapes: Mapping[str, tuple[int, ...]]
    floating: Mapping[str, bool]
    read: Callable[[str], Tensor]


def state_of(tensors: Mapping[str, Tensor]) -> SavedState:
    """Tensors in memory as a `SavedState`."""
    return SavedState(
        {name: tuple(t.shape) for name, t in tensors.items()},
        {name: t.is_floating_point() for name, t in tensors.items()},
        tensors.__getitem__,
    )


def open_state(path: str | Path) -> SavedState:
    """Open a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file, or a Hugging Face folder.

    Args:
        path: the file; or the folder, whose weights may be sharded.

    Raises:
        FileFormatError: it is missing, damaged, or no state dict of tensors. Pickled files are
            read with `weights_only=True`, so a file that wants to run code is refused.
    """
    where = Path(path)
    if not where.exists():
        raise FileFormatError(f"{where} does not exist: give a checkpoint file or its folder")
    if where.is_dir():
        return _folder(where)
    if where.suffix == ".safetensors":
        return _safetensors(where)
    if where.suffix in _PICKLED:
        return _pickled(where)
    raise FileFormatError(
        f"{where} ends in {where.suffix!r}: give a .safetensors, {', '.join(_PICKLED)} file or a "
        "folder"
    )


def _folder(folder: Path) -> SavedState:
    for name in _INDEXES:
        if (folder / name).exists():
            return _sharded(folder / name)
    for name in _SINGLE:
        if (folder / name).exists():
            return open_state(folder / name)
    found = sorted(f for f in folder.iterdir() if f.suffix == ".safetensors")
    if len(found) == 1:
        return open_state(found[0])
    raise FileFormatError(
        f"{folder} holds no weights that can be told: expected {', '.join(_SINGLE + _INDEXES)} or "
        "one .safetensors file"
    )


def _sharded(index: Path) -> SavedState:
    try:
        mapping: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{index} is no index of shards ({error}): save the model again"
        ) from (error)
    if not isinstance(mapping, dict) or not all(
        isinstance(k, str) and isinstance(v, str) and Path(v).name == v for k, v in mapping.items()
    ):
        raise FileFormatError(
            f"{index} does not map names to files beside it: save the model again"
        )
    shards = {file: open_state(index.parent / file) for file in sorted(set(mapping.values()))}
    for name, file in mapping.items():
        if name not in shards[file].shapes:
            raise FileFormatError(f"{index} says that {name} is in {file}, which does not hold it")
    return SavedState(
        {name: shards[file].shapes[name] for name, file in mapping.items()},
        {name: shards[file].floating[name] for name, file in mapping.items()},
        lambda name: shards[mapping[name]].read(name),
    )


def _safetensors(file: Path) -> SavedState:
    # Here, since audit() needs it for files alone, and importing nmflow needs torch and numpy only.
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    floating: dict[str, bool] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a handle, not a mapping
                part = tensors.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                floating[name] = "F" in part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error

    def read(name: str) -> Tensor:
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error

    return SavedState(shapes, floating, read)


def _pickled(file: Path) -> SavedState:
    try:
        mapped = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except _LOAD_ERRORS as error:
        raise _damaged(file, error) from error
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = dict(state) if isinstance(state, Mapping) else {}
    tensors = {k: v for k, v in tensors.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise FileFormatError(
            f"{file} holds no state dict of tensors: save model.state_dict(), or a dict with it "
            f"under one of {', '.join(_NESTED)}"
        )
    return state_of(tensors)


def _damaged(file: Path, error: Exception) -> FileFormatError:
    said = str(error).strip().splitlines()[:1] or [type(error).__name__]
    return FileFormatError(
        f"{file} cannot be read as weights ({said[0]}): it is damaged, cut short or of another kind"
    )
