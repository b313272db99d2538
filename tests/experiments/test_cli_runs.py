"""What `train` and `sweep` say and how they end: lines of a log, signals, killed workers, JSON."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from rich.console import Console
from typer.testing import CliRunner

import processes
from nmflow.cli import app
from nmflow.cli._progress import Bars, Lines, watcher
from nmflow.experiments import checkpoints, pool
from nmflow.experiments.recorder import Progress
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.runner import run_all
from nmflow.experiments.training import train
from small_runs import DEMO, experiment, one

SMALL = {**DEMO["training"], "steps": 4, "save_every": 2, "log_every": 2, "eval_rows": 4}
APART = ("train_seconds", "resumed_at")


def lines(given: list[tuple[float, Progress]], runs: list[Any]) -> list[str]:
    """What is written of progress that is heard at these times, without the dates."""
    out, now = io.StringIO(), [0.0]
    watching = Lines(runs, Console(file=out, width=200), clock=lambda: now[0])
    with watching:
        for at, progress in given:
            now[0] = at
            watching.notify(progress)
    return [line[20:] for line in out.getvalue().splitlines()]


def test_a_line_comes_with_time_phase_beginning_and_end() -> None:
    run = one("mdgf-linear")
    name = "mdgf-linear 1:8 seed 0"

    def at(step: int, loss: float | None = None, phase: str = "dense") -> Progress:
        return Progress(run.id, step, 1000, loss, phase)

    assert lines(
        [(0, at(0)), (10, at(10, 2.5)), (31, at(31)), (40, at(40)), (50, at(50, 2.0, "decay")),
         (60, at(60, 1.5, "decay")), (81, at(81, None, "decay")), (1000, at(1000, 1.0, "final")),
         (1001, at(1000, None, "final"))],
        [run, one(seed=1)],
    ) == [
        f"{name}: step 0/1,000, dense",
        f"{name}: step 31/1,000, dense, loss 2.5000, 0:16:09 left",
        f"{name}: step 50/1,000, decay, loss 2.0000, 0:15:50 left",
        f"{name}: step 81/1,000, decay, loss 1.5000, 0:15:19 left",
        f"{name}: step 1,000/1,000, final, loss 1.0000, trained, 1 of 2 runs",
    ]  # fmt: skip


def test_bars_are_for_terminals_alone(tmp_path: Path) -> None:
    runs = [one()]
    assert isinstance(watcher(runs, tmp_path, Console(force_terminal=True)), Bars)
    assert isinstance(watcher(runs, tmp_path, Console(file=io.StringIO())), Lines)


def written(folder: Path, **more: Any) -> Path:
    raw = {**DEMO, "training": SMALL, "output": str(folder / "runs"), "threads": 1, **more}
    path = folder / "file.yaml"
    path.write_text(json.dumps(raw))
    return path


def test_train_says_where_it_is_or_nothing(tmp_path: Path) -> None:
    file = written(tmp_path)
    loud = CliRunner().invoke(app(), ["train", str(file), "--workers", "1"])
    assert loud.exit_code == 0, loud.output
    assert "sr-ste 1:8 seed 0: step 0/4" in loud.output
    assert "step 4/4, final, loss" in loud.output
    for output in ([], ["--output", str(tmp_path / "other")]):
        command = ["train", str(file), "--quiet", "--workers", "1", *output]
        quiet = CliRunner().invoke(app(), command)
        assert (quiet.exit_code, quiet.output) == (0, "")


def test_a_sweep_as_json(tmp_path: Path) -> None:
    base = {k: v for k, v in DEMO.items() if k != "recipes"} | {"training": SMALL}
    axes = {"recipe": ["sr-ste"], "pattern": ["1:8", "1:7"]}
    file = tmp_path / "s.yaml"
    file.write_text(json.dumps({"base": base, "axes": axes, "output": str(tmp_path / "s")}))
    found = CliRunner().invoke(app(), ["sweep", str(file), "--workers", "1", "--json"])
    table = json.loads(found.stdout)
    assert [(row["pattern"], row["resumed_at"]) for row in table["cells"]] == [("1:8", "")]
    (failed,) = table["failed"]
    assert "7" in failed["error"]
    assert found.exit_code == 1
    assert "2 cells into" in found.stderr


COMMAND = [sys.executable, "-c", "import nmflow.cli; nmflow.cli.main()"]


@pytest.mark.parametrize(
    ("signum", "workers"),
    [
        pytest.param(signal.SIGINT, 1, id="train"),
        pytest.param(signal.SIGTERM, 2, id="pool", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    signum: int, workers: int, tmp_path: Path
) -> None:
    training = {**DEMO["training"], "steps": 4000, "save_every": 4000, "eval_every": 4000,
                "track_every": 0}  # fmt: skip
    # One run alone takes one worker, which is the command's own process.
    file = written(tmp_path, training=training, seeds=list(range(workers)))
    process = subprocess.Popen(
        [*COMMAND, "train", str(file), "--workers", str(workers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    while "step 0/4,000" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 128 + signum, said
    assert "run the same command again" in said
    assert "Traceback" not in said
    saved = [p for run in (tmp_path / "runs").iterdir() for p in checkpoints.every(run)]
    assert saved
    assert [checkpoints.damage(place) for place in saved] == [None] * len(saved)
    assert all(checkpoints.about(place)["step"] < 4000 for place in saved)


@pytest.mark.parametrize(("deaths", "fails"), [pytest.param(1, 0, marks=pytest.mark.slow), (2, 1)])
def test_a_worker_killed_at_its_start_keeps_no_other_run_from_running(
    deaths: int, fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker dies: its run is tried once more, and the others go on."""
    runs = list(experiment(recipes=["sr-ste"], seeds=[0, 1], training=SMALL).runs())
    died: list[Any] = []

    class Context:
        def __init__(self) -> None:
            self.real = processes.context("spawn")

        def Pipe(self) -> Any:
            return self.real.Pipe()

        def Process(self, target: Any, args: Any, daemon: bool) -> Any:
            # Those at the first place die at once, as if memory were short, as often as is asked.
            if args[3] == 0 and len(died) < deaths:
                died.append(args)
                target, args = signal.raise_signal, (signal.SIGKILL,)
            return self.real.Process(target=target, args=args, daemon=daemon)

    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda kind: Context())
    failed = run_all(runs, tmp_path, workers=2, threads=1)
    assert len(failed) == fails
    for name, sentence in failed:
        assert "was killed by SIGKILL (out of memory?) again" in sentence
        assert name == runs[0].id
    done = [run for run in runs if RunFolder(tmp_path / run.id).finished]
    assert len(done) == 2 - fails


def test_a_pool_without_a_worker_fails_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = list(experiment(recipes=["sr-ste"], seeds=[0, 1], training=SMALL).runs())

    def none(self: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", none)
    failed = run_all(runs, tmp_path, workers=2, threads=1)
    assert [name for name, _ in failed] == [run.id for run in runs]
    assert all("Cannot allocate memory" in sentence for _, sentence in failed)


def test_train_beside_a_sweep_of_the_same_cell(tmp_path: Path) -> None:
    """The second waits, says so, and takes the result of the first."""
    import threading

    run, place = one(training=SMALL), RunFolder(tmp_path / "run")
    whole = train(run, RunFolder(tmp_path / "whole"))
    found: list[Any] = []
    with place.lock():
        second = threading.Thread(target=lambda: found.append(train(run, place)))
        second.start()
        time.sleep(0.3)
        assert not found
    second.join(timeout=120)
    assert {k: v for k, v in found[0].items() if k not in APART} == {
        k: v for k, v in whole.items() if k not in APART
    }
