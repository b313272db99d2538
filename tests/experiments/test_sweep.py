"""Sweeps: cells from axes, their mistakes, resume after kill -9, sharing, budgets, the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

import pandas as pd
from typer.testing import CliRunner

from nmflow.cli import app
from nmflow.errors import ConfigError, NMFlowError
from nmflow.experiments import budget, config, sweep, tasks
from nmflow.experiments.checkpoints import MARK
from nmflow.experiments.config import Run, parse
from nmflow.experiments.costs import counted
from nmflow.experiments.report.page import write_report
from nmflow.experiments.run_folder import RunFolder, finished_runs
from nmflow.experiments.runner import take
from nmflow.experiments.training import Progress, train

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "task": "language-modelling",
    "options": {"length": 16},
    "data": {"source": "pydoc", "limit": 20_000},
    "model": {"kind": "gpt2", "fields": {"n_embd": 32, "n_inner": 64, "n_layer": 1, "n_head": 2}},
    "training": {
        "steps": 4, "batch_size": 2, "log_every": 2, "eval_rows": 4, "track_every": 0,
        "save_model": False, "device": "cpu",
    },
}  # fmt: skip
AXES: dict[str, Any] = {"recipe": ["sr-ste", "mdgf-linear"], "pattern": ["1:4", "1:8"]}


def file(folder: Path, axes: dict[str, Any] | None = None, name: str = "s", **more: Any) -> Path:
    """A sweep's file in `folder`, its results below."""
    raw = {
        "name": name, "base": BASE, "axes": AXES if axes is None else axes,
        "output": str(folder / name), "threads": 1, **more,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(raw))
    return path


def cells(folder: Path, axes: dict[str, Any], **more: Any) -> list[Run]:
    return sweep.load(file(folder, axes, **more)).runs


# -- cells ----------------------------------------------------------------------------------------


def test_cells_are_every_crossing_one_seed_after_the_other(tmp_path: Path):
    runs = cells(tmp_path, {**AXES, "seed": [0, 1], "training.learning_rate": [1e-3, "3e-3"]})
    assert len({run.id for run in runs}) == 16
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8
    assert {run.training.learning_rate for run in runs} == {1e-3, 3e-3}
    assert {run.pattern_text for run in runs} == {"1:4", "1:8"}


def test_a_cell_is_the_run_that_train_would_make(tmp_path: Path):
    (one,) = cells(tmp_path, {"recipe": ["sr-ste"], "pattern": ["1:8"], "seed": [3]})
    raw = {**BASE, "recipe": "sr-ste", "pattern": "1:8", "seed": 3}
    assert one.id == parse(Run, raw, "test").id


def test_a_placement_brings_patterns_of_its_own(tmp_path: Path):
    placements = [
        {"label": "FF", "include": "ff", "pattern": "1:8"},
        {"label": "FF+QK", "include": ["ff", "qk"], "pattern": {"ff": "1:8", "qk": "1:4"}},
    ]
    found = sweep.load(file(tmp_path, {"recipe": ["sr-ste"], "placement": placements}))
    first, second = found.cells
    assert (first.place["placement"], second.place["placement"]) == ("FF", "FF+QK")
    assert second.run.include == ["ff", "qk"]
    assert second.run.pattern == {"ff": "1:8", "qk": "1:4"}
    # Under the name of a key, too.
    (run,) = cells(tmp_path, {"recipe": ["sr-ste"], "include": [placements[1]]})
    assert run.hash == second.run.hash


def test_the_option_of_a_recipe_is_an_axis(tmp_path: Path):
    recipes = ["mdgf-linear", {"name": "sdgf-stepwise", "label": "SDGF"}]
    runs = cells(tmp_path, {"recipe": recipes, "recipe.dense": [0.0, 0.1]})
    assert [run.recipe.options["dense"] for run in runs] == [0.0, 0.1, 0.0, 0.1]
    assert len({run.recipe.title for run in runs}) == 4


def test_a_base_is_a_file_and_its_lists_are_axes(tmp_path: Path):
    base = {**BASE, "recipes": ["sr-ste"], "seeds": [0, 1], "workers": 7}
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    more = {"base": "base.yaml", "overrides": {"training.steps": 9}}
    runs = cells(tmp_path, {"pattern": ["1:4", "1:8"]}, **more)
    assert [(run.seed, run.pattern) for run in runs] == [
        (0, "1:4"), (0, "1:8"), (1, "1:4"), (1, "1:8"),
    ]  # fmt: skip
    assert {run.training.steps for run in runs} == {9}
    assert [run.seed for run in cells(tmp_path, {"seed": [5]}, **more)] == [5]


