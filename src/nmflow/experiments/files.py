"""Write whole files only, and find what killed writers left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nmflow import disk
from nmflow.errors import ConfigError

_LEFT = re.compile(r"\..+\.[0-9a-f]{32}")


@contextlib.contextmanager
def one_sentence(path: Path | str) -> Iterator[None]:
    """Turn an OSError while writing `path` (full disk, no permission) into one ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"output is {str(path)!r} and cannot be written ({error.strerror or error}): "
            "free some space or choose another folder"
        ) from None


def check_writable(folder: Path) -> None:
    """Make a folder, and check that it can be written, before a run starts.

    Raises:
        ConfigError: it cannot be written.
    """
    with one_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def beside(path: Path) -> Path:
    """A unique name in the folder of `path`, for what is then moved to `path`.

    `tempfile` is not used: only the owner may read its files, but results may be on shared storage.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def left_over(folder: Path) -> list[Path]:
    """What killed writers left in a folder: names from `beside`."""
    return [p for p in folder.glob(".*") if _LEFT.fullmatch(p.name)]


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: a temporary file beside it, flushed, then renamed."""
    data = content.encode() if isinstance(content, str) else content
    with one_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = beside(path)
        try:
            with open(name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def write_json(path: Path, value: Any) -> None:
    """Write plain values; NaN is refused so that every reader can parse the file."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote."""
    try:
        return disk.read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read ({error}): delete it and run again"
        ) from None
