"""Kill a command at many moments, start it again until it ends, and compare with one left alone.

A script: `python kills.py SPECS.json`. It imports what the commands need once, and forks: each try
is a process of its own that begins at once. A try is killed by SIGKILL either at a random time or
at a random one of the file operations in its output. It prints what it did as JSON, one entry for
each specification.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

# What differs between two runs that ended alike: the clock, and the checkpoints gone on from.
APART = ("train_seconds", "resumed_at")
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")


def attempt(argv: list[str], output: Path, at: int = 0, after: float = 0.0) -> tuple[int, int]:
    """Run a command in a fork; its exit code (−9 if killed), and the operations that it made.

    Args:
        argv: the arguments of `nmflow`.
        output: where operations count.
        at: the operation before which it is killed; 0 never.
        after: seconds after which it is killed; 0 never.
    """
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(reads)
        _child(argv, output, at, writes)
    os.close(writes)
    deadline = time.monotonic() + after
    while True:
        done, status = os.waitpid(child, os.WNOHANG if after else 0)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            after = 0.0
        time.sleep(0.005)
    told = os.read(reads, 64)
    os.close(reads)
    return os.waitstatus_to_exitcode(status), int(told or 0)


def _child(argv: list[str], output: Path, at: int, told: int) -> None:
    import nmflow.cli

    count, inside = 0, str(output)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in EVENTS and isinstance(args[0], str | os.PathLike):
            path = os.fspath(args[0])
            if isinstance(path, str) and path.startswith(inside):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    sys.argv = ["nmflow", *argv]
    code = 0
    try:
        nmflow.cli.main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            os.write(2, ended.code.encode() + b"\n")
        code = ended.code if isinstance(ended.code, int) else bool(ended.code)
    finally:
        os.write(told, str(count).encode())
        os._exit(int(code or 0))


def contents(folder: Path) -> dict[str, Any]:
    """Every file of an output, by its name: what has to be equal."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name == "result.json":
            result = json.loads(path.read_text())
            found[name] = json.dumps({k: v for k, v in result.items() if k not in APART})
        elif path.suffix == ".csv":
            import pandas as pd

            frame = pd.read_csv(path).drop(columns=list(APART), errors="ignore")
            found[name] = frame.to_csv(index=False)
        elif path.name != "results.parquet":
            found[name] = path.read_bytes()
    return found


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Kill as often as the specification says; what happened."""
    folder, draw = Path(spec["folder"]), random.Random(spec["seed"])
    argv = [spec["command"], spec["file"], "--workers", "1", "--quiet", "--output"]
    whole = folder / "whole"
    began = time.monotonic()
    code, operations = attempt([*argv, str(whole)], whole)
    seconds = time.monotonic() - began
    assert code == 0, f"the command left alone ended with {code}"
    expected = contents(whole)
    kills, lives, resumed = 0, 0, 0
    while kills < spec["kills"]:
        lives += 1
        life = folder / "life"
        while True:
            by_time = draw.random() < spec["timed"]
            at = 0 if by_time else draw.randint(1, operations)
            after = draw.uniform(0.01, seconds) if by_time else 0.0
            if kills >= spec["kills"]:
                at, after = 0, 0.0
            code, _ = attempt([*argv, str(life)], life, at, after)
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"a try ended with {code}"
            kills += 1
        found = contents(life)
        differ = sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n))
        assert not differ, f"after {kills} kills {differ} differ"
        results = [json.loads(p.read_text()) for p in life.rglob("result.json")]
        resumed += sum(len(r["resumed_at"]) for r in results)
        shutil.rmtree(life)
    return {
        "kills": kills, "lives": lives, "resumed": resumed, "operations": operations,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


if __name__ == "__main__":
    import nmflow.cli
    import nmflow.experiments.runner
    import nmflow.experiments.sweep_table
    import nmflow.experiments.tasks  # noqa: F401

    print(json.dumps([main(spec) for spec in json.loads(Path(sys.argv[1]).read_text())]))