def test_overrides_reach_the_sweep_and_its_base(tmp_path: Path):
    given = ["axes.seed=[4, 5]", "training.budget=1e9", "threads=2", "overrides.mask_interval=2"]
    found = sweep.load(file(tmp_path), given, output=tmp_path / "other")
    assert found.threads == 2
    assert found.folder == tmp_path / "other"
    assert found.store == tmp_path / "other" / "cells"
    assert {run.seed for run in found.runs} == {4, 5}
    assert {(run.training.budget, run.training.steps) for run in found.runs} == {(1e9, 0)}
    assert {run.mask_interval for run in found.runs} == {2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axes": {}}, "axes: it has no axis"),
        ({"axes": {"recipe": ["sr-ste"], "seed": []}}, "axis 'seed' is empty"),
        ({"axes": {"seed": 3}}, r"axes\.seed is 3"),
        ({"axis": {}}, "unknown key 'axis': did you mean 'axes'"),
        ({"axes": {"recpie": ["sr-ste"]}}, "axis 'recpie' is not a key.*did you mean 'recipe'"),
        ({"axes": {"trainin.steps": [1]}}, "did you mean 'training'"),
        ({"axes": {**AXES, "training.stepz": [1]}}, r"'training\.stepz': did you mean 'steps'"),
        ({"axes": {**AXES, "options.lenght": [8]}}, "did you mean 'length'"),
        ({"axes": {**AXES, "placement": [{"inclde": "ff"}]}}, "sets 'inclde'.*'include'"),
        ({"axes": {**AXES, "seed": [0, 1, 0]}}, "cells 1 and 9 are the same run.*seed 0"),
        ({"axes": {"recipe": ["sr-ste"], "pattern": [68]}}, "pattern.* is 68"),
        ({"axes": {"recipe": ["sr-ste"], "pattern": ["1:4", "9:4"]}}, "cell 2 .*'9:4'"),
        ({"axes": {"pattern": ["1:4"]}}, "the key 'recipe' is missing"),
        ({"axes": {**AXES, "p": [{"pattern": "1:4"}]}}, "'pattern' and 'p' both set 'pattern'"),
        (
            {"axes": {**AXES, "training.steps": [1], "training.budget": [1e9]}},
            r"both set 'training\.steps'",
        ),
        (
            {"axes": {"recipe": [{"name": "ste", "label": "a"}, {"name": "sr-ste", "label": "a"}]}},
            "cells 1 and 2 differ.*labels of their own",
        ),
        ({"base": "none.yaml"}, "No such file"),
        ({"base": {**BASE, "seeds": 3}}, "the base gives 3 for its seeds"),
        ({"axes": {**AXES, "model.fields.n_embdd": [8]}}, r"'model\.fields\.n_embdd': did you"),
        ({"axes": {**AXES, "model.kind": ["gpt2", "gpt3"]}}, r"model\.kind is 'gpt3'"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], said: str
):
    path = file(tmp_path, **change)
    with pytest.raises(ConfigError, match=said) as caught:
        sweep.run(sweep.load(path))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    for key in ("output", "cells"):
        change: dict[str, Any] = {key: str(tmp_path / "taken" / "x")}
        found = sweep.load(file(tmp_path, **change))
        with pytest.raises(ConfigError, match="cannot be written") as caught:
            sweep.run(found)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.rglob("sweep.json"))
    with pytest.raises(ConfigError, match="backend is 'slurm': choose from processes, ray"):
        sweep.run(found, backend="slurm")  # type: ignore[arg-type]


def test_every_sweep_of_configs_reads():
    files = list((ROOT / "configs" / "sweeps").glob("*.yaml"))
    assert files
    for path in files:
        assert len(sweep.load(path).cells) > 1


# -- running --------------------------------------------------------------------------------------


