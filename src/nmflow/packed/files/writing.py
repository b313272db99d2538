"""The file format, written: whole or not at all, one writer at a time, the header last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nmflow import disk
from nmflow.errors import CompressError
from nmflow.packed.files import companions
from nmflow.packed.files.card import CARD, MARK
from nmflow.packed.files.container import (
    FORMAT,
    HEADER,
    LARGEST_HEADER,
    WEIGHTS,
    checksum,
    is_packed,
)
from nmflow.packed.files.stored import Stored
from nmflow.packed.layout import file_bits, index_to_bytes, layout_version


def write(
    folder: str | os.PathLike[str],
    weights: Mapping[str, Stored],
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    beside: Mapping[str, str] | None = None,
    card: str = "",
) -> None:
    """Write a folder: the new header takes the place of an old one in one step, or not at all.

    Args:
        folder: created if missing.
        weights: by name.
        tensors: the tensors that are stored as they are.
        aliases: second names to first ones.
        beside: name to text of the files from which other libraries build the network; they
            get an index of the tensors as well.
        card: the model card; it replaces only an older one of ours.

    Raises:
        CompressError: the folder cannot be written, or a tensor has a dtype no file holds.
    """
    from nmflow.version import __version__

    path = Path(folder)
    data = _plain(tensors)
    described = {}
    for name, w in weights.items():
        parts: list[dict[str, Any]] = []
        for i, p in enumerate(w.parts):
            part: dict[str, Any] = {"rows": [p.start, p.stop], "pattern": None}
            _add(data, f"{name}#{i}.values", p.values.cpu().contiguous())
            index = p.index
            if p.shape is not None and index is not None:
                part["pattern"] = str(p.shape.pattern)
                part["bits"] = file_bits(p.shape.m)
                _add(data, f"{name}#{i}.index", index_to_bytes(index, p.shape.m).cpu())
            if p.scale is not None:
                part["values"] = "int8"
                _add(data, f"{name}#{i}.scale", p.scale.cpu().contiguous())
            elif w.rounds(p):
                part["values"] = "bfloat16"
            parts.append(part)
        if beside:  # a reader that does not know parts stops here, and invents no weights
            _add(data, name, torch.empty(0, dtype=w.dtype))
        described[name] = {
            "shape": list(w.shape),
            "dtype": str(w.dtype).removeprefix("torch."),
            "axis": w.axis,
            "run": w.run,
            "parts": parts,
        }
        if w.is_int8:
            described[name]["activations"] = w.activations
    sums = {
        name: {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "sha256": checksum(t),
        }
        for name, t in data.items()
    }
    # Named by its content, so that the old header keeps naming the old file until it is replaced.
    digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]
    header = {
        "format": FORMAT,
        "layout": layout_version(w.is_int8 or w.is_bfloat16 for w in weights.values()),
        "nmflow": __version__,
        "file": f"weights-{digest}.safetensors",
        "tensors": sums,
        "weights": described,
        "aliases": dict(aliases),
    }
    text = json.dumps(header, indent=1)
    if len(text) > LARGEST_HEADER:
        raise CompressError(f"the header would have {len(text):,} bytes: shorten the names")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with disk.locked(path):
            _check_ours(path)
            if beside:
                _check_alone(path)
            try:
                _put_tensors(path / header["file"], data)
                disk.write_whole(path / HEADER, text)
                for name, content in (beside or {}).items():
                    disk.write_whole(path / name, content)
                _put_index(path, header["file"], data if beside else {})
                if card and _may_write_card(path / CARD):
                    disk.write_whole(path / CARD, card)
            finally:
                _remove_old_weights(path)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, CompressError):
            raise
        raise CompressError(f"folder '{path}' cannot be written: {error}") from error


def is_companion(file: Path) -> bool:
    """Whether a file beside weights is a config or a tokeniser, which a packed network needs too.

    Not an index of shards, nor what nmflow writes itself: headers, records and marks.
    """
    return (
        file.suffix in (".json", ".txt", ".model", ".jinja")
        and not file.name.startswith(("nmflow", "."))
        and not file.name.endswith(".index.json")
        and file.is_file()
    )


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none of which shares memory with another."""
    made: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in tensors.items():
        if t.layout != torch.strided or t.is_quantized or t.is_meta or t.is_nested:
            kind = "meta" if t.is_meta else t.dtype if t.is_quantized else t.layout
            raise CompressError(f"{name} is a {kind} tensor: files hold plain dense tensors only")
        plain = t.detach().cpu().contiguous()
        if plain.numel() and plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        _add(made, name, plain)
    return made


def _add(data: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in data or name == "__metadata__":
        raise CompressError(f"a tensor is called {name!r}, which the file needs: rename it")
    data[name] = tensor


def _check_ours(path: Path) -> None:
    """Refuse to write over a file of the header's name that holds something else."""
    if not is_packed(path) and os.path.lexists(path / HEADER):
        raise CompressError(
            f"folder '{path}' holds a {HEADER} that is not the header of a packed network: give "
            "another folder"
        )


def _check_alone(path: Path) -> None:
    """Refuse a folder with weights that transformers would read in place of the packed ones."""
    for rival in companions.RIVALS:
        if os.path.lexists(path / rival):
            raise CompressError(
                f"folder '{path}' holds {rival}, which transformers would read in place of the "
                "packed network: give another folder"
            )


def _may_write_card(path: Path) -> bool:
    """Whether there is no card, or one that nmflow wrote."""
    if not os.path.lexists(path):
        return True
    try:
        return MARK.encode() in disk.read_bytes(path, LARGEST_HEADER)
    except OSError:
        return False


def _put_index(path: Path, file: str, data: Mapping[str, Tensor]) -> None:
    """Write the index of the tensors; without any, remove the one of an older network."""
    index = path / companions.INDEX
    if data:
        size = sum(t.nbytes for t in data.values())
        disk.write_whole(index, companions.index_of(data, file, size))
    elif os.path.lexists(index):
        try:
            named = set(disk.read_json(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # not ours
        if all(isinstance(name, str) and WEIGHTS.fullmatch(name) for name in named):
            index.unlink()


def _put_tensors(path: Path, data: Mapping[str, Tensor]) -> None:
    temporary = disk.temporary_in(path.parent)
    try:
        save_file(dict(data), temporary, metadata={"format": "pt"})
        disk.put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_old_weights(path: Path) -> None:
    """Remove the files of tensors that the header, the old one or the new, does not name."""
    try:
        named = disk.read_json(path / HEADER, LARGEST_HEADER)["file"]
    except FileNotFoundError:
        named = None
    except (OSError, ValueError, KeyError, TypeError):
        return  # a damaged header: what it named is unknown
    for old in path.iterdir():
        if WEIGHTS.fullmatch(old.name) and old.name != named:
            old.unlink()
