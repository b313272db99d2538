"""The file format, read: a JSON header beside one safetensors file, checked whole before use.

`docs/layout.md` states it for readers without nmflow.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nmflow import disk
from nmflow.errors import CompressError, FileFormatError, PatternError
from nmflow.kernels import int8
from nmflow.kernels.layout import DTYPES, Shape, check_canonical
from nmflow.packed.files.stored import Stored
from nmflow.packed.layout import LAYOUT_VERSIONS, bytes_to_index, file_bits, layout_version
from nmflow.packed.parts import Part

HEADER = "nmflow.json"
FORMAT = "nmflow"
LARGEST_HEADER = 64 << 20
_LARGEST_SIZE = 1 << 48
_LONGEST_PATTERN = 40
_MOST_TRIES = 1000
_MAPPED = 1 << 20
# A file may stand for this many times its values, so that 1:64 always passes...
_EXPANSION = 64
# ...and for this much in any case.
_ALWAYS = 1 << 30
WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
Contents = tuple[dict[str, Stored], dict[str, Tensor], dict[str, str]]
# Names of a part's `values` if they do not have the parameter's dtype.
_ROUNDED = {"int8": torch.int8, "bfloat16": torch.bfloat16}
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a header of ours; a damaged one counts, another tool's does not."""
    path = Path(folder) / HEADER
    try:
        return _says_ours(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return os.path.lexists(path)


def _says_ours(path: Path) -> bool:
    header = disk.read_json(path, LARGEST_HEADER)
    return isinstance(header, dict) and header.get("format") == FORMAT


def read(folder: str | os.PathLike[str]) -> Contents:
    """Read a folder whole: packed weights, other tensors, aliases. Everything is checked.

    Raises:
        FileFormatError: a file is missing, damaged, hostile, or of another version.
    """
    path = Path(folder)
    for _ in range(_MOST_TRIES):
        was = version(path / HEADER)
        try:
            return _read(path)
        except FileFormatError:
            # Another process may have replaced the network between the header and its tensors.
            if was == version(path / HEADER):
                raise
    raise FileFormatError(
        f"'{path}' is being rewritten all the time: wait until its writers are done"
    )


def version(path: Path) -> tuple[int, ...]:
    """What distinguishes a file from the next one of its name, even with the same content."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> Contents:
    header = _header(path / HEADER)
    data = _tensors(path / _file(header), _get(header, "tensors", dict))
    weights: dict[str, Stored] = {}
    for key, described in _get(header, "weights", dict).items():
        weights[key] = _weight(key, described, data)
        if key in data and not data[key].numel():  # for readers that know nothing of parts
            del data[key]
    if header["layout"] != layout_version(w.is_int8 or w.is_bfloat16 for w in weights.values()):
        raise _bad("its layout version does not match its contents")
    aliases = _get(header, "aliases", dict)
    for alias, target in aliases.items():
        if not isinstance(target, str) or (target not in weights and target not in data):
            raise _bad(f"the alias {alias!r} names no tensor of the file")
        if alias in weights or alias in data:
            raise _bad(f"the alias {alias!r} is a tensor of the file too")
    both = weights.keys() & data.keys()
    if both:
        raise _bad(f"{min(both)!r} is stored both packed and dense")
    return weights, data, aliases


def file_of(folder: str | os.PathLike[str]) -> Path:
    """The file that holds the tensors of a folder; raises `FileFormatError`."""
    return Path(folder) / _file(_header(Path(folder) / HEADER))


def check_size(weights: Iterable[Stored], max_bytes: int | None = None) -> None:
    """Raise `FileFormatError` if weights would take more memory than their file can stand for.

    Args:
        weights: those that are rebuilt together.
        max_bytes: the most that they may take; by default 64 times the bytes of their values, but
            at least 1 GiB.
    """
    together = list(weights)
    size = sum(w.dense_bytes for w in together)
    limit = max_bytes
    if limit is None:
        limit = max(_EXPANSION * sum(w.stored_bytes for w in together), _ALWAYS)
    if size > limit:
        raise FileFormatError(
            f"the saved network would take {size:,} bytes as dense weights, above the limit of "
            f"{limit:,}: if you trust it, call load_state with a larger max_bytes, or load it into "
            "a model"
        )


def checksum(t: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _bad(what: str) -> FileFormatError:
    return FileFormatError(f"the saved network is damaged or not one of nmflow's: {what[:400]}")


def _header(path: Path) -> dict[str, Any]:
    try:
        header = disk.read_json(path, LARGEST_HEADER)
    except OSError as error:
        raise FileFormatError(
            f"'{path}' cannot be read ({error.strerror}): give a folder that nmflow.save wrote"
        ) from error
    except ValueError as error:
        raise _bad(f"{HEADER} is not JSON that can be read ({str(error)[:100]})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _bad(f"{HEADER} does not say format {FORMAT!r}")
    if header.get("layout") not in LAYOUT_VERSIONS or type(header["layout"]) is not int:
        raise FileFormatError(
            f"the saved network has layout version {str(header.get('layout'))[:20]}, this nmflow "
            f"reads versions {LAYOUT_VERSIONS[0]} and {LAYOUT_VERSIONS[1]}: use the nmflow that "
            "wrote it"
        )
    return header


def _file(header: dict[str, Any]) -> str:
    name = _get(header, "file", str)
    if not WEIGHTS.fullmatch(name):
        raise _bad(f"the file name {name[:80]!r} is not one that nmflow writes")
    return name


def _tensors(path: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    data = {}
    try:
        disk.check_regular(path)
        for names in _together(described):
            # What is mapped counts as memory of the process, so the file is mapped anew in between.
            with safe_open(path, framework="pt") as file:
                if set(file.keys()) != set(described):
                    raise _bad("its tensors are not those that the header lists")
                for name in names:
                    # A copy: what is checked must not change with the file it is mapped from.
                    data[name] = file.get_tensor(name).clone()
                    _check(name, described[name], data[name])
    except OSError as error:
        raise _bad(f"{path.name} cannot be read ({error})") from error
    except (SafetensorError, RuntimeError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise _bad(f"{path.name}: {str(error)[:200]}") from error
    return data


def _together(described: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names of tensors in runs of about a million values; without tensors, one empty run."""
    run: list[str] = []
    size = 0
    for name, one in described.items():
        shape = one.get("shape") if isinstance(one, dict) else None
        if not isinstance(shape, list) or not all(_is_size(s, 0) for s in shape):
            raise _bad(f"the header says nothing of {name!r}")
        run.append(name)
        size += math.prod(shape)
        if size > _MAPPED:
            yield run
            run, size = [], 0
    yield run


def _check(name: str, described: Mapping[str, Any], tensor: Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if described.get("shape") != list(tensor.shape) or described.get("dtype") != dtype:
        raise _bad(f"{name!r} has another shape or dtype than the header says")
    if described.get("sha256") != checksum(tensor):
        raise _bad(f"{name!r} does not have the checksum that the header gives")


def _weight(name: str, described: Any, data: dict[str, Tensor]) -> Stored:
    """Check what the header says of one weight, and take its tensors out of `data`."""
    if not isinstance(described, dict):
        raise _bad(f"the header says nothing of {name!r}")
    shape = _get(described, "shape", list)
    axis, dtype = _get(described, "axis", int), _NAMES.get(_get(described, "dtype", str))
    run = _get(described, "run", str)
    sizes_right = len(shape) >= 2 and all(_is_size(s) for s in shape)
    if not sizes_right or axis not in (0, 1) or dtype is None or run not in ("packed", "dense"):
        raise _bad(f"{name!r} has an impossible shape, axis, dtype or run")
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
    if stored.is_int8:
        stored.activations = _get(described, "activations", str)
        if stored.activations not in int8.ACTIVATIONS or dtype is torch.float64:
            raise _bad(f"{name!r} has activations or a dtype that 8-bit values do not go with")
    return stored


def _part(
    name: str, i: int, part: dict[str, Any], rows: list[int], inputs: int, dtype: torch.dtype,
    data: dict[str, Tensor],
) -> Part:  # fmt: skip
    values = data.pop(f"{name}#{i}.values", None)
    kind = part.get("values")
    if kind not in (None, *_ROUNDED) or values is None or (kind and dtype is _ROUNDED[kind]):
        raise _bad(f"the values of part {i} of {name!r} are missing or of an impossible kind")
    if values.dtype != (_ROUNDED[kind] if kind else dtype):
        raise _bad(f"the values of part {i} of {name!r} are of another dtype")
    pattern = part.get("pattern")
    if pattern is None:
        if tuple(values.shape) != (rows[1] - rows[0], inputs) or kind:
            raise _bad(f"part {i} of {name!r} has the shape {tuple(values.shape)}")
        return Part(rows[0], rows[1], None, values)
    if not isinstance(pattern, str) or len(pattern) > _LONGEST_PATTERN:
        raise _bad(f"part {i} of {name!r} has a pattern that is too long or not text")
    shape = Shape.of(rows[1] - rows[0], inputs, pattern)
    packed = data.pop(f"{name}#{i}.index", None)
    bits = file_bits(shape.m)
    size = (shape.lists, -(-shape.entries * bits // 8))
    if packed is None or packed.dtype != torch.uint8 or tuple(packed.shape) != size:
        raise _bad(f"the index of part {i} of {name!r} is missing or not uint8 {size}")
    if part.get("bits") != bits:
        raise _bad(f"part {i} of {name!r} does not have indices of {bits} bits")
    # Checked now, and kept in bits until its layer is built: bytes of a whole network take more.
    index = bytes_to_index(packed, shape.entries, shape.m)
    if kind != "int8":
        check_canonical(values, index, shape)
        return Part(rows[0], rows[1], shape, values, packed, in_bits=True)
    scale = data.pop(f"{name}#{i}.scale", None)
    if scale is None:
        raise _bad(f"the scales of part {i} of {name!r} are missing")
    int8.check_canonical(values, scale, index, shape)
    return Part(rows[0], rows[1], shape, values, packed, scale, in_bits=True)


def _is_size(value: object, least: int = 1) -> bool:
    return type(value) is int and least <= value <= _LARGEST_SIZE


def _get(mapping: Mapping[str, Any], key: str, kind: type) -> Any:
    value = mapping.get(key)
    if type(value) is not kind:
        raise _bad(f"the header has no {key!r}, or it is not of type {kind.__name__}")
    return value
