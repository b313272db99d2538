"""Run folders: finished runs, runs at work, and leftovers of killed ones."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nmflow.errors import ConfigError
from nmflow.experiments import checkpoints
from nmflow.experiments.files import beside, left_over, one_sentence, read_json, remove

log = logging.getLogger("nmflow")

RESULT, CONFIG, MODEL, LOCK = "result.json", "config.json", "model", ".lock"
SWEEP = "sweep.json"


# The keys of a result that a report reads.
_READ = {
    *("run", "id", "recipe", "pattern", "seed", "headline", "setting_hash", "data", "test"),
    *("history", "tracked", "noise", "audit", "cost", "versions", "machine"),
}


class RunFolder:
    """One run on disk: `config.json`, checkpoints while it runs, then `model/` and `result.json`.

    A run is finished once `result.json` exists. It is written last, and whole.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return (self.path / RESULT).is_file()

    @property
    def busy(self) -> bool:
        """Whether a process holds the run now."""
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
    def lock(self, what: str = "") -> Iterator[None]:
        """Hold the folder, after waiting for any process that does; a killed one does not.

        Args:
            what: the name of the folder in the message about waiting.
        """
        lock = FileLock(str(self.path / LOCK))
        with one_sentence(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if what:
                    log.warning("%s is held by another process: waiting for it", what)
                lock.acquire(poll_interval=0.5)
        try:
            yield
        finally:
            lock.release()

    def tidy(self) -> None:
        """Remove what killed writers left; the caller holds the lock."""
        for path in self._leftovers():
            remove(path)

    def tidy_if_free(self) -> None:
        """Call `tidy` if something is left and no process holds the folder."""
        if self._leftovers() and not self.busy:
            with self.lock():
                self.tidy()

    def _leftovers(self) -> list[Path]:
        over = checkpoints.every(self.path) if self.finished else []
        return [*left_over(self.path), *over]

    def last_checkpoint(self, clean: bool = True) -> Path | None:
        """The newest complete checkpoint; see `checkpoints.newest`."""
        return checkpoints.newest(self.path, clean)

    def clear_checkpoints(self) -> None:
        """Remove checkpoints, which only a run in progress needs."""
        for folder in checkpoints.every(self.path):
            remove(folder)

    def put_folder(self, name: str, fill: Any) -> None:
        """Let `fill(path)` write a folder beside the run, then move it into place whole."""
        with one_sentence(self.path / name):
            staging = beside(self.path / name)
            try:
                staging.mkdir()
                fill(staging)
                remove(self.path / name)
                os.replace(staging, self.path / name)
            finally:
                remove(staging)


def finished_runs(folders: list[Path | str]) -> list[dict[str, Any]]:
    """The results under the folders, ordered by name; a sweep's folder has those of its cells.

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
            # A saved network has a config.json too, inside the run's folder.
            configs = sorted(folder.rglob(CONFIG))
            places = [p.parent for p in configs if not (p.parent.parent / CONFIG).is_file()]
        names |= {place.name: None for place in places if not (place / RESULT).is_file()}
    return list(names)


def _whole(path: Path) -> dict[str, Any]:
    """The result, or an error if an older version wrote it."""
    result = read_json(path)
    absent = sorted(_READ - set(result)) if isinstance(result, dict) else ["a mapping"]
    if absent:
        raise ConfigError(
            f"runs holds {str(path)!r}, which lacks {', '.join(absent)}: it is from an older "
            "version; train that run again, or name other folders"
        )
    return result


def _results_in(folder: Path) -> list[Path]:
    if not (folder / SWEEP).is_file():
        return sorted(path for path in folder.rglob(RESULT) if path.is_file())
    sweep = read_json(folder / SWEEP)
    places = [folder / sweep["cells_in"] / cell["id"] / RESULT for cell in sweep["cells"]]
    return [place for place in places if place.is_file()]
