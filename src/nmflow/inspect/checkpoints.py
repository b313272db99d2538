"""Weights of a saved network, read one at a time; nothing in a file is ever executed."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmflow import disk
from nmflow.errors import FileFormatError
from nmflow.text_table import shown

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_EXPANSION = 64
# A file of weights beside the index: no path, no "..", no other index.
_SHARD = re.compile(r"(?!\.)[^/\\\0]{1,240}\.(safetensors|bin|pt|pth)")
# torch.load raises these on files that are truncated, changed or of another kind.
_LOAD_ERRORS = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError,
    KeyError, IndexError, AttributeError, TypeError, AssertionError, OverflowError, MemoryError,
    RecursionError, NotImplementedError,
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
        path: the file; or the folder, whose weights may be sharded. An index names files beside
            it, never elsewhere; links are followed, since caches of the hub consist of them.

    Raises:
        FileFormatError: it is missing, damaged, no regular file, or no state dict of tensors.
            Pickled files are read with `weights_only=True`, so a file that wants to run code is
            refused.
    """
    where = Path(path)
    return _folder(where) if os.path.isdir(where) else _file(where)


def check_shards(folder: Path) -> None:
    """Raise `FileFormatError` if an index in a folder names files that are not beside it."""
    for name in _INDEXES:
        if os.path.lexists(folder / name):
            _weight_map(folder / name)


def _file(file: Path) -> SavedState:
    try:
        disk.check_regular(file)
    except FileNotFoundError:
        raise FileFormatError(
            f"{file} does not exist: give a checkpoint file or its folder"
        ) from None
    except OSError as error:
        raise FileFormatError(
            f"{file} cannot be opened ({error.strerror}): give a checkpoint file or its folder"
        ) from None
    if file.suffix == ".safetensors":
        return _safetensors(file)
    if file.suffix in _PICKLED:
        return _pickled(file)
    raise FileFormatError(
        f"{file} ends in {file.suffix!r}: give a .safetensors, {', '.join(_PICKLED)} file or a "
        "folder"
    )


def _folder(folder: Path) -> SavedState:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise FileFormatError(f"{folder} cannot be opened ({error.strerror})") from None
    for name in _INDEXES:
        if name in names:
            return _sharded(folder / name)
    for name in _SINGLE:
        if name in names:
            return _file(folder / name)
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return _file(folder / found[0])
    raise FileFormatError(
        f"{folder} holds no weights that can be recognized: expected "
        f"{', '.join(_SINGLE + _INDEXES)} or one .safetensors file"
    )


def _sharded(index: Path) -> SavedState:
    mapping = _weight_map(index)
    shards = {file: _file(index.parent / file) for file in sorted(set(mapping.values()))}
    for name, file in mapping.items():
        if name not in shards[file].shapes:
            raise FileFormatError(
                f"{index} says that {shown(name)} is in {file}, which does not hold it"
            )
    return SavedState(
        {name: shards[file].shapes[name] for name, file in mapping.items()},
        {name: shards[file].floating[name] for name, file in mapping.items()},
        lambda name: shards[mapping[name]].read(name),
    )


def _weight_map(index: Path) -> dict[str, str]:
    """A mapping from the names of weights to those of files beside the index."""
    try:
        mapping: Any = disk.read_json(index)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:100]
        raise FileFormatError(
            f"{index} is not an index of shards ({reason}): save the model again"
        ) from error
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(isinstance(file, str) and _SHARD.fullmatch(file) for file in mapping.values())
    ):
        raise FileFormatError(
            f"{index} does not map names to files of weights beside it: save the model again"
        )
    return mapping


def _safetensors(file: Path) -> SavedState:
    # Here, since audit() needs it for files alone, and importing nmflow needs torch and numpy only.
    from safetensors import SafetensorError, safe_open

    errors = (SafetensorError, *_LOAD_ERRORS)
    shapes: dict[str, tuple[int, ...]] = {}
    floating: dict[str, bool] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a handle, not a mapping
                part = tensors.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                floating[name] = "F" in part.get_dtype()
    except errors as error:
        raise _damaged(file, error) from error

    def read(name: str) -> Tensor:
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except errors as error:
            raise _damaged(file, error) from error

    return SavedState(shapes, floating, read)


def _pickled(file: Path) -> SavedState:
    try:
        mapped = zipfile.is_zipfile(file)
        if mapped:
            _check_stored(file)
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
    for name, t in tensors.items():
        if t.layout != torch.strided or t.is_quantized or t.is_meta or t.is_nested:
            raise FileFormatError(
                f"{file} holds {shown(name)}, which is not a plain dense tensor: save it as one"
            )
        # A view with strides of 0 may claim any size, since its elements are not in the file.
        if t.numel() * t.element_size() > max(_EXPANSION * t.untyped_storage().nbytes(), 1 << 24):
            raise FileFormatError(
                f"{file} holds {shown(name)} with more elements than it has bytes for: save a copy"
            )
    return state_of(tensors)


def _check_stored(file: Path) -> None:
    """Refuse a compressed archive: `torch.save` writes none, and a small one may hold anything."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"its entry {entry.filename[:80]!r} is compressed")


def _damaged(file: Path, error: Exception) -> FileFormatError:
    said = str(error).strip().splitlines()[:1] or [type(error).__name__]
    return FileFormatError(
        f"{file} cannot be read as weights ({shown(said[0], 200)}): it is damaged, truncated or "
        "of another kind"
    )
