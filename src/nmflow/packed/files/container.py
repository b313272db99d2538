"""The file format: a JSON header beside one safetensors file, checked whole before use.

`docs/layout.md` states it for readers without nmflow.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmflow.errors import CompressError, FileFormatError, PatternError
from nmflow.kernels.layout import DTYPES, Shape, check_canonical
from nmflow.packed.files.stored import Stored
from nmflow.packed.layout import (
    LAYOUT_VERSION,
    bytes_to_index,
    file_bits,
    index_to_bytes,
)

HEADER = "nmflow.json"
FORMAT = "nmflow"
_LARGEST_HEADER = 64 << 20
_LARGEST_SIZE = 1 << 48
_LONGEST_PATTERN = 40
_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def write(
    folder: str | os.PathLike[str],
    weights: Mapping[str, Stored],
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
) -> None:
    """Write a folder: the new header takes the place of an old one in one step, or not at all.

    Raises:
        CompressError: the folder cannot be written, or a tensor has a dtype no file holds.
    """
    from nmflow.version import __version__

    path = Path(folder)
    data = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    described = {}
    for name, w in weights.items():
        parts: list[dict[str, Any]] = []
        for i, (start, stop, shape, values, index) in enumerate(w.parts):
            part: dict[str, Any] = {"rows": [start, stop], "pattern": None}
            data[f"{name}#{i}.values"] = values.cpu().contiguous()
            if shape is not None and index is not None:
                part["pattern"] = str(shape.pattern)
                part["bits"] = file_bits(shape.m)
                data[f"{name}#{i}.index"] = index_to_bytes(index, shape.m).cpu()
            parts.append(part)
        described[name] = {
            "shape": list(w.shape),
            "dtype": str(w.dtype).removeprefix("torch."),
            "axis": w.axis,
            "run": w.run,
            "parts": parts,
        }
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
        "layout": LAYOUT_VERSION,
        "nmflow": __version__,
        "file": f"weights-{digest}.safetensors",
        "tensors": sums,
        "weights": described,
        "aliases": dict(aliases),
    }
    temporary = path / f".nmflow-{secrets.token_hex(8)}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            save_file(data, temporary, metadata={"format": "pt"})
            _sync(temporary)
            os.replace(temporary, path / header["file"])
            temporary.write_text(json.dumps(header, indent=1), encoding="utf-8")
            _sync(temporary)
            os.replace(temporary, path / HEADER)
        finally:
            temporary.unlink(missing_ok=True)
        for old in path.iterdir():
            if _WEIGHTS.fullmatch(old.name) and old.name != header["file"]:
                old.unlink()
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CompressError(f"folder '{path}' cannot be written: {error}") from error


def read(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Stored], dict[str, Tensor], dict[str, str]]:
    """Read a folder whole: packed weights, other tensors, aliases. Everything is checked.

    Raises:
        FileFormatError: a file is missing, damaged, hostile, or of another version.
    """
    path = Path(folder)
    header = _header(path / HEADER)
    name = _get(header, "file", str)
    if not _WEIGHTS.fullmatch(name):
        raise _bad(f"the file name {name[:80]!r} is not one that nmflow writes")
    data = _tensors(path / name, _get(header, "tensors", dict))
    weights: dict[str, Stored] = {}
    for key, described in _get(header, "weights", dict).items():
        weights[key] = _weight(key, described, data)
    aliases = _get(header, "aliases", dict)
    for alias, target in aliases.items():
        if not isinstance(target, str) or (target not in weights and target not in data):
            raise _bad(f"the alias {alias!r} names no tensor of the file")
        if alias in weights or alias in data:
            raise _bad(f"the alias {alias!r} is a tensor of the file too")
    both = weights.keys() & data.keys()
    if both:
        raise _bad(f"{min(both)!r} is there both packed and dense")
    return weights, data, aliases


def checksum(t: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _bad(what: str) -> FileFormatError:
    return FileFormatError(f"the saved network is damaged or not one of nmflow's: {what[:400]}")


def _header(path: Path) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            raise ValueError("a key is there twice")
        return made

    try:
        size = path.stat().st_size
        if size > _LARGEST_HEADER:
            raise _bad(f"{HEADER} has {size:,} bytes, above the limit of {_LARGEST_HEADER:,}")
        with path.open("rb") as file:
            text = file.read(_LARGEST_HEADER + 1)
        header = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except OSError as error:
        raise FileFormatError(
            f"'{path}' cannot be read ({error.strerror}): give a folder that nmflow.save wrote"
        ) from error
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise _bad(f"{HEADER} is not JSON that can be read ({str(error)[:100]})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _bad(f"{HEADER} does not say format {FORMAT!r}")
    if header.get("layout") != LAYOUT_VERSION or isinstance(header["layout"], bool):
        raise FileFormatError(
            f"the saved network has layout version {str(header.get('layout'))[:20]}, this nmflow "
            f"reads version {LAYOUT_VERSION}: use the nmflow that wrote it"
        )
    return header


def _tensors(path: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    data = {}
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(described):
                raise _bad("its tensors are not those that the header lists")
            for name, one in described.items():
                if not isinstance(one, dict):
                    raise _bad(f"the header says nothing of {name!r}")
                # A copy: what is checked must not change with the file that it is mapped from.
                data[name] = file.get_tensor(name).clone()
                dtype = str(data[name].dtype).removeprefix("torch.")
                if one.get("shape") != list(data[name].shape) or one.get("dtype") != dtype:
                    raise _bad(f"{name!r} has another shape or dtype than the header says")
                if one.get("sha256") != checksum(data[name]):
                    raise _bad(f"{name!r} does not have the checksum that the header gives")
    except OSError as error:
        raise _bad(f"{path.name} cannot be read ({error})") from error
    except (SafetensorError, RuntimeError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise _bad(f"{path.name}: {str(error)[:200]}") from error
    return data


def _weight(name: str, described: Any, data: dict[str, Tensor]) -> Stored:
    """Check what the header says of one weight, and take its tensors out of `data`."""
    if not isinstance(described, dict):
        raise _bad(f"the header says nothing of {name!r}")
    shape = _get(described, "shape", list)
    axis, dtype = _get(described, "axis", int), _NAMES.get(_get(described, "dtype", str))
    run = _get(described, "run", str)
    sizes_right = len(shape) >= 2 and all(_is_size(s) for s in shape)
    if not sizes_right or axis not in (0, 1) or dtype is None or run not in ("packed", "dense"):
        raise _bad(f"{name!r} has a shape, axis, dtype or run that cannot be")
    count = 1
    for size in shape:
        count *= size
        if count > _LARGEST_SIZE:
            raise _bad(f"{name!r} has a shape that overflows")
    out = shape[0 if axis else 1]
    stored = Stored(tuple(shape), axis, dtype, run)
    at = 0
    for i, part in enumerate(_get(described, "parts", list)):
        rows = _get(part, "rows", list) if isinstance(part, dict) else []
        if len(rows) != 2 or not all(_is_size(r, 0) for r in rows) or not at == rows[0] < rows[1]:
            raise _bad(f"part {i} of {name!r} has rows that do not follow on the last")
        try:
            stored.parts.append(_part(name, i, part, rows, count // out, dtype, data))
        except (CompressError, PatternError) as error:
            raise _bad(f"part {i} of {name!r}: {error}") from error
        at = rows[1]
    if at != out:
        raise _bad(f"the parts of {name!r} end at row {at} of {out}")
    return stored


def _part(
    name: str, i: int, part: dict[str, Any], rows: list[int], inputs: int, dtype: torch.dtype,
    data: dict[str, Tensor],
) -> tuple[int, int, Shape | None, Tensor, Tensor | None]:  # fmt: skip
    values = data.pop(f"{name}#{i}.values", None)
    if values is None or values.dtype != dtype:
        raise _bad(f"the values of part {i} of {name!r} are missing or of another dtype")
    pattern = part.get("pattern")
    if pattern is None:
        if tuple(values.shape) != (rows[1] - rows[0], inputs):
            raise _bad(f"part {i} of {name!r} has the shape {tuple(values.shape)}")
        return rows[0], rows[1], None, values, None
    if not isinstance(pattern, str) or len(pattern) > _LONGEST_PATTERN:
        raise _bad(f"part {i} of {name!r} has a pattern that is no text or too long")
    shape = Shape.of(rows[1] - rows[0], inputs, pattern)
    packed = data.pop(f"{name}#{i}.index", None)
    bits = file_bits(shape.m)
    size = (shape.lists, -(-shape.entries * bits // 8))
    if packed is None or packed.dtype != torch.uint8 or tuple(packed.shape) != size:
        raise _bad(f"the index of part {i} of {name!r} is missing or not uint8 {size}")
    if part.get("bits") != bits:
        raise _bad(f"part {i} of {name!r} does not have indices of {bits} bits")
    index = bytes_to_index(packed, shape.entries, shape.m)
    check_canonical(values, index, shape)
    return rows[0], rows[1], shape, values, index


def _is_size(value: object, least: int = 1) -> bool:
    return type(value) is int and least <= value <= _LARGEST_SIZE


def _get(mapping: Mapping[str, Any], key: str, kind: type) -> Any:
    value = mapping.get(key)
    if type(value) is not kind:
        raise _bad(f"the header has no {key!r}, or one that is no {kind.__name__}")
    return value


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
