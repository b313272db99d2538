"""Files of strangers and folders of many writers.

A reader opens regular files only, and its JSON is strict. A writer holds the folder, and what it
writes takes its place whole. Mistakes are `OSError` and `ValueError`: whoever calls says which
argument was wrong.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

Name = str | os.PathLike[str]

LOCK = ".nmflow.lock"
_TEMPORARY = ".nmflow-"
_LARGEST_JSON = 64 << 20
# Without it, opening a pipe waits until somebody writes to it.
_FLAGS = sum(
    getattr(os, name, 0) for name in ("O_RDONLY", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY")
)
_held = threading.local()


def open_regular(path: Name) -> BinaryIO:
    """Open a regular file, or what a link to one names, for reading bytes.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    try:
        handle = os.open(path, _FLAGS)
    except ValueError:  # a zero byte in the name
        raise OSError(errno.EINVAL, "no file can have this name") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(handle, "rb")


def check_regular(path: Name) -> None:
    """Raise `OSError` unless `open_regular` would open the file: for libraries that open it."""
    open_regular(path).close()


def read_bytes(path: Name, limit: int | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises `OSError`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is None:
            return file.read()
        content = b"" if size > limit else file.read(limit + 1)
        if size > limit or len(content) > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, above the limit of {limit:,}")
        return content


def read_json(path: Name, limit: int = _LARGEST_JSON) -> Any:
    """The value in a JSON file; raises `OSError`, and `ValueError` as `parse_json`."""
    return parse_json(read_bytes(path, limit))


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text, read strictly.

    Raises:
        ValueError: it is no UTF-8 or no JSON, has a key twice, a number that is not finite, or is
            nested beyond what Python can follow.

    Example:
        >>> parse_json('{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        return json.loads(
            text, object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_whole(path: Name, content: bytes | str) -> None:
    """Write a file whole or not at all, within `locked(folder)`; raises `OSError`."""
    target = Path(path)
    temporary = temporary_in(target.parent)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        put(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def put(temporary: Name, target: Name) -> None:
    """Flush a file to the disk and move it to its place in one step."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def temporary_in(folder: Name) -> Path:
    """A name for what is not whole yet; a later `locked` removes what a killed process left."""
    return Path(folder) / f"{_TEMPORARY}{secrets.token_hex(8)}"


@contextlib.contextmanager
def locked(folder: Name) -> Iterator[None]:
    """Hold a folder against every other writer, in this process and in others.

    Waits for another writer; one that was killed holds nothing, and its leftovers are removed. A
    thread may hold a folder that it holds already. Readers are not kept out.

    Args:
        folder: a folder that is there.

    Raises:
        OSError: it cannot be written.
    """
    key = os.path.realpath(folder)
    mine: set[str] = _held.__dict__.setdefault("folders", set())
    if key in mine:
        yield
        return
    with _lock(Path(key) / LOCK):
        mine.add(key)
        try:
            for leftover in Path(key).glob(f"{_TEMPORARY}*"):
                _remove(leftover)
            yield
        finally:
            mine.discard(key)


@contextlib.contextmanager
def staging(folder: Name) -> Iterator[Path]:
    """An empty folder within a `locked` one, for files that are moved into place together."""
    with locked(folder):
        made = temporary_in(folder)
        made.mkdir()
        try:
            yield made
        finally:
            _remove(made)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    if fcntl is None:
        from filelock import FileLock  # torch depends on it

        with FileLock(str(path)):
            yield
        return
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.open(path, flags, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink:  # else its last holder removed it while we waited
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(items)
    if len(made) != len(items):
        raise ValueError("a key occurs twice")
    return made


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value
