"""Runs of the study's second part: kept tables count, and teachers come before their students."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "study"))
runs: Any = importlib.import_module("pretrained_runs")


def sweep(name: str, folder: Path, ids: str, finished: str) -> Any:
    every = [SimpleNamespace(id=one) for one in ids]
    cells = [SimpleNamespace(run=run) for run in every if run.id in finished]
    return SimpleNamespace(name=name, folder=folder, runs=every, finished=cells)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table that has runs a and c, and x of an earlier plan; their folders are gone."""
    pd.DataFrame({"cell": list("acx"), "figure": [1.0, 3.0, 9.0]}).to_parquet(
        tmp_path / "t.parquet"
    )
    monkeypatch.setattr(runs, "there", lambda name: True)
    monkeypatch.setattr(runs, "results", lambda name: pd.read_parquet(tmp_path / "t.parquet"))
    return tmp_path


def test_a_row_counts_but_not_as_a_teacher(kept: Path) -> None:
    assert runs.made(sweep("cola-main", kept, "abcd", "b")) == set("abc")
    assert runs.made(sweep("cola-long-teacher", kept, "abcd", "b")) == {"b"}


def test_a_table_keeps_rows_whose_folders_are_gone(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = pd.DataFrame({"cell": list("bc"), "figure": [2.0, 30.0]})
    monkeypatch.setattr(runs.sweep_table, "table", lambda sweep: new)
    runs.table(sweep("cola-main", kept, "abcd", "bc"))
    made = pd.read_parquet(kept / "results.parquet")
    assert dict(zip(made["cell"], made["figure"], strict=True)) == {"a": 1.0, "b": 2.0, "c": 30.0}
    assert list(made["cell"]) == list("abc")
    assert (kept / "results.csv").read_text() == "cell,figure\na,1.0\nb,2.0\nc,30.0\n"


def test_a_student_waits_for_its_teacher(tmp_path: Path) -> None:
    student = SimpleNamespace(distill=SimpleNamespace(teacher=str(tmp_path / "teacher")))
    assert runs._taught(SimpleNamespace(distill=None))
    assert runs._taught(SimpleNamespace(distill=SimpleNamespace(teacher="self")))
    assert not runs._taught(student)
    (tmp_path / "teacher/run").mkdir(parents=True)
    (tmp_path / "teacher/run/result.json").touch()
    assert runs._taught(student)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [(None, True), (["main-1-16"], True), (["cola-main-1-16"], True), (["ain-1-16"], False)],
)
def test_parts(parts: list[str] | None, wanted: bool) -> None:
    assert runs.Plan([], parts)._wanted("cola-main-1-16") == wanted
