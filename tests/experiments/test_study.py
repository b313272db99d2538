"""The study's rules of tuning and comparing, and its files."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy")

import pandas as pd
import torch
import transformers
import yaml
from scipy import stats

import nmflow
from nmflow.experiments import config, sweep

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "configs" / "study"
sys.path.insert(0, str(ROOT / "study"))

choose, compare = importlib.import_module("choose"), importlib.import_module("compare")

TASKS = ["lm", "lstm", "vit", "resnet", "sst2", "glue", "multi30k", "multi30k-wide", "cola",
         "mrpc", "sst2-minilm"]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_task_of_the_protocol_has_its_file(task: str) -> None:
    assert config.load(STUDY / f"{task}.yaml").training.steps


FILES = sorted(STUDY.glob("*.yaml"))
SWEEPS = [f for f in FILES if "\nbase: " in f.read_text()]


@pytest.mark.parametrize("file", [f for f in FILES if f not in SWEEPS], ids=lambda f: f.stem)
def test_every_run_of_the_study_reads(file: Path) -> None:
    assert config.load(file).training.steps


@pytest.mark.parametrize("file", SWEEPS, ids=lambda f: f.stem)
def test_every_sweep_of_the_study_reads(file: Path) -> None:
    plan = sweep.load(file)
    assert len(plan.cells) == len({cell.run.hash for cell in plan.cells})


def test_every_recipe_gets_as_many_settings() -> None:
    assert {len(options) for options in choose.OPTIONS.values()} == {6}
    assert set(choose.OPTIONS) == set(choose.TITLES) - {"dense"}


def test_the_best_rate_is_by_validation_and_an_edge_is_told() -> None:
    rows = [
        (recipe, rate, seed, loss + 0.01 * seed, 99 - loss)
        for recipe, losses in (("A", (3, 1, 2)), ("B", (1, 2, 3)))
        for rate, loss in zip((1e-3, 2e-3, 4e-3), losses, strict=True)
        for seed in (100, 101)
    ]
    columns = ["recipe", "training.learning_rate", "seed", "validation_loss", "test_loss"]
    frame = pd.DataFrame(rows, columns=columns)
    assert choose.best_rates(frame) == {"A": 2e-3, "B": 1e-3}
    assert choose.at_an_edge(frame) == {"B": 5e-4}


def test_a_family_is_paired_by_seed_and_adjusted_together() -> None:
    ours, theirs = {0: 5.0, 1: 6.2, 2: 5.5, 3: 6.0}, {0: 4.0, 1: 5.0, 2: 4.7, 3: 4.9, 9: 0.0}
    other = {0: 5.1, 1: 6.0, 2: 5.7, 3: 5.9}
    frame = pd.DataFrame(
        [(name, "1:16", seed, value) for name, figures in
         (("ours", ours), ("theirs", theirs), ("other", other)) for seed, value in figures.items()],
        columns=["setup", "pattern", "seed", "points"],
    )  # fmt: skip
    pairs = [("ours", "1:16", "theirs", "1:16"), ("ours", "1:16", "other", "1:16")]
    pairs.append(("ours", "1:16", "absent", "1:16"))
    assert not compare.family(frame, pairs, "points")  # four seeds decide nothing
    first, second = compare.family(frame, pairs, "points", least=4)
    shared = [0, 1, 2, 3]
    p = stats.ttest_rel([ours[s] for s in shared], [theirs[s] for s in shared]).pvalue
    assert (first.rival, second.rival) == ("theirs", "other")
    assert math.isclose(first.p, 2 * p)
    assert first.verdict() == "confirmed"
    assert first.verdict(claimed=5.0) == "confirmed, below the paper's size"
    assert second.verdict() == "undecided"


@pytest.mark.parametrize("n", [5, 10, 30])
def test_what_is_detectable_is_shown_four_times_in_five(n: int) -> None:
    differences = [(-1.0) ** i for i in range(n)]
    s = pd.Series(differences).std()
    critical = stats.t.ppf(0.975, n - 1)
    power = stats.nct.sf(critical, n - 1, compare.detectable(differences) / (s / math.sqrt(n)))
    assert abs(power - 0.8) < 0.03


def test_the_tuning_of_a_rival_is_not_among_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = importlib.import_module("tables")
    for name in ("lm-main-1-16", "lm-dense", "lm-dense-rates", "lm-rates"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.parquet").touch()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lm = importlib.import_module("tasks").BY_NAME["lm"]
    assert tables._tables(lm) == ["lm-dense", "lm-main-1-16"]


@pytest.mark.parametrize("pattern", choose.PATTERNS)
def test_a_narrower_network_has_the_flops_of_the_sparse_one(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    by_name = importlib.import_module("tasks").BY_NAME
    assert by_name["lm"].narrower(pattern) == 256 * n // m
    # An LSTM of one layer: 8·w² products in it, 104·w for the characters that it tells apart.
    wanted = 8 * 128**2 * n / m + 104 * 128
    width = by_name["lstm"].narrower(pattern)
    below, above = (8 * w**2 + 104 * w for w in (width - 0.5, width + 0.5))
    assert below <= wanted <= above


def test_a_narrower_resnet_has_the_flops_of_the_sparse_one() -> None:
    """Nearest of the widths that its blocks allow, counted on the networks themselves."""
    task = importlib.import_module("tasks").BY_NAME["resnet"]
    raw = yaml.safe_load((STUDY / "resnet.yaml").read_text())
    fields, image = raw["model"]["fields"], {"pixel_values": torch.zeros(1, 3, 32, 32)}

    def flops(pattern: str | None = None, **changed: Any) -> int:
        config = transformers.ResNetConfig(**{**fields, **changed, "num_labels": 10})
        network = transformers.ResNetForImageClassification(config).eval()
        if pattern is None:
            return nmflow.cost(network, image).dense_flops
        return nmflow.cost(network, image, pattern, include=raw["include"]).flops

    for pattern in ("1:8", "1:16", "1:32"):
        (sizes,) = task.narrow(pattern).values()
        wanted, width = flops(pattern), sizes[0]
        below, has, above = (
            flops(hidden_sizes=[w * m for m in task.multiples])
            for w in (width - 4, width, width + 4)
        )
        assert below < wanted < above
        assert abs(has - wanted) <= min(wanted - below, above - wanted)


def test_pages_are_what_the_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("figures", "noise"):  # which draw into docs/
        monkeypatch.setattr(importlib.import_module(name), "write", lambda path, content: None)
    pages = importlib.import_module("pages")
    for name, (build, needed) in pages.BUILT.items():
        if list(pages.RESULTS.glob(f"{needed}/results.parquet")):
            assert (pages.PAGES / name).read_text() == build().rstrip() + "\n", (
                f"run: make study ({name})"
            )


@pytest.mark.parametrize("more", [False, True])
def test_every_way_has_the_processor_time_of_the_dense_steps(more: bool) -> None:
    ways = importlib.import_module("equal_time_ways")
    name, given = (ways.MORE_NAME, ways.MORE) if more else (ways.NAME, ways.WAYS)
    costs = pd.read_csv(ways.COSTS[name])
    plan = sweep.load(STUDY / f"{name}.yaml")
    first = sweep.load(STUDY / f"{ways.NAME}.yaml")
    steps = {cell.run.recipe.title: cell.run.training.steps for cell in (*first.cells, *plan.cells)}
    # The table has four digits.
    assert all(abs(steps[way] - count) <= 1 for way, count in ways.solved(costs).items())
    seconds = {way: float((part["share"] * part["cpu_seconds"]).sum())
               for way, part in costs.groupby("way")}  # fmt: skip
    for title, way in given.items():
        assert sum(ways.shares(way).values()) == pytest.approx(1)
        if way.like:
            assert steps[title] == steps[way.like]
            continue
        assert set(costs.loc[costs["way"] == title, "phase"]) == set(ways.shares(way))
        spent = steps[title] * seconds[title]
        assert spent == pytest.approx(240 * seconds["Dense"], abs=1.5 * seconds[title])
    for cell in plan.cells:
        assert cell.run.sparse_steps == ("on" if given[cell.run.recipe.title].sparse else "off")


def test_the_phases_of_a_way_are_those_of_its_steps() -> None:
    """Counted by hand: 40 steps of a decay of four frames, 2:8 and 1:8 on kept places."""
    ways = importlib.import_module("equal_time_ways")
    sdgf = ways.MORE["SDGF-Stepwise"]
    recipe, order = ways.shortest(sdgf, 10)
    assert order == [
        *["dense"] * 10, *["masked"] * 20, *["kept 2:8"] * 10, *["kept 1:8"] * 10, *["frozen"] * 10
    ]  # fmt: skip
    assert ways.phases(sdgf._replace(sparse=False), recipe, 60)[10:] == ["masked"] * 50


def test_the_page_for_engineers_has_the_tables_figures() -> None:
    overview = importlib.import_module("overview")
    assert overview.PAGE.read_text("utf-8") == overview.overview(), "run: make study"


def test_the_second_part_goes_from_stage_to_stage(tmp_path: Path, monkeypatch) -> None:
    """Every sweep that a finished stage allows loads, until the page has its verdict."""
    pretrained = importlib.import_module("pretrained")
    tables: dict[str, pd.DataFrame] = {}
    tuning = importlib.import_module("pretrained_tuning")
    monkeypatch.setattr(tuning, "results", tables.__getitem__)
    for module in (pretrained, tuning):
        monkeypatch.setattr(module, "there", tables.__contains__)

    def figure(rate: float, name: str, taught: bool) -> float:
        # Best at 4e-4 (dense: at the edge, 1e-4); the recipes and their teachers differ.
        best = 1e-4 if name == "dense" else 4e-4
        return 0.3 - 0.1 * abs(math.log2(rate / best)) + 0.01 * len(name) + 0.05 * taught

    def finish(plan: Any) -> pd.DataFrame:
        rows = []
        for cell in plan.cells:
            run, taught = cell.run, cell.run.distill is not None
            value = figure(run.training.learning_rate, run.recipe.name, taught)
            value += 0.001 * ((run.seed * 7) % 5) - 0.02 * (run.recipe.options.get("lam") == 0.002)
            about = {"recipe": run.recipe.title, "pattern": run.pattern_text, "seed": run.seed}
            judged = {f"{split}_matthews": value for split in ("validation", "test")}
            rows.append({**cell.place, **about, **judged})
        return pd.DataFrame(rows)

    page = importlib.import_module("pretrained_page")
    base = str(STUDY / "cola.yaml")
    ran: list[str] = []
    for _ in range(9):
        for _, part, _, axes in list(pretrained.sweeps("cola")):
            if f"cola-{part}" not in tables:
                file = tmp_path / f"{part}.yaml"
                file.write_text(yaml.safe_dump({"base": base, "axes": axes}))
                tables[f"cola-{part}"] = finish(sweep.load(file))
                ran.append(part)
    chain = {"rates", "options", "main-1-8", "distilled-rates", "distilled-1-8"}
    patterns = {
        f"{part}-{p}"
        for part in ("main", "distilled")
        for p in ("1-16", "1-4", "1-32", "1-128", "2-4")
    }
    dense = {"dense-rates", "dense-rates-edges", "teacher", "dense", "rivals-rates", "rivals"}
    more = {"long", "rivals-long", "attention", "panels", "permuted", "first-rates", "start-rates",
            "start", "long-teacher", "long-taught", "long-taught-more"}  # fmt: skip
    more |= {"general-0.0002", "general-0.0004", "general-0.0008"}
    assert set(ran) == chain | {f"{part}-others" for part in chain} | patterns | dense | more
    assert pretrained.rates("cola", "rates")["Settling"] == 4e-4
    assert len(tables["cola-dense-rates-edges"]) == 1
    chosen = pretrained.choices("cola", "") | pretrained.choices("cola", "-others")
    assert set(chosen) == set(pretrained.OPTIONS)
    assert chosen["sr-ste"].options["lam"] != 0.002
    assert len(tables["cola-main-1-8"]) == len(tables["cola-distilled-1-8"]) == 3 * 5
    assert set(tables["cola-rivals"]["setup"]) == set(pretrained.CUTS)
    written = page.pretrained()
    assert "MDGF-Exponential, distilled" in written
    assert "**+5.00 [" in written  # a teacher's gain, in every recipe
    for words in ("FF 192, distilled", "Four times the steps", "A better teacher",
                  "Where training starts", "Every pattern, distilled", "FF and attention",
                  "over 1:8 as units stand", "A recipe of ours"):  # fmt: skip
        assert words in written, words
    # Where differences vary, seeds 5 to 9 join.
    noisy = tables["cola-main-1-8"]
    settling = noisy["setup"] == "Settling"
    noisy.loc[settling, "test_matthews"] += 0.03 * noisy.loc[settling, "seed"]
    more = {one.part: one for one in pretrained.sweeps("cola")}["main-1-8-more"]
    assert more.axes["seed"] == [5, 6, 7, 8, 9]


def test_the_second_parts_settings_are_three_each() -> None:
    pretrained = importlib.import_module("pretrained")
    assert {len(options) for options in pretrained.OPTIONS.values()} == {3}
    for task in pretrained.TASKS.values():
        names = [name for group in task.groups.values() for name in group]
        assert set(names) <= set(pretrained.OPTIONS)
