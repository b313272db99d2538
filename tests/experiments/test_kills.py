"""`train` and `sweep` killed at any moment end in the same bytes as if they had been left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from nmflow.experiments import config as configs
from nmflow.experiments import smoke
from small_runs import DEMO

ROOT = Path(__file__).parents[2]
TWO_CORES = sorted(path.stem for path in ROOT.glob("configs/two-cores/*.yaml"))
KILLS = int(os.environ.get("NMFLOW_KILLS", "25"))


def killed(
    raw: dict[str, Any], commands: list[str], kills: int, tmp_path: Path, cache: Path,
    timed: float = 0.5,
) -> list[Any]:  # fmt: skip
    """Kill each command on a file so often; what `kills.py` says of each.

    `timed` is the share of kills at a time; the others come before a file operation.
    """
    specs = []
    for command in commands:
        folder = tmp_path / command
        folder.mkdir()
        told = raw
        if command == "sweep":
            base = {k: v for k, v in raw.items() if k not in ("recipes", "seeds", "output")}
            axes = {"recipe": raw["recipes"], "seed": raw.get("seeds", [0])}
            told = {"name": "s", "base": base, "axes": axes}
        file = folder / "file.yaml"
        file.write_text(json.dumps(told))
        specs.append({"folder": str(folder), "file": str(file), "command": command,
                      "kills": kills, "timed": timed, "seed": 0})  # fmt: skip
    (tmp_path / "specs.json").write_text(json.dumps(specs))
    script = Path(__file__).parents[1] / "support" / "kills.py"
    ours = {"NMFLOW_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "specs.json")],
        capture_output=True, text=True, env={**os.environ, **ours}, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(json.dumps(dict(zip(commands, found, strict=True))))
    return found


def test_kills_at_any_file_operation(tmp_path: Path) -> None:
    training = {**DEMO["training"], "steps": 12, "save_every": 4, "log_every": 2, "track_every": 1}
    raw = {**DEMO, "training": training, "recipes": ["mdgf-linear"]}
    commands = ["train", "sweep"]
    found = killed(raw, commands, 6, tmp_path, tmp_path / "cache", timed=0.0)
    assert [one["kills"] for one in found] == [6, 6]
    assert all(one["operations"] > 20 for one in found)
    assert sum(one["resumed"] for one in found) > 0  # some went on from a checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize("name", TWO_CORES)
def test_kills_on_every_architecture(name: str, command: str, tmp_path: Path) -> None:
    experiment = configs.load(ROOT / "configs" / "two-cores" / f"{name}.yaml")
    run, _ = smoke.shrunk(experiment, tmp_path / "data")
    raw = run.model_dump(mode="json", exclude={"recipe", "seed"})
    raw["training"] |= {"steps": 12, "log_every": 2, "eval_every": 4, "save_every": 4,
                        "track_every": 2}  # fmt: skip
    raw["recipes"] = ["mdgf-exponential"]
    (found,) = killed(raw, [command], KILLS, tmp_path, tmp_path)
    assert found["kills"] == KILLS
    assert KILLS < 10 or found["resumed"]
