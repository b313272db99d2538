"""Runs on the Trainer: their result, their resume, several at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nmflow
import processes
from nmflow.errors import NMFlowError
from nmflow.experiments import checkpoints, pool, tasks, trainer
from nmflow.experiments.pool import cores_of
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.runner import run_all, share
from nmflow.experiments.training import train
from small_runs import DEMO, TINY, experiment, one


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "recipe", ["dense", "sr-ste", "gradual", "mdgf-linear", "sdgf-geometric", "hybrid"]
)
def test_a_run_ends_as_an_audited_network(recipe: str, tmp_path: Path):
    run = one(recipe, training={**DEMO["training"], "noise_batches": 3})
    seen = []
    found = train(run, RunFolder(tmp_path), seen.append)
    assert found["audit"]["ok"] == (recipe != "dense")
    assert {"loss", "accuracy"} <= found["test"].keys()
    assert [row["step"] for row in found["history"] if "loss" in row] == [4, 8, 12, 16, 20, 24]
    assert [row["step"] for row in found["history"] if "eval_loss" in row] == [8, 16, 24]
    held_out = {key for row in found["history"] for key in row if key.startswith("eval")}
    assert held_out == {"eval_loss", "eval_accuracy"}
    assert [row["step"] for row in found["tracked"]] == [0, 4, 8, 12, 16, 20]
    assert [row["step"] for row in found["noise"]] == [6, 12, 18, 24]
    assert found["history"][-1]["density"] == (1.0 if recipe == "dense" else 1 / 8)
    assert found["cost"]["run_training_flops"] > 0
    assert [now.step for now in seen][-1] == 24
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "config.json",
        "model",
        "result.json",
    ]
    # What is saved is what was evaluated.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    problem = tasks.build(run)
    batch = problem.test.__getitems__(list(range(len(problem.test))))
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert loss == pytest.approx(found["test"]["loss"], abs=1e-4)
    assert nmflow.audit(tmp_path / "model", "1:8", "ff").ok == (recipe != "dense")


def test_all_recipes_of_a_seed_start_alike_and_see_the_same_batches(
    tmp_path: Path, monkeypatch: Any
):
    from nmflow.experiments.tasks.lm import Windows

    orders: list[list[int]] = []
    plain = Windows.__getitems__

    def spy(self: Windows, indices: list[int]) -> Any:
        if self.views.stride(0) == 1:  # the training set
            orders[-1] += indices
        return plain(self, indices)

    monkeypatch.setattr(Windows, "__getitems__", spy)
    starts = []
    for recipe, seed in (("dense", 0), ("mdgf-linear", 0), ("mdgf-linear", 1)):
        orders.append([])
        found = train(one(recipe, seed), RunFolder(tmp_path / f"{recipe}{seed}"))
        starts.append(found["initial_sha256"])
    assert starts[0] == starts[1] != starts[2]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("precision", "there"), [("bf16", False), ("bf16", True), ("fp32", False)])
def test_a_slow_precision_is_told(
    precision: str,
    there: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(trainer, "onednn_takes", lambda dtype: there)
    short = {**DEMO["training"], "steps": 2, "device": "cpu", "precision": precision}
    train(one("dense", training=short), RunFolder(tmp_path))
    told = [text for text in caplog.messages if "training.precision is 'bf16'" in text]
    assert len(told) == (precision == "bf16" and not there)


def test_a_finished_run_is_not_run_again(tmp_path: Path):
    run = one()
    first = train(run, RunFolder(tmp_path))
    stamp = (tmp_path / "result.json").stat().st_mtime_ns
    assert train(run, RunFolder(tmp_path)) == json.loads(json.dumps(first))
    assert (tmp_path / "result.json").stat().st_mtime_ns == stamp


class Stop(NMFlowError):
    pass


@pytest.mark.parametrize(
    "recipe", ["sr-ste", "gradual", "mdgf-exponential", "sdgf-stepwise", "hybrid"]
)
def test_a_run_that_is_stopped_twice_ends_bit_equal(recipe: str, tmp_path: Path):
    # Dropout draws random numbers, which a resume has to continue, too.
    fields = {**TINY, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    run = one(recipe, model={"kind": "gpt2", "fields": fields})
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    expected = train(run, whole)
    for step in (12, 20):

        def stop(now: Any, at: int = step) -> None:
            if now.step >= at:
                raise Stop("here")

        with pytest.raises(Stop):
            train(run, broken, stop)
        assert not broken.finished
    found = train(run, broken)
    assert found["resumed_at"] == [8, 16]
    assert found["final_sha256"] == expected["final_sha256"]
    assert found["test"] == expected["test"]
    assert [r for r in found["history"] if "loss" in r] == [
        r for r in expected["history"] if "loss" in r
    ]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(broken)[name])


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for step in (8, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.mark(tmp_path / "checkpoint-8", {"step": 8})
    assert folder.last_checkpoint() == tmp_path / "checkpoint-8"
    assert not (tmp_path / "checkpoint-16").exists()


def test_two_workers_train_what_one_does_beside_a_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pool.multiprocessing, "get_context", processes.context)
    fails = one("sr-ste", remainder="error", pattern="1:7")
    good = list(experiment(recipes=["sr-ste", "mdgf-linear"], seeds=[0]).runs())
    for workers in (2, 1):
        folder, seen = tmp_path / str(workers), []
        ((failed, sentence),) = run_all([fails, *good], folder, workers, 1, seen.append)
        assert failed == fails.id
        assert "7" in sentence
        assert "\n" not in sentence
        assert not (folder / failed / "result.json").exists()
        assert {now.run for now in seen} == {run.id for run in good}
    for run in good:
        two, alone = (RunFolder(tmp_path / n / run.id).result() for n in ("2", "1"))
        assert two["final_sha256"] == alone["final_sha256"]


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert share(runs=3, workers=0, threads=0) == (3, 2)
    assert share(runs=99, workers=0, threads=0) == (8, 1)
    assert share(runs=99, workers=2, threads=0) == (2, 4)
    assert share(runs=0, workers=0, threads=0) == (1, 8)
    for wish, found in (("2", 2), ("99", 8), ("0", 8), ("3,2", 8), ("", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
        assert share(runs=1, workers=0, threads=0) == (1, found)
        assert share(runs=1, workers=0, threads=5) == (1, 5)


def test_workers_have_cores_of_their_own_only_where_they_take_all():
    """A second sweep beside the first must not find its workers on the very same cores."""
    assert [cores_of(place, 2, 2, range(4)) for place in (0, 1)] == [[0, 1], [2, 3]]
    assert [cores_of(place, 3, 2, range(4)) for place in (0, 1, 2)] == [[0, 1], [2, 3], [0, 1]]
    assert [cores_of(place, 2, 1, range(4)) for place in (0, 1)] == [[0, 1, 2, 3]] * 2
