"""The command line: every command on something small, and every mistake as one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
from typer.testing import CliRunner, Result

import nmflow
from nmflow import native
from nmflow.cli import app, commands
from nmflow.errors import NMFlowError
from nmflow.inspect import machine

CONFIG: dict[str, Any] = {
    "name": "small",
    "task": "language-modelling",
    "options": {"length": 16},
    "data": {"source": "pydoc", "limit": 20_000},
    "model": {"kind": "gpt2", "fields": {"n_embd": 32, "n_inner": 64, "n_layer": 1, "n_head": 2}},
    "pattern": "1:8",
    "training": {"steps": 8, "batch_size": 2, "log_every": 2, "device": "cpu", "eval_rows": 4},
    "recipes": ["dense", "sr-ste"],
    "seeds": [0, 1],
    "threads": 1,
}


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app(), [str(word) for word in words])


def refused(*words: str | Path) -> str:
    """The sentence of the NMFlowError that `main` turns into exit code 2."""
    found = run(*words)
    assert isinstance(found.exception, NMFlowError), found.output
    return str(found.exception)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**CONFIG, "output": str(tmp_path / "runs")}))
    return path


def test_every_file_is_a_command_with_a_word_of_help():
    assert {"train", "report", "plan", "audit", "cost"} <= set(commands())
    for name in commands():
        found = run(name, "--help")
        assert found.exit_code == 0
        assert "Usage" in found.output
    assert run("--help").exit_code == 0


def test_train_then_report_then_audit(file: Path, tmp_path: Path):
    found = run("train", file, "--workers", "1")
    assert found.exit_code == 0, found.output
    assert "all 4 runs are finished" in found.output
    again = run("train", file, "--workers", "1")
    assert "4 are finished" in again.output
    found = run("report", tmp_path / "runs")
    assert found.exit_code == 0, found.output
    page = tmp_path / "runs" / "report" / "report.html"
    assert str(page) in found.output.replace("\n", "")
    assert "sr-ste" in page.read_text()
    sparse = next((tmp_path / "runs").glob("sr-ste*seed0*")) / "model"
    found = run("audit", sparse, "--pattern", "1:8", "--include", "ff")
    assert found.exit_code == 0, found.output
    assert "every weight holds" in found.output
    found = run("audit", sparse)  # judges what the run pruned, and nothing else
    assert found.exit_code == 0, found.output
    assert "every weight holds its pattern, as recorded by the run" in found.output
    assert "not pruned by the run" in found.output
    assert run("audit", sparse, "--pattern", "1:8").exit_code == 0
    assert run("audit", sparse, "--pattern", "1:16").exit_code == 1
    assert json.loads(run("audit", sparse, "--json").output)["judged"] == "record"
    dense = next((tmp_path / "runs").glob("dense*seed0*")) / "model"
    found = run("audit", dense)
    assert found.exit_code == 0
    assert "no weight holds an N:M pattern" in found.output
    found = run("audit", dense, "--pattern", "1:8", "--include", "ff")
    assert found.exit_code == 1
    assert "break the pattern" in found.output
    found = run("plan", dense, "--pattern", "1:4", "--include", "ff")
    assert found.exit_code == 0, found.output
    assert "mlp.c_fc.weight" in found.output


def test_plan_and_cost_of_a_config(file: Path):
    found = run("plan", file)
    assert found.exit_code == 0, found.output
    assert "transformer.h.0.mlp.c_fc.weight" in found.output
    found = run("cost", file)
    assert found.exit_code == 0, found.output
    assert "training FLOPs" in found.output
    assert "sr-ste, 1:8" in found.output


def test_plan_takes_overrides_of_a_config(file: Path, tmp_path: Path):
    found = run("plan", file, "--set", "pattern='1:4'", "--set", "include=[ff, qk]")
    assert found.exit_code == 0, found.output
    assert "transformer.h.0.attn.c_attn.weight[0:64]" in found.output
    assert "25.00%" in found.output
    assert "12.50%" not in found.output
    again = run("plan", file, "--set", "pattern='1:4'", "--pattern", "1:16")  # an option is nearer
    assert "6.25%" in again.output
    assert "did you mean 'include'" in refused("plan", file, "--set", "includ=ff")
    assert "write key.path=value" in refused("plan", file, "--set", "include")
    assert "a model's folder without keys" in refused("plan", tmp_path, "--set", "include=ff")


def test_cost_takes_overrides_of_a_config(file: Path):
    found = run("cost", file, "--set", "pattern='1:4'", "--set", "recipes=[ste]")
    assert found.exit_code == 0, found.output
    assert "ste, 1:4" in found.output
    assert "dense" not in found.output.splitlines()[0]


def test_overrides_and_output(file: Path, tmp_path: Path):
    other = tmp_path / "other"
    found = run(
        "train", file, "--output", other, "--workers", "1", "--set", "seeds=[5]",
        "--set", "recipes=[mdgf-linear]",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    (result,) = other.glob("*/result.json")
    assert json.loads(result.read_text())["seed"] == 5


def test_mistakes_are_sentences(file: Path, tmp_path: Path):
    assert "No such file" in refused("train", tmp_path / "none.yaml")
    assert "did you mean" in refused("train", file, "--set", "training.stepz=1")
    assert "no such folder" in refused("report", tmp_path / "none")
    assert "no finished run" in refused("report", tmp_path)
    assert "holds no model" in refused("plan", tmp_path)
    assert "holds no weights" in refused("audit", tmp_path, "--pattern", "1:4")
    sentence = refused("train", file, "--workers", "1", "--set", "include=nothing.*")
    assert "nothing.*" in sentence
    assert "4 of 4 runs failed" in sentence


def test_a_folder_that_cannot_be_written_is_said_before_a_run_begins(file: Path, tmp_path: Path):
    (tmp_path / "a file").write_text("")
    found = run("train", file, "--output", tmp_path / "a file" / "runs")
    assert "cannot be written" in str(found.exception)
    assert "runs into" not in found.output


def test_main_ends_with_one_sentence_and_exit_code_2(tmp_path: Path):
    command = [sys.executable, "-c", "import nmflow.cli; nmflow.cli.main()"]
    done = subprocess.run(
        [*command, "train", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nmflow: config is")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_version_is_printed_and_completion_is_offered():
    assert run("--version").output == f"nmflow {nmflow.__version__}\n"
    assert "--install-completion" in run("--help").output


def test_what_is_printed_can_be_read_by_programs(file: Path):
    planned = json.loads(run("plan", file, "--json").output)
    assert [t["pattern"] for t in planned["targets"]] == ["1:8", "1:8"]
    assert all(set(one) == {"name", "reason"} for one in planned["left_out"])
    costs = json.loads(run("cost", file, "--json").output)
    assert set(costs) == {"dense", "SR-STE"} or len(costs) == 2
    assert all(cost["parameters"] > cost["remaining"] > 0 for cost in list(costs.values())[1:])


def test_the_doctor_names_what_is_slow(monkeypatch: pytest.MonkeyPatch):
    found = json.loads(run("doctor", "--json").output)
    by = {one["what"]: one for one in found["findings"]}
    assert by["torch"]["found"].startswith(torch.__version__)
    assert by["extra experiments"]["state"] == "ok"
    assert by["CPU kernels"]["state"] in ("ok", "slow")
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "no compiler was there")
    told = run("doctor").output
    assert "no compiler was there" in told
    assert "pip install --force-reinstall --no-deps nmflow" in told
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    slow = {f.what: f.mend for f in machine.doctor() if f.state == "slow"}
    assert "OMP_NUM_THREADS=" in slow["threads"]
