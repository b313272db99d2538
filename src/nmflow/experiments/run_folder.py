"""Run folders: what is finished, what goes on, and files that are never half-written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nmflow.errors import ConfigError

RESULT, CONFIG, MODEL, LOCK, MARK = "result.json", "config.json", "model", ".lock", "nmflow.json"
SWEEP = "sweep.json"


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
    """Make a folder, and make sure that it can be written, before a run is begun.

    Raises:
        ConfigError: it cannot.
    """
    with one_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


# What a report reads of a result.
_READ = {
    *("run", "id", "recipe", "pattern", "seed", "headline", "setting_hash", "data", "test"),
    *("history", "tracked", "noise", "audit", "cost", "versions", "machine"),
}


def beside(path: Path) -> Path:
    """A name in the folder of `path` that nothing else has, for what is moved into its place.

    Not by `tempfile`, whose files and folders their owner alone may read: results lie on storage
    that others share.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


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
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read ({error}): delete it and run again"
        ) from None


class RunFolder:
    """One run on disk: `config.json`, checkpoints while it runs, then `model/` and `result.json`.

    A run is finished when `result.json` is there; it is written last, in one piece.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return (self.path / RESULT).is_file()

    @property
    def busy(self) -> bool:
        """Whether some process holds the run just now."""
        if not (self.path / LOCK).exists():
            return False
        lock = FileLock(str(self.path / LOCK))
        with one_sentence(self.path):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return True
            lock.release()
        return False

    def result(self) -> dict[str, Any]:
        """The finished run's figures."""
        return read_json(self.path / RESULT)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run, waiting for another process that does; a killed one holds nothing."""
        lock = FileLock(str(self.path / LOCK), poll_interval=0.5)
        with one_sentence(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; those that a kill left half-written are removed."""
        whole: list[tuple[int, Path]] = []
        for folder in self.path.glob("checkpoint-*"):
            if (folder / MARK).is_file():
                whole.append((int(folder.name.rpartition("-")[2]), folder))
            else:
                shutil.rmtree(folder, ignore_errors=True)
        return max(whole)[1] if whole else None

    def clear_checkpoints(self) -> None:
        """Remove what only a run in progress needs."""
        for folder in self.path.glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def put_folder(self, name: str, fill: Any) -> None:
        """Let `fill(path)` write a folder beside the run, then move it into place whole."""
        with one_sentence(self.path / name):
            staging = beside(self.path / name)
            try:
                staging.mkdir()
                fill(staging)
                shutil.rmtree(self.path / name, ignore_errors=True)
                os.replace(staging, self.path / name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def finished_runs(folders: list[Path | str]) -> list[dict[str, Any]]:
    """The results under the folders, in the order of their names; of a sweep's, its own cells.

    Raises:
        ConfigError: a folder that is not there, or that holds no finished run.
    """
    found: dict[Path, dict[str, Any]] = {}  # sweeps may share runs
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(
                f"runs is {str(folder)!r}: no such folder; give the output of a training"
            )
        for path in _results_in(Path(folder)):
            found.setdefault(path.resolve(), {**_whole(path), "folder": str(path.parent)})
    if not found:
        raise ConfigError(
            f"runs is {', '.join(str(f) for f in folders)!r}: no finished run (no {RESULT}) in it; "
            "train first with 'nmflow train CONFIG'"
        )
    return list(found.values())


def unfinished_runs(folders: list[Path | str]) -> list[str]:
    """The names of runs under the folders that have no result yet, a sweep's cells included."""
    names: dict[str, None] = {}
    for folder in map(Path, folders):
        if (folder / SWEEP).is_file():
            sweep = read_json(folder / SWEEP)
            places = [folder / sweep["cells_in"] / cell["id"] for cell in sweep["cells"]]
        else:
            # A network that a run saved has a configuration of its own, inside the run's folder.
            configs = sorted(folder.rglob(CONFIG))
            places = [p.parent for p in configs if not (p.parent.parent / CONFIG).is_file()]
        names |= {place.name: None for place in places if not (place / RESULT).is_file()}
    return list(names)


def _whole(path: Path) -> dict[str, Any]:
    """A result that a report can read: one of an older version is refused."""
    result = read_json(path)
    absent = sorted(_READ - set(result)) if isinstance(result, dict) else ["a mapping"]
    if absent:
        raise ConfigError(
            f"runs holds {str(path)!r}, which lacks {', '.join(absent)}: it is of an older "
            "version; train that run again, or name other folders"
        )
    return result


def _results_in(folder: Path) -> list[Path]:
    if not (folder / SWEEP).is_file():
        return sorted(folder.rglob(RESULT))
    sweep = read_json(folder / SWEEP)
    places = [folder / sweep["cells_in"] / cell["id"] / RESULT for cell in sweep["cells"]]
    return [place for place in places if place.is_file()]