def test_sweep_then_table_then_report(tmp_path: Path):
    path = file(tmp_path, overrides={"training.track_every": 2})
    found = CliRunner().invoke(app(), ["sweep", str(path), "--workers", "1"])
    assert found.exit_code == 0, found.output
    assert "all 4 cells are finished" in found.output
    frame = pd.read_parquet(tmp_path / "s" / "results.parquet")
    plan = sweep.load(path)
    assert list(frame["cell"]) == [run.id for run in plan.runs]
    assert list(frame["recipe"]) == ["sr-ste", "sr-ste", "mdgf-linear", "mdgf-linear"]
    assert list(frame["pattern"]) == ["1:4", "1:8"] * 2
    for number, run in enumerate(plan.runs):
        result = RunFolder(plan.store / run.id).result()
        row = frame.iloc[number]
        assert row["config_hash"] == run.hash
        assert row["data_sha256"] == result["data"]["sha256"]
        assert row["version_torch"] == torch.__version__
        assert row["test_loss"] == result["test"]["loss"]
        assert row["training_flops"] == result["cost"]["run_training_flops"] > 0
        assert row["inference_flops"] == result["cost"]["flops"]
        assert row["bytes"] == result["cost"]["bytes"] < row["dense_bytes"]
        assert row["train_seconds"] == result["train_seconds"] > 0
        assert row["steps"] == result["steps"] == 4
        assert row["audit_ok"]
    plain = pd.read_csv(tmp_path / "s" / "results.csv")
    assert list(plain.columns) == list(frame.columns)
    assert list(plain["test_loss"]) == list(frame["test_loss"])
    along = pd.read_parquet(tmp_path / "s" / "tracked.parquet")
    expected = [row for r in plan.runs for row in RunFolder(plan.store / r.id).result()["tracked"]]
    assert list(along["step"]) == [row["step"] for row in expected]
    assert list(along["phase"]) == [row["phase"] for row in expected]
    assert list(dict.fromkeys(along["cell"])) == [run.id for run in plan.runs]
    assert set(along["pattern"]) == {"1:4", "1:8"}
    assert not (tmp_path / "s" / "noise.parquet").exists()  # nobody asked for it

    before = {p: p.stat().st_mtime_ns for p in plan.store.rglob("*.json")}
    again = CliRunner().invoke(app(), ["sweep", str(path), "--workers", "1"])
    assert "4 are finished" in again.output
    assert {p: p.stat().st_mtime_ns for p in plan.store.rglob("*.json")} == before

    page = write_report([tmp_path / "s"], tmp_path / "report").read_text()
    assert "mdgf-linear" in page


def test_sweeps_that_share_a_store_have_reports_of_their_own(tmp_path: Path):
    store = str(tmp_path / "cells")
    both = [
        sweep.load(file(tmp_path, {"recipe": ["sr-ste"], "seed": seeds}, name, cells=store))
        for name, seeds in (("a", [0, 1]), ("b", [1, 2]))
    ]
    seen: list[Progress] = []
    for each in both:
        assert sweep.run(each, workers=1, notify=seen.append) == []
    assert len({now.run for now in seen}) == 3  # seed 1 is not run again, nor spoken of
    assert len(list(Path(store).iterdir())) == 3
    found = {name: finished_runs([tmp_path / name]) for name in ("a", "b")}
    assert {name: [r["seed"] for r in rows] for name, rows in found.items()} == {
        "a": [0, 1],
        "b": [1, 2],
    }
    assert len(finished_runs([tmp_path / "a", tmp_path / "b"])) == 3


