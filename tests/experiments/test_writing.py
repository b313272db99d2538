"""What a run writes: whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from nmflow.errors import ConfigError
from nmflow.experiments.files import write
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.training import train
from small_runs import one


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a.json", "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_is_written_may_be_read_by_others(tmp_path: Path):
    before = os.umask(0o022)
    try:
        write(tmp_path / "a.json", "{}")
        RunFolder(tmp_path).put_folder("model", lambda place: (place / "x").write_text(""))
    finally:
        os.umask(before)
    assert [oct((tmp_path / n).stat().st_mode & 0o777) for n in ("a.json", "model")] == [
        "0o644",
        "0o755",
    ]


def test_a_disk_that_fills_up_in_mid_run_is_one_sentence(tmp_path: Path):
    # No file may grow past a limit that result and config fit into, but no checkpoint.
    script = (
        "import resource, sys, pathlib\n"
        "from nmflow.errors import NMFlowError\n"
        "from nmflow.experiments.config import Run\n"
        "from nmflow.experiments.run_folder import RunFolder\n"
        "from nmflow.experiments.training import train\n"
        "run = Run.model_validate_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    train(run, RunFolder(sys.argv[2]))\n"
        "except NMFlowError as error:\n"
        "    sys.exit(f'one sentence: {error}')\n"
    )
    (tmp_path / "run.json").write_text(one().model_dump_json())
    command = [sys.executable, "-c", script, str(tmp_path / "run.json"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.startswith("one sentence: output is")
    assert "cannot be written" in done.stderr
    assert list((tmp_path / "run").glob("checkpoint-*")) == []
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_folder_that_is_a_file_cannot_be_written_to(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(one(), RunFolder(tmp_path / "runs" / "x"))
