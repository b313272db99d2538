"""The first screen of a report: what won, by how much, what is not shown and what is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from made_up import DENSE, LINEAR, SRSTE, cell, crossed, page, patterns, result, save
from nmflow.experiments.report import compare, settings, verdict
from nmflow.experiments.report.blocks import Figure, Points
from nmflow.experiments.report.times import Times, quick
from nmflow.experiments.run_folder import unfinished_runs


def lines(runs: list[dict], unfinished: tuple[str, ...] = ()) -> list[str]:
    """The verdict's lines; the contest is adjusted as a page does it."""
    found = compare.settings(runs, SRSTE)
    contest = settings.adjust(found)
    section = verdict.verdict(settings.groups(found), contest, unfinished, Times())
    assert isinstance(section.blocks[0], Points)
    return section.blocks[0].items


def test_what_won_and_by_how_much():
    won, much, rest = lines(patterns("1:4", "1:8"))
    assert won == "Better than SR-STE: Linear in 2 of 2 settings."
    assert much.startswith("The largest difference, at 1:4, is +0.05")
    assert "of the gap to dense" in much
    assert "small differences, from so few seeds" in rest
    assert "speed, which was not measured" in rest


def test_a_null_is_called_a_null_and_a_loss_a_loss():
    null = crossed(SRSTE, key="pattern", values=["1:4"])
    null += [result("sdgf-stepwise", s, 2.0, 0.4 + 0.01 * s + 0.02 * (-1) ** s) for s in range(3)]
    null = [{**r, "setting_hash": "one"} for r in null]
    first, rest = lines(null)
    assert first == "No recipe is shown to differ from SR-STE."
    assert "any difference in the comparison" in rest
    worse = [result(SRSTE, s, 2.0, 0.5 + s / 100) for s in range(3)]
    worse += [result(LINEAR, s, 2.0, 0.4 + s / 100 + s / 1000) for s in range(3)]
    assert lines(worse)[0] == "Nothing is better than SR-STE. Worse: Linear."


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (list(cell(DENSE)), "Nothing is compared"),
        (crossed(SRSTE, LINEAR, key="pattern", values=["1:4"], seeds=1), "with one seed"),
        (list(cell(LINEAR)), "Nothing is compared"),
    ],
)
def test_what_cannot_be_judged_is_said(runs: list[dict], said: str):
    assert said in lines(runs)[0]


def test_missing_seeds_and_unfinished_runs_are_named():
    runs = [r for r in patterns("1:4") if (r["recipe"], r["seed"]) != ("Linear", 1)]
    said = lines(runs, ("sr-ste_seed9",))[-1]
    assert "Missing seeds: Linear (seed 1)" in said
    assert "1 run is not finished and not on this page: sr-ste_seed9." in said


def test_runs_without_a_result_are_found_in_trainings_and_in_sweeps(tmp_path: Path):
    save(tmp_path / "runs", patterns("1:4"))
    begun = tmp_path / "runs" / "begun"
    (begun / "checkpoint-1" / "deeper").mkdir(parents=True)
    (begun / "config.json").write_text("{}")
    (begun / "checkpoint-1" / "config.json").write_text("{}")  # of a network
    assert unfinished_runs([tmp_path / "runs"]) == ["begun"]
    cells = [{"id": one["id"]} for one in patterns("1:4")][:2]
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    told = {"cells_in": "../runs", "cells": [*cells, {"id": "never"}, {"id": "begun"}]}
    (sweep / "sweep.json").write_text(json.dumps(told))
    assert unfinished_runs([sweep]) == ["never", "begun"]


def test_a_forest_has_a_row_for_every_recipe_and_setting():
    found = compare.settings(patterns("1:4", "1:8"), SRSTE)
    contest = settings.adjust(found)
    section = verdict.verdict(settings.groups(found), contest, (), Times())
    (figure,) = [b for b in section.blocks if isinstance(b, Figure)]
    for name in ("1:4: Linear", "1:8: Linear"):
        assert f"<!-- {name} -->" in figure.svg


def test_the_page_allows_its_one_script_by_its_hash(tmp_path: Path):
    html = page(tmp_path, patterns("1:4", "1:8"))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert html.index("Verdict") < html.index("Contents") < html.index("<table>")


def test_networks_are_timed_by_default_only_where_that_takes_seconds(tmp_path: Path):
    runs = patterns("1:4")
    kept = []
    for one in runs:
        folder = tmp_path / one["id"]
        (folder / "model").mkdir(parents=True)
        kept.append({**one, "folder": str(folder)})
    assert quick(kept)
    assert not quick(runs)  # nothing was saved
    large = [{**one, "cost": {**one["cost"], "parameters": 10**9}} for one in kept]
    assert not quick(large)
    assert not quick(
        [{**r, "folder": str(tmp_path)} for r in patterns("1:2", "1:4", "1:8", "1:16")]
    )
