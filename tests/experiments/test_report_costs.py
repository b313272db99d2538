"""Quality against cost: fronts, and inference time that is measured once a network and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytest.importorskip("typer")

import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from made_up import DENSE, LINEAR, SRSTE, narrow, page, patterns, result, rows, save
from nmflow.cli import app
from nmflow.errors import ConfigError
from nmflow.experiments.report import compare as comparing
from nmflow.experiments.report import pareto, times
from nmflow.experiments.report import settings as families
from nmflow.experiments.report.page import write_report
from nmflow.experiments.report.settings import Cell
from nmflow.experiments.report.statistics import Summary
from nmflow.experiments.run_folder import finished_runs

# -- fronts ---------------------------------------------------------------------------------------


def point(cost: float, quality: float) -> pareto.Point:
    (setting,) = comparing.settings([result(SRSTE, 0, 1.0, quality)], SRSTE)
    made = Cell(setting, setting.recipes[0])
    return pareto.Point(made, "", Summary(1, quality, None), None, None, {"bytes": cost})


SOME = [point(c, q) for c in range(1, 6) for q in range(5)]


@given(st.lists(st.sampled_from(SOME), max_size=12), st.booleans())
def test_the_front_is_what_no_other_point_beats(found: list[pareto.Point], less: bool):
    def beats(a: pareto.Point, b: pareto.Point) -> bool:
        better, equal = a.quality.mean > b.quality.mean, a.quality.mean == b.quality.mean
        better = (a.quality.mean < b.quality.mean) if less else better
        cheap, same = a.costs["bytes"] < b.costs["bytes"], a.costs["bytes"] == b.costs["bytes"]
        return (better or equal) and (cheap or same) and (better or cheap)

    wanted = [p for p in found if not any(beats(other, p) for other in found)]
    got = pareto.front(found, "bytes", less)
    assert sorted(map(id, got)) == sorted(map(id, wanted))
    assert [p.costs["bytes"] for p in got] == sorted(p.costs["bytes"] for p in got)


def test_points_without_a_cost_are_on_no_front():
    assert pareto.front(SOME, "time_us", less=False) == []


def test_all_networks_of_a_task_are_points_of_one_plot():
    (group,) = families.groups(comparing.settings([*patterns(), *narrow(8)], SRSTE))
    found = list(pareto.rows(group, times.Times()))
    assert len(found) == 3 * 2 + 1 + 1  # the lent dense runs are one point
    small = next(row for row in found if row["model.fields.n_inner"] == "8")
    assert (small["recipe"], small["pattern"]) == ("Dense", "–")
    best = next(r for r in found if r["recipe"] == "Dense" and r is not small)
    assert best["front_inference_flops"]
    assert best["inference_flops"] == 1000
    assert not small["front_inference_flops"]  # as dear, and worse


# -- time -----------------------------------------------------------------------------------------


def entry(result: Mapping[str, Any], batch: int, date: str, **ways: float) -> dict[str, Any]:
    timing = {"q10": 1.0, "q90": 9.0, "runs": 5}
    return {
        "key": times.network_key(result),
        "run": result["id"],
        "batch": batch,
        "threads": 1,
        "ways": {way.replace("_", ", "): {"median": t, **timing} for way, t in ways.items()},
        "packed_weights": "1 of 2",
        "clock": "wall time",
        "generates": False,
        "cpu": "a machine",
        "versions": "nmflow 0",
        "date": date,
    }


def test_time_belongs_to_a_network_and_its_placement_never_to_recipe_or_seed():
    runs = patterns("1:4", "1:8")
    keys = {(r["recipe"], r["pattern"]): times.network_key(r) for r in runs}
    assert keys["SR-STE", "1:4"] == keys["Linear", "1:4"] != keys["Linear", "1:8"]
    assert keys["Dense", "1:4"] not in (keys["Linear", "1:4"], keys["Linear", "1:8"])
    assert len(set(keys.values())) == 3
    assert len({times.network_key(r) for r in narrow(8) + runs}) == 4


def test_times_that_were_kept_are_drawn_later_and_conditions_are_never_mixed(tmp_path: Path):
    runs = patterns("1:4", "1:8")
    save(tmp_path / "runs", runs)
    kept: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["seed"] == 0 and run["recipe"] != "Linear":
            ways = {"dense": 9.0, "dense_best": 7.0}
            ways |= {} if run["recipe"] == "Dense" else {"packed": 3.0}
            kept[run["id"]] = [entry(run, 1, "2026-01-01", **ways)]
    first = next(iter(kept))
    kept[first].append(entry(runs[0], 8, "2026-02-01", dense=100.0))
    for name, entries in kept.items():
        (tmp_path / "runs" / name / "time.json").write_text(json.dumps(entries))
    found = times.read(finished_runs([tmp_path / "runs"]))
    assert found.condition == (1, 1, "a machine")
    html = write_report([tmp_path / "runs"], tmp_path / "report").read_text()
    assert "Median and deciles of a forward pass" in html
    drawn = {(r["pattern"], r["recipe"]): r for r in rows(tmp_path, "pareto.csv")}
    assert (drawn["–", "Dense"]["time_us"], drawn["–", "Dense"]["time_way"]) == (
        "7.0",
        "dense, best",
    )
    assert drawn["1:8", "Linear"]["time_us"] == "3.0"  # measured on SR-STE's network
    other = times.read(finished_runs([tmp_path / "runs"]), (8, 1))
    assert list(other.entries) == [times.network_key(runs[0])]
    assert other.others == 2
    assert times.read(finished_runs([tmp_path / "runs"]), (2, 1)).entries == {}


def test_without_a_measurement_the_page_says_how_to_make_one(tmp_path: Path):
    assert "--time" in page(tmp_path, patterns("1:4"))


def test_networks_that_were_not_kept_are_said(tmp_path: Path):
    save(tmp_path / "runs", patterns("1:4", "1:8"))
    results = finished_runs([tmp_path / "runs"])
    problems = times.measure(results)
    assert len(problems) == 3
    assert all("no run kept its network (training.save_model)" in said for said in problems)
    found = times.read(results)
    found.problems = problems
    html = write_report([tmp_path / "runs"], tmp_path / "report", times=found).read_text()
    assert "Not timed: gpt2, dense" in html
    with pytest.raises(ConfigError, match="batch is 0"):
        times.measure(results, batch=0)


def test_the_command_measures_on_request_alone(tmp_path: Path):
    runs = str(save(tmp_path / "runs", patterns("1:4")))
    found = CliRunner().invoke(app(), ["report", runs, "--time", "--batch", "2"])
    assert found.exit_code == 0, found.output
    assert "Not timed: gpt2" in (tmp_path / "runs" / "report" / "report.md").read_text()
    found = CliRunner().invoke(app(), ["report", runs, "--batch", "2"])
    assert isinstance(found.exception, ConfigError)
    assert "batch is 2 without a measurement: add --time" in str(found.exception)


def test_a_decoder_is_given_its_text_and_no_network_its_labels():
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
    }
    config = transformers.T5Config(**{**sizes, "decoder_start_token_id": 0})
    model = transformers.T5ForConditionalGeneration(config).eval()
    example = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
    example["labels"] = torch.tensor([[3, 4, -100]])
    given = times.inputs(model, example, 3)
    assert given["input_ids"].shape == (3, 5)
    assert given["decoder_input_ids"].tolist() == [[0, 3, 4]] * 3
    found = model(**given)
    assert found.loss is None
    assert found.logits.shape == (3, 3, 11)


def test_a_real_sweep_is_timed_once_a_network(tmp_path: Path):
    from nmflow.experiments import sweep

    base = {
        "task": "language-modelling",
        "options": {"length": 16},
        "data": {"source": "pydoc", "limit": 20_000},
        "model": {
            "kind": "gpt2",
            "fields": {"n_embd": 32, "n_inner": 64, "n_layer": 1, "n_head": 2},
        },
        "training": {"steps": 2, "batch_size": 2, "log_every": 2, "eval_rows": 4, "device": "cpu"},
    }
    raw = {
        "base": base,
        "axes": {"recipe": [DENSE, SRSTE, LINEAR], "pattern": ["1:4", "1:8"], "seed": [0]},
        "output": str(tmp_path / "s"),
        "threads": 1,
    }
    (tmp_path / "s.yaml").write_text(json.dumps(raw))
    assert sweep.run(sweep.load(tmp_path / "s.yaml"), workers=1) == []
    results = finished_runs([tmp_path / "s"])
    said: list[str] = []
    assert times.measure(results, batch=2, seconds=0.001, progress=said.append) == []
    assert len(said) == len(list((tmp_path / "s").rglob("time.json"))) == 3
    found = times.read(results)
    assert found.condition is not None
    assert found.condition[:2] == (2, 1)
    for one in found.entries.values():
        assert set(one["ways"]) >= {"dense", "dense, best"}
        assert all(0 < t["q10"] <= t["median"] <= t["q90"] for t in one["ways"].values())
    assert sum("packed" in one["ways"] for one in found.entries.values()) == 2
    assert times.measure(results[:1], batch=2, seconds=0.001) == []  # takes the old one's place
    assert len(times.read(results).entries) == 3
    html = write_report([tmp_path / "s"], tmp_path / "report").read_text()
    assert "batch 2" in html


def test_beam_search_is_not_what_was_timed(tmp_path: Path):
    runs = patterns("1:4", "1:8")
    save(tmp_path / "runs", runs)
    made = {**entry(runs[0], 1, "2026-01-01", dense=9.0), "generates": True}
    (tmp_path / "runs" / runs[0]["id"] / "time.json").write_text(json.dumps([made]))
    html = write_report([tmp_path / "runs"], tmp_path / "report").read_text()
    assert "one forward pass over a whole example" in html
    assert "Without a time under this condition" in html
