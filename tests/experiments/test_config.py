"""Configs of runs: read, overridden, named, and their mistakes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from nmflow.errors import ConfigError
from nmflow.experiments import config, models
from nmflow.experiments.config import Experiment, Run, parse
from nmflow.experiments.yaml_values import plain
from small_runs import experiment, one

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainng": {}}, r"unknown key 'trainng': did you mean 'training'\?"),
        ({"training": {"steps": 4, "stepz": 1}}, r"'training\.stepz': did you mean 'steps'\?"),
        ({"training": {"steps": "four"}}, r"training\.steps is 'four'"),
        ({"training": {"steps": True}}, r"training\.steps is True"),
        ({"training": {"steps": 0}}, r"training\.steps is 0"),
        ({"training": {}}, r"the key 'training\.steps' is missing"),
        ({"task": "language-modeling"}, "did you mean 'language-modelling'"),
        ({"options": {"lenght": 3}}, "options: unknown key 'lenght': did you mean 'length'"),
        ({"recipes": ["srste"]}, "recipe is 'srste': did you mean 'sr-ste'"),
        ({"recipes": [{"name": "sr-ste", "lamm": 1}]}, "'lamm' is not an option of sr-ste"),
        ({"recipes": [{"name": "mdgf-linear", "beta": -1.0}]}, "beta"),
        ({"pattern": "0:4"}, "pattern is '0:4'"),
        ({"pattern": {"ff": "5:4"}}, "pattern is '5:4'"),
        ({"data": {"source": "text"}}, "needs the key 'path'"),
        ({"data": {"source": "parquet"}}, "needs the key 'files'"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [-1]}, r"seeds\.0 is -1"),
        ({"model": {}}, "either 'kind'"),
    ],
)
def test_a_mistake_in_a_config_is_one_sentence(change: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        experiment(**change)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_configs(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not YAML at line 1"):
        config.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="holds a list"):
        config.load(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        config.load(tmp_path / "c.yaml")


def test_overrides_reach_any_key():
    found = config.load(ROOT / "configs" / "demo.yaml", ["training.steps=7", "seeds=[4]"])
    assert (found.training.steps, found.seeds) == (7, [4])
    with pytest.raises(ConfigError, match=r"write key\.path=value"):
        config.load(ROOT / "configs" / "demo.yaml", ["training.steps"])
    with pytest.raises(ConfigError, match="is a value"):
        config.load(ROOT / "configs" / "demo.yaml", ["task.kind=1"])


def test_sparse_steps_are_part_of_a_run_and_leave_the_hashes_of_others():
    plain_run, sparse = one(), one(sparse_steps="on")
    assert one(sparse_steps="off").hash == plain_run.hash != sparse.hash
    assert sparse.sparse_steps == "on"
    # What YAML makes of a bare on and off.
    assert one(sparse_steps=True).hash == sparse.hash
    assert one(sparse_steps=False).hash == plain_run.hash
    for wrong in ("maybe", 1):
        with pytest.raises(ConfigError, match="sparse_steps"):
            experiment(sparse_steps=wrong)


def test_runs_are_named_by_what_decides_their_outcome():
    runs = list(experiment(recipes=["sr-ste", "mdgf-linear"], seeds=[0, 1]).runs())
    assert len({run.id for run in runs}) == 4
    assert len({run.setting_hash for run in runs}) == 1
    again = list(experiment(recipes=["sr-ste", "mdgf-linear"], seeds=[0, 1], workers=3).runs())
    assert [run.id for run in again] == [run.id for run in runs]
    assert one("sr-ste", pattern="1:4").setting_hash != runs[0].setting_hash
    assert Run.model_validate_json(runs[0].model_dump_json()).id == runs[0].id


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_reads_and_names_a_network_that_exists(file: Path):
    raw = config.read(file)
    if "recipes" not in raw:
        pytest.skip("not the file of an experiment")
    found = parse(Experiment, raw, str(file))
    if found.model.kind is not None:
        assert set(found.model.fields) <= models.known_fields(found.model.kind)


def test_a_pattern_needs_no_quotes_and_a_rate_no_point() -> None:
    from nmflow.experiments.yaml_values import plain

    read = plain("{a: 1:16, b: [2:4, 1:16@64], c: 3e-3, d: 10, e: -1.5}", "here")
    assert read == {"a": "1:16", "b": ["2:4", "1:16@64"], "c": 0.003, "d": 10, "e": -1.5}


STRANGE = {
    "a key twice": "a: 1\nb: 2\na: 3",
    "a key twice inside": "a: {b: 1, b: 2}",
    "nested beyond reason": "[" * 5_000,
    "a number beyond reason": "a: " + "9" * 10_000,
    "aliases of aliases": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "\n".join(
        f"{c}: &{c} [{', '.join(['*' + p] * 10)}]" for p, c in itertools.pairwise("abcdefgh")
    ),
    "a date that is none": "a: 2020-99-99",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_file_is_one_sentence(name: str, tmp_path: Path):
    (tmp_path / "a.yaml").write_text(STRANGE[name])
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "a.yaml")
    assert "a.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_aliases_and_merged_keys_are_read():
    text = "base: &b {a: 1, c: 2}\nother: {<<: *b, a: 3}\nlist: [*b, *b]"
    assert plain(text, "x")["other"] == {"a": 3, "c": 2}
