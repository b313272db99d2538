"""Every system trains, stops, goes on, and is read again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from nmflow import audit
from nmflow.experiments import config as configs
from nmflow.experiments import tasks
from nmflow.experiments.data import synthetic
from nmflow.experiments.run_folder import MODEL, RunFolder
from nmflow.experiments.tasks import glue
from nmflow.experiments.tasks.glue_names import Name
from nmflow.experiments.training import train
from small_systems import SYSTEMS, run_of

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_trains_finalizes_and_reloads(system: str, tmp_path: Path) -> None:
    run = run_of(SYSTEMS[system], tmp_path / "data")
    held: list[Any] = []
    built = tasks.build

    def keep(run: configs.Run) -> tasks.Problem:
        problem = built(run)
        make = problem.model
        object.__setattr__(problem, "model", lambda: held.append(make()) or held[-1])
        held.append(problem)
        return problem

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "build", keep)
        result = train(run, RunFolder(tmp_path / "run"))
    problem, model = held

    assert result["audit"]["ok"]
    assert result["audit"]["rows"]
    assert problem.headline in result["test"]
    assert np.isfinite(result["test"]["loss"])
    steps = [row["step"] for row in result["history"] if "eval_loss" in row]
    assert steps == [2, 4]

    saved = tmp_path / "run" / MODEL
    assert audit(saved, run.pattern, run.include, run.exclude).ok
    loaded = type(model).from_pretrained(saved)
    batch = {name: value.to(model.device) for name, value in problem.example.items()}
    with torch.no_grad():
        first, second = model.eval()(**batch).logits, loaded.eval()(**batch).logits
    # Weights to the bit; products may round otherwise where memory is aligned otherwise.
    read = loaded.state_dict()
    assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(first, second)
    if hasattr(problem, "arguments") and (problem.arguments or {}).get("predict_with_generate"):
        words = {"input_ids": batch["input_ids"], "max_length": 8, "num_beams": 2}
        assert torch.equal(model.generate(**words), loaded.generate(**words))


QUICK = ("vit", "bert", "marian streamed")


@pytest.mark.parametrize(
    "system", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SYSTEMS]
)
def test_a_stopped_run_goes_on_bit_equal(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {**SYSTEMS[system], "training": {"save_every": 6, "steps": 20, "eval_every": 20}}
    run = run_of(raw, tmp_path / "data")  # 32 rows in batches of 4: stopped in the second epoch
    whole = train(run, RunFolder(tmp_path / "whole"))

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step > 12:
            raise Stop

    with pytest.raises(Stop):
        train(run, RunFolder(tmp_path / "halves"), stop)
    resumed = train(run, RunFolder(tmp_path / "halves"))
    assert resumed["resumed_at"]
    apart = ("train_seconds", "resumed_at")
    assert {k: v for k, v in resumed.items() if k not in apart} == {
        k: v for k, v in whole.items() if k not in apart
    }


def test_a_run_begins_where_a_saved_network_ended(tmp_path: Path) -> None:
    run = run_of(SYSTEMS["bert"], tmp_path / "data")
    train(run, RunFolder(tmp_path / "first"))
    saved = str(tmp_path / "first" / MODEL)
    raw = {
        **SYSTEMS["bert"],
        "options": {"tasks": ["sst2"], "tokens": {"load": saved}, "length": 32},
        "data": run.data.model_dump(),
        "model": {"load": saved},
        "training": {"learning_rate": 1e-12, "weight_decay": 0.0},
        "recipes": ["ste"],
    }
    again = train(run_of(raw, tmp_path), RunFolder(tmp_path / "second"))
    first = RunFolder(tmp_path / "first").result()
    assert again["initial_sha256"] == first["final_sha256"]
    assert again["test"]["loss"] == pytest.approx(first["test"]["loss"], abs=1e-5)


@pytest.mark.parametrize("system", ["mixer", "lstm"])
def test_the_commands_know_our_own_networks(system: str, tmp_path: Path) -> None:
    from nmflow.cli._networks import network

    model = tasks.build(run_of(SYSTEMS[system], tmp_path / "data")).model()
    model.save_pretrained(tmp_path / "saved")
    loaded, _, _ = network(tmp_path / "saved")
    assert type(loaded) is type(model)
    for (name, first), second in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.slow
@pytest.mark.parametrize("system", ["bert", "streamed vit", "marian streamed"])
def test_two_processes_train_one_network(system: str, tmp_path: Path) -> None:
    run = run_of(SYSTEMS[system], tmp_path / "data")
    raw = run.model_dump(mode="json", exclude={"recipe", "seed"})
    raw |= {"recipes": [run.recipe.name], "output": str(tmp_path / "runs")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    script = Path(sys.executable).with_name("nmflow")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               "--no-python", str(script), "train", str(tmp_path / "config.yaml")]  # fmt: skip
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result = RunFolder(tmp_path / "runs" / run.id).result()
    assert result["machine"]["processes"] == 2
    assert result["cost"]["examples_per_step"] == 8
    assert result["audit"]["ok"]
    assert audit(tmp_path / "runs" / run.id / MODEL, run.pattern, run.include).ok


def test_every_task_has_its_stand_in_and_its_name() -> None:
    assert set(tasks.FILES) == set(synthetic._MAKERS)
    assert set(get_args(Name)) == set(glue.TASKS)
