"""Configurations by name: what comes with the package, what a name means, what a wrong one says."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("typer")

from typer.testing import CliRunner

from nmflow.cli import app
from nmflow.errors import ConfigError
from nmflow.experiments import catalog, config, sweep

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", catalog.names())
def test_every_name_is_an_experiment_from_any_folder(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load(name) == config.load(ROOT / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("name", catalog.names(catalog.SWEEPS))
def test_every_name_of_a_sweep_is_one_from_any_folder(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep.load(name).cells == sweep.load(ROOT / f"configs/sweeps/{name}.yaml").cells


def test_the_catalog_has_neither_sweeps_nor_the_study_among_its_experiments():
    assert catalog.names()[:2] == ["demo", "digits"]
    assert {name.partition("/")[0] for name in catalog.names() if "/" in name} == {
        "full",
        "one-gpu",
        "two-cores",
    }


def test_a_file_comes_before_a_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert catalog.find("digits").parent == catalog.FOLDER
    (tmp_path / "demo").write_text((catalog.FOLDER / "digits.yaml").read_text())
    assert config.load("demo").name == "digits"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dmo", "did you mean 'demo'"),
        ("demo.yml", "did you mean 'demo'"),
        ("configs/two-cores/vit-cifar", "did you mean 'two-cores/vit-cifar10'"),
        ("vit-cifar-10", "did you mean 'two-cores/vit-cifar10'"),
        ("../config", "nmflow train --list"),
        ("../configs/demo", "did you mean 'demo'"),
        ("zzz", "nmflow train --list"),
        ("", "nmflow train --list"),
    ],
)
def test_a_name_that_is_none_is_one_sentence_with_the_nearest(word, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said) as caught:
        config.load(word)
    assert "\n" not in str(caught.value)


def test_a_sweep_takes_its_base_by_name_or_from_beside_it(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: digits\naxes: {seed: [0]}\n")
    assert sweep.load(file).runs[0].data.source == "digits"
    (tmp_path / "digits").write_text((catalog.FOLDER / "demo.yaml").read_text())
    assert sweep.load(file).runs[0].data.source == "pydoc"
    file.write_text("base: digit\naxes: {seed: [0]}\n")
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        sweep.load(file)


@pytest.mark.parametrize(("command", "kind"), [("train", ""), ("sweep", catalog.SWEEPS)])
def test_list_shows_each_name_with_a_sentence(command: str, kind: str):
    shown = CliRunner().invoke(app(), [command, "--list"])
    assert shown.exit_code == 0, shown.output
    rows = [line.split("  ", 1) for line in shown.output.splitlines()]
    assert [name for name, _ in rows] == catalog.names(kind)
    assert all(len(about.split()) > 4 for _, about in rows)


def test_examples():
    assert doctest.testmod(catalog).failed == 0
