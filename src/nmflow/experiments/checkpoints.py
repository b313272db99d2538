"""Complete checkpoints of a run: a mark, written last, holds a digest of every file."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from nmflow.errors import ConfigError
from nmflow.experiments.files import write_json

log = logging.getLogger("nmflow")

MARK = "nmflow.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def place(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step, as the `Trainer` names it."""
    return run / f"checkpoint-{step}"


def every(run: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the newest first."""
    found = [p for p in run.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def mark(folder: Path, about: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, with what a resume needs."""
    files = {p.relative_to(folder).as_posix(): _sha(p) for p in _files(folder)}
    said = {**about, "files": files}
    write_json(folder / MARK, {**said, "digest": _digest(said)})


def about(folder: Path) -> dict[str, Any]:
    """What `mark` wrote for a checkpoint.

    Raises:
        ValueError: the mark is damaged, or of a version that wrote no digests.
    """
    said = json.loads((folder / MARK).read_text(encoding="utf-8"))
    if not isinstance(said, dict) or said.pop("digest", None) != _digest(said):
        raise ValueError(f"{MARK} is damaged, or from an earlier version")
    return said


def damage(folder: Path) -> str | None:
    """What is wrong with a marked checkpoint, in words; None if it is complete."""
    try:
        for name, digest in about(folder)["files"].items():
            if _sha(folder / name) != digest:
                return f"{name} is not what was written"
    except ValueError:
        return f"{MARK} is damaged, or from an earlier version"
    except FileNotFoundError as error:
        # Perhaps removed just now: the first of several processes removes damaged ones.
        return f"{Path(str(error.filename)).name} is missing"
    return None


def newest(run: Path, clean: bool = True) -> Path | None:
    """The newest complete checkpoint. Others are removed, with a warning if they are damaged.

    Args:
        run: the folder of the run.
        clean: remove what no run can resume from; True in one process of several.

    Raises:
        ConfigError: a checkpoint that may not be read.
    """
    damaged = []
    for folder in every(run):
        try:
            # Without a mark: a kill came before it, so the checkpoint before is used.
            said = damage(folder) if (folder / MARK).is_file() else ""
        except OSError as error:
            raise ConfigError(
                f"{str(folder)!r} cannot be read ({error.strerror or error}): give this user "
                "the right to, or delete it"
            ) from None
        if said is None:
            _say(damaged, f"the run continues from {folder.name}", clean)
            return folder
        if said:
            damaged.append(f"{str(folder)!r} is damaged ({said})")
        if clean:
            shutil.rmtree(folder, ignore_errors=True)
    _say(damaged, "the run starts anew", clean)
    return None


def _say(damaged: list[str], then: str, clean: bool) -> None:
    if damaged and clean:
        log.warning("%s: %s", "; ".join(damaged), then)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MARK)


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _sha(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
