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
from nmflow.errors import FileFormatError
from nmflow.packed.files.described import bad, get, is_size, read_weight
from nmflow.packed.files.stored import Stored
from nmflow.packed.layout import LAYOUT_VERSIONS, layout_version

HEADER = "nmflow.json"
FORMAT = "nmflow"
LARGEST_HEADER = 64 << 20
_MOST_TRIES = 1000
_MAPPED = 1 << 20
# A file may stand for this many times its values, so that 1:64 always passes...
_EXPANSION = 64
# ...and for this much in any case.
_ALWAYS = 1 << 30
WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
Contents = tuple[dict[str, Stored], dict[str, Tensor], dict[str, str]]


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
    data = _tensors(path / _file(header), get(header, "tensors", dict))
    weights: dict[str, Stored] = {}
    for key, described in get(header, "weights", dict).items():
        weights[key] = read_weight(key, described, data)
        if key in data and not data[key].numel():  # for readers that know nothing of parts
            del data[key]
    if header["layout"] != layout_version(w.is_int8 or w.is_bfloat16 for w in weights.values()):
        raise bad("its layout version does not match its contents")
    aliases = get(header, "aliases", dict)
    for alias, target in aliases.items():
        if not isinstance(target, str) or (target not in weights and target not in data):
            raise bad(f"the alias {alias!r} names no tensor of the file")
        if alias in weights or alias in data:
            raise bad(f"the alias {alias!r} is a tensor of the file too")
    both = weights.keys() & data.keys()
    if both:
        raise bad(f"{min(both)!r} is stored both packed and dense")
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


def _header(path: Path) -> dict[str, Any]:
    try:
        header = disk.read_json(path, LARGEST_HEADER)
    except OSError as error:
        raise FileFormatError(
            f"'{path}' cannot be read ({error.strerror}): give a folder that nmflow.save wrote"
        ) from error
    except ValueError as error:
        raise bad(f"{HEADER} is not JSON that can be read ({str(error)[:100]})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise bad(f"{HEADER} does not say format {FORMAT!r}")
    if header.get("layout") not in LAYOUT_VERSIONS or type(header["layout"]) is not int:
        raise FileFormatError(
            f"the saved network has layout version {str(header.get('layout'))[:20]}, this nmflow "
            f"reads versions {LAYOUT_VERSIONS[0]} and {LAYOUT_VERSIONS[1]}: use the nmflow that "
            "wrote it"
        )
    return header


def _file(header: dict[str, Any]) -> str:
    name = get(header, "file", str)
    if not WEIGHTS.fullmatch(name):
        raise bad(f"the file name {name[:80]!r} is not one that nmflow writes")
    return name


def _tensors(path: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    data = {}
    try:
        disk.check_regular(path)
        for names in _together(described):
            # What is mapped counts as memory of the process, so the file is mapped anew in between.
            with safe_open(path, framework="pt") as file:
                if set(file.keys()) != set(described):
                    raise bad("its tensors are not those that the header lists")
                for name in names:
                    # A copy: what is checked must not change with the file it is mapped from.
                    data[name] = file.get_tensor(name).clone()
                    _check(name, described[name], data[name])
    except OSError as error:
        raise bad(f"{path.name} cannot be read ({error})") from error
    except (SafetensorError, RuntimeError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise bad(f"{path.name}: {str(error)[:200]}") from error
    return data


def _together(described: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names of tensors in runs of about a million values; without tensors, one empty run."""
    run: list[str] = []
    size = 0
    for name, one in described.items():
        shape = one.get("shape") if isinstance(one, dict) else None
        if not isinstance(shape, list) or not all(is_size(s, 0) for s in shape):
            raise bad(f"the header says nothing of {name!r}")
        run.append(name)
        size += math.prod(shape)
        if size > _MAPPED:
            yield run
            run, size = [], 0
    yield run


def _check(name: str, described: Mapping[str, Any], tensor: Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if described.get("shape") != list(tensor.shape) or described.get("dtype") != dtype:
        raise bad(f"{name!r} has another shape or dtype than the header says")
    if described.get("sha256") != checksum(tensor):
        raise bad(f"{name!r} does not have the checksum that the header gives")
