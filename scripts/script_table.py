"""Tries the lines of docs/howto/scripts.md in scripts of others: whole, and stopped and resumed.

    python scripts/script_table.py [--control] FOLDER [NAME …]

What a script needs beside what nmflow does is looked for in $SCRIPT_PATH, if it is not installed.
FOLDER holds clones of the repositories in script_table.yaml, under their names; nothing in them is
written. Each script runs with our lines in a folder of its own, on the tiny data of script_data.py,
whole and stopped in mid-training, and what it saves last is compared bit by bit. `--control` runs
it as it is, too.

Where a script begins its random numbers anew on a resume, its data are such that their order and
crops make no difference: one example, again and again.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import script_data
import torch
import yaml
from safetensors.torch import load_file

import nmflow

HERE = Path(__file__).parent
PATTERN = "1:16"


@dataclass
class Script:
    """One script of others: an entry of script_table.yaml, which explains the fields."""

    file: str
    edits: list[dict[str, str]]
    command: str
    data: str
    state: str
    stop: int = 0
    resume: list[str] | None = None
    beside: list[str] = field(default_factory=list)
    always: list[dict[str, str]] = field(default_factory=list)
    whole: list[dict[str, str]] = field(default_factory=list)
    site: list[str] = field(default_factory=lambda: ["script_site.py"])
    launch: list[str] = field(default_factory=lambda: [sys.executable])


def edited(text: str, edits: list[dict[str, str]]) -> str:
    """A script with some edits; each place is found once."""
    for edit in edits:
        (how, old), (_, added) = edit.items()
        assert text.count(old) == 1, f"{text.count(old)} times: {old!r}"
        new = {"before": added + old, "after": old + added, "replace": added}[how]
        text = text.replace(old, new)
    return text


def lines(script: Script, text: str) -> int:
    """How many lines are added or changed."""
    both = difflib.ndiff(text.splitlines(), edited(text, script.edits).splitlines())
    return sum(line.startswith("+ ") for line in both)


def run(script: Script, clones: Path, ours: bool, stopped: bool) -> dict[str, torch.Tensor]:
    """Train, and give every tensor of what is saved last."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        getattr(script_data, script.data)(place)
        site = "".join((HERE / name).read_text(encoding="utf-8") for name in script.site)
        (place / "sitecustomize.py").write_text(site, encoding="utf-8")
        for file in script.beside:
            shutil.copy(clones / file, place)
        text = edited((clones / script.file).read_text(encoding="utf-8"), script.always)
        text = edited(text, script.edits) if ours else text
        name = Path(script.file).name
        (place / name).write_text(text if stopped else edited(text, script.whole), "utf-8")
        command = [*script.launch, name, *script.command.split()]
        if stopped:
            stop = script.stop
            first = {"STOP_BEFORE": str(stop)} if stop > 0 else {}
            ended = _call(command, place, first)
            assert (ended.returncode == 9) == (stop > 0), ended.stderr[-3000:]
            command += script.resume or []
            ended = _call(command, place, {"BATCHES_BEFORE": str(max(0, -stop))})
        else:
            ended = _call(command, place, {})
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
        if os.environ.get("VERBOSE"):
            print(ended.stdout[-1500:], ended.stderr[-1500:])
        files = sorted(place.glob(script.state), key=lambda f: f.stat().st_mtime_ns)
        assert files, f"nothing under {script.state}"
        return _tensors(files if script.state.endswith("*") else files[-1:], place)


def _call(command: list[str], place: Path, more: dict[str, str]) -> Any:
    path = os.pathsep.join(
        [str(place), *map(os.environ.get, ("PYTHONPATH", "SCRIPT_PATH"), ("",) * 2)]
    )
    known = {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HOME": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    known |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "WANDB_MODE": "disabled", **more}
    return subprocess.run(
        command, cwd=place, env=known, capture_output=True, text=True, check=False
    )


def _tensors(files: list[Path], place: Path) -> dict[str, torch.Tensor]:
    sys.path.insert(0, str(place))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            saved: Any = load_file(file)
        elif file.suffix in (".pt", ".tar", ".ckpt", ".bin"):
            saved = torch.load(file, weights_only=False, map_location="cpu")
        else:
            continue
        saved = saved.state_dict() if isinstance(saved, torch.nn.Module) else saved
        saved.pop("callbacks", None)  # Lightning's, with paths of files
        _flatten(saved, file.name, found)
    sys.path.remove(str(place))
    for module in ("model", "data"):
        sys.modules.pop(module, None)
    return found


def _flatten(value: Any, name: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value
    elif isinstance(value, dict):
        for key, one in value.items():
            _flatten(one, f"{name}/{key}", found)
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            _flatten(one, f"{name}/{i}", found)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str:
    """`yes`, or what differs."""
    if a.keys() != b.keys():
        return f"no: other tensors {sorted(a.keys() ^ b.keys())[:3]}"
    off = [name for name in a if not torch.equal(a[name], b[name])]
    return f"no: {len(off)} of {len(a)} tensors, {off[:3]}" if off else "yes"


def sparse(state: dict[str, torch.Tensor], pattern: str) -> str:
    """How many weights hold the pattern, of those that are no optimizer's."""
    held = [
        name
        for name, x in state.items()
        if x.ndim >= 2 and not name.startswith("optimizer") and "/optimizer" not in name
        and x.shape[1] % int(pattern.split(":")[1]) == 0 and nmflow.holds(x, pattern)
    ]  # fmt: skip
    return f"{len(held)} weights hold {pattern}" + (
        f", {sum('ema' in name for name in held)} in the EMA"
        if any("ema" in n for n in held)
        else ""
    )


def main(asked: list[str]) -> None:
    """Print one row a script."""
    both = "--control" in asked
    clones, *names = (one for one in asked if one != "--control")
    clones = Path(clones).resolve()
    table = yaml.safe_load((HERE / "script_table.yaml").read_text(encoding="utf-8"))
    for name in names or table:
        script = Script(**table[name])
        row = [name, str(lines(script, (clones / script.file).read_text(encoding="utf-8")))]
        for ours in (False, True) if both else (True,):
            whole = run(script, clones, ours, False)
            if script.resume is None:
                row.append("has none")
            else:
                row.append(equal(whole, run(script, clones, ours, True)))
            if ours:
                row.append(sparse(whole, PATTERN))
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