SHARING = """
import json, os, sys
import nmflow.experiments.tasks
from nmflow.experiments import sweep
names = sys.argv[1:]
child = os.fork()  # after the imports, which take longer than the cells
steps = {}
plan = sweep.load(names[0] if child else names[1])
failed = sweep.run(plan, workers=1, notify=lambda now: steps.setdefault(now.run, now.step))
assert not failed, failed
assert len(plan.finished) == len(plan.cells)
print(json.dumps([run for run, first in steps.items() if first < 20]), flush=True)
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_two_sweeps_at_the_same_time_run_a_shared_cell_once(tmp_path: Path):
    training = {**BASE["training"], "steps": 20}
    more = {"base": {**BASE, "training": training}, "cells": str(tmp_path / "cells")}
    axes = {"recipe": ["sr-ste"], "seed": [0, 1, 2]}
    files = [str(file(tmp_path, axes, name, **more)) for name in ("a", "b")]
    command = [sys.executable, "-c", SHARING, *files]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    a, b = (json.loads(line) for line in done.stdout.splitlines())
    assert sorted(a + b) == sorted(run.id for run in cells(tmp_path, axes, **more))


def test_a_cell_at_which_another_sweep_is_at_work_comes_last(tmp_path: Path):
    runs = cells(tmp_path, {"recipe": ["sr-ste"], "seed": [0, 1]})
    waiting = list(runs)
    with RunFolder(tmp_path / runs[0].id).lock():
        assert take(waiting, tmp_path) is runs[1]
        assert take(waiting, tmp_path) is runs[0]
    assert take(list(runs), tmp_path) is runs[0]


def test_a_cell_that_fails_keeps_no_other_from_running(tmp_path: Path):
    path = file(tmp_path, {"recipe": ["sr-ste"], "pattern": ["1:7", "1:8"]})
    found = CliRunner().invoke(app(), ["sweep", str(path), "--workers", "1"])
    assert isinstance(found.exception, NMFlowError)
    assert "7" in str(found.exception)
    assert len(pd.read_csv(tmp_path / "s" / "results.csv")) == 1


@pytest.mark.slow
def test_kill_nine_takes_the_workers_of_a_sweep_along(tmp_path: Path):
    """One worker, killed at any moment: test_kills.py, among the fast tests too."""
    training = {**BASE["training"], "steps": 120, "save_every": 20, "log_every": 20}
    axes = {"recipe": ["sr-ste", "mdgf-exponential"], "seed": [0, 1]}
    path = file(tmp_path, axes, base={**BASE, "training": training}, workers=2)
    command = [sys.executable, "-c", "import nmflow.cli; nmflow.cli.main()", "sweep", str(path)]
    plan = sweep.load(path)

    def checkpoints() -> list[Path]:
        return list(plan.store.glob(f"*/checkpoint-*/{MARK}"))

    # A session of its own: the kill takes the workers along, as an out-of-memory killer may.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 240
    while time.time() < deadline and not (plan.finished and checkpoints()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {cell.run.id for cell in plan.finished}
    assert 0 < len(done) < 4
    stamps = {run: (plan.store / run / "result.json").stat().st_mtime_ns for run in done}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    results = {run.id: RunFolder(plan.store / run.id).result() for run in plan.runs}
    assert {run: (plan.store / run / "result.json").stat().st_mtime_ns for run in done} == stamps
    resumed = [run for run in plan.runs if results[run.id]["resumed_at"]]
    assert resumed
    assert not {run.id for run in resumed} & done
    for run in resumed:
        whole = train(run, RunFolder(tmp_path / "whole" / run.id))
        assert results[run.id]["final_sha256"] == whole["final_sha256"]
        assert results[run.id]["test"] == whole["test"]
    assert len(pd.read_parquet(plan.folder / "results.parquet")) == 4


# -- budgets --------------------------------------------------------------------------------------


def budgeted(flops: Any, recipe: Any = "sr-ste", **more: Any) -> Run:
    training = {k: v for k, v in BASE["training"].items() if k != "steps"}
    raw = {**BASE, "recipe": recipe, "pattern": "1:8", **more}
    return parse(Run, {**raw, "training": {**training, "budget": flops}}, "test")


@pytest.mark.parametrize(
    "recipe",
    [
        "dense", "sr-ste", "sdgf-geometric",
        {"name": "mdgf-linear", "gradient": "masked", "dense": 30, "finetune": 20},
    ],
)  # fmt: skip
def test_a_budget_buys_the_most_steps_that_it_pays(recipe: Any):
    run = budgeted("1e9", recipe)
    problem = tasks.build(run)
    model = problem.model()
    found = budget.solved(run, problem)

    def spent(steps: int) -> int:
        training = found.training.model_copy(update={"steps": steps})
        again = found.model_copy(update={"training": training})
        return counted(again, model, problem.example)["run_training_flops"]

    steps = found.training.steps
    assert spent(steps) <= 1e9 < spent(steps + 1)
    assert found.id == run.id
    assert Run.model_validate_json(run.model_dump_json()).id == run.id


def training_of(steps: int) -> Any:
    return parse(config.Training, {**BASE["training"], "steps": steps}, "test")


def test_a_recipe_that_computes_less_takes_more_steps():
    steps = {}
    for recipe in ("dense", "mdgf-linear", "sr-ste"):
        run = budgeted(1e9, recipe)
        steps[recipe] = budget.solved(run, tasks.build(run)).training.steps
    assert steps["dense"] < steps["mdgf-linear"] < steps["sr-ste"]


def test_a_run_with_a_budget_is_the_run_with_its_steps(tmp_path: Path):
    run = budgeted(3e7, "mdgf-linear")
    found = train(run, RunFolder(tmp_path / "budget"))
    assert found["steps"] == found["run"]["training"]["steps"] > 2
    assert found["run"]["training"]["budget"] == 3e7
    assert found["config_hash"] == run.hash
    assert found["cost"]["run_training_flops"] <= 3e7
    raw = {**run.model_dump(), "training": training_of(found["steps"]).model_dump()}
    given = train(parse(Run, raw, "test"), RunFolder(tmp_path / "steps"))
    assert given["final_sha256"] == found["final_sha256"]
    assert given["config_hash"] != found["config_hash"]


def test_runs_without_a_budget_keep_their_hash():
    raw = {**BASE, "recipe": "sr-ste", "pattern": "1:8"}
    values = parse(Run, raw, "test").model_dump(mode="json", exclude={"name"})
    assert "budget" not in values["training"]
    assert values["training"]["steps"] == 4


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"steps": 5, "budget": 1e9}, "both steps 5 and budget 1e.09 are given"),
        ({}, r"the key 'training\.steps' is missing \(or 'training\.budget'"),
        ({"budget": 0}, r"training\.budget is 0"),
        ({"budget": float("inf")}, r"training\.budget is inf"),
    ],
)
def test_a_length_that_cannot_be(training: dict[str, Any], said: str):
    raw = {**BASE, "recipe": "sr-ste", "training": training}
    with pytest.raises(ConfigError, match=said):
        parse(Run, raw, "test")


@pytest.mark.parametrize(
    ("flops", "recipe", "said"),
    [
        (10.0, "sr-ste", "less than one step of this run, which takes"),
        (1e30, "sr-ste", "more than 10,000,000 steps"),
        (1e8, {"name": "mdgf-linear", "dense": 500, "finetune": 5}, "too small for the recipe's"),
    ],
)
def test_a_budget_that_cannot_be_kept(flops: float, recipe: Any, said: str):
    run = budgeted(flops, recipe)
    with pytest.raises(ConfigError, match=said):
        budget.solved(run, tasks.build(run))


def test_steps_and_budget_replace_each_other_on_the_command_line(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(json.dumps({**BASE, "recipes": ["sr-ste"]}))
    found = config.load(tmp_path / "a.yaml", ["training.budget=1e9"])
    assert (found.training.steps, found.training.budget) == (0, 1e9)
    again = config.load(tmp_path / "a.yaml", ["training.budget=1e9", "training.steps=7"])
    assert (again.training.steps, again.training.budget) == (7, None)


def test_cost_and_smoke_of_a_config_with_a_budget(tmp_path: Path):
    training = {k: v for k, v in BASE["training"].items() if k != "steps"}
    recipe = {"name": "mdgf-linear", "dense": 30, "finetune": 0.2}
    raw = {**BASE, "pattern": "1:8", "recipes": [recipe], "output": str(tmp_path / "runs")}
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({**raw, "training": {**training, "budget": 2e8}}))
    cost = CliRunner().invoke(app(), ["cost", str(path)])
    assert cost.exit_code == 0, cost.output
    assert "dense (30 steps)" in cost.output
    smoke = CliRunner().invoke(app(), ["train", str(path), "--smoke"])
    assert smoke.exit_code == 0, smoke.output
    assert "of 2e+08 training FLOPs" in smoke.output.replace("\n", " ")


# -- Ray ------------------------------------------------------------------------------------------


def test_a_local_ray_trains_what_processes_do(tmp_path: Path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'nmflow[ray]'")
    # One process of Ray trains all: each would import for longer than it trains.
    axes = {"recipe": ["sr-ste"], "pattern": ["1:7", "1:8"]}
    plan = sweep.load(file(tmp_path, axes))
    seen: list[Progress] = []
    failed = sweep.run(plan, backend="ray", workers=1, notify=seen.append)
    assert sorted(run for run, _ in failed) == sorted(r.id for r in plan.runs if r.pattern == "1:7")
    assert all("7" in sentence and "\n" not in sentence for _, sentence in failed)
    good = [run for run in plan.runs if run.pattern == "1:8"]
    assert {now.run for now in seen} == {run.id for run in good}
    for run in good:
        here = train(run, RunFolder(tmp_path / "here" / run.id))
        ray = RunFolder(plan.store / run.id).result()
        assert ray["final_sha256"] == here["final_sha256"]
        assert ray["machine"]["threads"] == 1


def test_without_ray_the_backend_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'nmflow\[experiments,ray\]'"):
        sweep.run(sweep.load(file(tmp_path)), backend="ray")
