"""Run folders: what is finished, what goes on, and what a kill has left."""

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


# What a report reads of a result.
_READ = {
    *("run", "id", "recipe", "pattern", "seed", "headline", "setting_hash", "data", "test"),
    *("history", "tracked", "noise", "audit", "cost", "versions", "machine"),
}


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
    def lock(self, what: str = "") -> Iterator[None]:
        """Hold the folder, waiting for another process that does; a killed one holds nothing.

        Args:
            what: what is held, to be said where it has to be waited for.
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
        """Remove what killed writers have left; for whoever holds the lock."""
        for path in self._leftovers():
            remove(path)

    def tidy_if_free(self) -> None:
        """`tidy`, where something is left and no process holds the folder."""
        if self._leftovers() and not self.busy:
            with self.lock():
                self.tidy()

    def _leftovers(self) -> list[Path]:
        over = checkpoints.every(self.path) if self.finished else []
        return [*left_over(self.path), *over]

    def last_checkpoint(self, clean: bool = True) -> Path | None:
        """The newest whole checkpoint; see `checkpoints.newest`."""
        return checkpoints.newest(self.path, clean)

    def clear_checkpoints(self) -> None:
        """Remove what only a run in progress needs."""
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
