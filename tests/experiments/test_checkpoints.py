"""Checkpoints are whole or not gone on from, whatever file of them is damaged, and however."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from nmflow.experiments import checkpoints, stopping
from nmflow.experiments.files import beside
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.training import train
from small_runs import DEMO, one

TRAINING = {**DEMO["training"], "steps": 12, "save_every": 4, "log_every": 2, "track_every": 1}
APART = ("train_seconds", "resumed_at")


def same(*results: dict[str, Any]) -> bool:
    """Whether results are written in the same bytes, but for what is told apart."""
    kept = [{k: v for k, v in result.items() if k not in APART} for result in results]
    return len({json.dumps(result) for result in kept}) == 1


@contextlib.contextmanager
def signalled(at: int, signum: int = signal.SIGTERM) -> Iterator[Callable[[Any], None]]:
    """A watcher that sends a signal to this process, once, after a step."""
    with stopping.watched():

        def send(now: Any) -> None:
            if now.step >= at and not stopping.asked():
                os.kill(os.getpid(), signum)

        yield send


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    """A run of 12 steps stopped after its eleventh, with the result of one that was left alone."""
    folder = tmp_path_factory.mktemp("stopped")
    run = one("mdgf-linear", training={**TRAINING, "noise_batches": 2})
    whole = train(run, RunFolder(folder / "whole"))
    with signalled(10) as send, pytest.raises(stopping.Stopped):
        train(run, RunFolder(folder / "run"), send)
    names = [p.name for p in checkpoints.every(folder / "run")]
    assert names == ["checkpoint-11", "checkpoint-8"]
    return run, folder / "run", whole


FILES = (
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "tracker-0.pt", "config.json", checkpoints.MARK,
)  # fmt: skip


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": cut,
    "empty": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(os.urandom(200)),
    "flipped": flip,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_not_gone_on_from(
    name: str, damage: str, stopped: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(shutil.copytree(stopped[1], tmp_path / "run"))
    DAMAGES[damage](folder.path / "checkpoint-11" / name)
    assert folder.last_checkpoint() == folder.path / "checkpoint-8"
    assert not (folder.path / "checkpoint-11").exists()
    # Without its mark it is one that a kill left half-written, which is no damage.
    said = (
        [] if (name, damage) == (checkpoints.MARK, "missing") else ["continues from checkpoint-8"]
    )
    assert [r.getMessage().partition(": the run ")[2] for r in caplog.records] == said
    caplog.clear()
    DAMAGES[damage](folder.path / "checkpoint-8" / name)
    assert folder.last_checkpoint() is None
    assert [r.getMessage().partition(": the run ")[2] for r in caplog.records] == (
        ["starts anew"] if said else []
    )


def test_the_checkpoint_before_ends_in_the_same_result(stopped: Any, tmp_path: Path) -> None:
    run, folder, whole = stopped
    for damaged, resumed in ((), [11]), (("11",), [8]), (("11", "8"), []):
        place = RunFolder(shutil.copytree(folder, tmp_path / "-".join(["run", *damaged])))
        for step in damaged:
            cut(place.path / f"checkpoint-{step}" / "optimizer.pt")
        found = train(run, place)
        assert found["resumed_at"] == resumed
        assert same(found, whole), resumed


def test_a_signal_saves_between_two_entries_of_the_log(tmp_path: Path) -> None:
    """The loss of an entry is the mean over steps before and after the stop."""
    run = one("mdgf-linear", training={**TRAINING, "log_every": 4})
    whole = train(run, RunFolder(tmp_path / "whole"))
    place = RunFolder(tmp_path / "run")
    for step, signum in ((3, signal.SIGINT), (5, signal.SIGTERM), (6, signal.SIGINT)):
        with pytest.MonkeyPatch.context() as patch, signalled(step, signum) as send:
            patch.setattr("nmflow.experiments.recorder.PULSE", 0.0)
            with pytest.raises(stopping.Stopped) as caught:
                train(run, place, send)
        assert caught.value.exit_code == 128 + signum
        assert "run the same command again" in str(caught.value)
    found = train(run, place)
    assert found["resumed_at"] == sorted(found["resumed_at"])
    assert len(found["resumed_at"]) == 3
    assert any(step % 4 for step in found["resumed_at"])
    assert same(found, whole)


@pytest.mark.parametrize(("signum", "ends"), [(signal.SIGINT, 7), (signal.SIGTERM, -15)])
def test_forks_that_load_data_outlive_ctrl_c_and_end_when_told(signum: int, ends: int) -> None:
    with stopping.watched(), stopping.held():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signum)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ends
        assert stopping.asked() is None


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    run, place = one(training=TRAINING), RunFolder(tmp_path)
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with stopping.watched():

        def twice(now: Any) -> None:
            if now.step >= 6:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(stopping.Stopped):
            train(run, place, twice)
    assert [p.name for p in checkpoints.every(tmp_path)] == ["checkpoint-4"]
    assert signal.getsignal(signal.SIGINT) is before


def test_what_kills_left_is_removed(tmp_path: Path) -> None:
    run, place = one(training={**TRAINING, "steps": 2}), RunFolder(tmp_path / "run")
    place.path.mkdir()
    for name in ("result.json", "model"):
        left = beside(place.path / name)
        left.mkdir() if name == "model" else left.write_text("{")
    (place.path / "checkpoint-1").mkdir()
    (place.path / "checkpoint-x").write_text("of somebody else")
    train(run, place)
    names = {p.name for p in place.path.iterdir()}
    assert names == {".lock", "config.json", "model", "result.json", "checkpoint-x"}
    # And of a run that was finished when it was killed.
    beside(place.path / "model").mkdir()
    (place.path / "checkpoint-1").mkdir()
    with place.lock():
        place.tidy_if_free()  # somebody else's, for all that is known
        assert (place.path / "checkpoint-1").exists()
    place.tidy_if_free()
    assert {p.name for p in place.path.iterdir()} == names


def test_a_stale_lock_holds_nobody_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = RunFolder(tmp_path)
    (tmp_path / ".lock").write_text("12345 a machine that was switched off")
    assert not place.busy
    with caplog.at_level(logging.WARNING), place.lock("run"):
        assert place.busy
    assert not caplog.records
