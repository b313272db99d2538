"""The page over a sweep: families, one adjustment, fronts, times, and any axis without nonsense."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from made_up import result, save
from nmflow.errors import ConfigError
from nmflow.experiments import (
    comparing,
    families,
    overview_plots,
    overview_words,
    pareto,
    plots,
    times,
    words,
)
from nmflow.experiments.families import Cell
from nmflow.experiments.report import write_report
from nmflow.experiments.results import finished_runs
from nmflow.experiments.statistics import Summary, interval

LINEAR, SRSTE, DENSE = "mdgf-linear", "sr-ste", "dense"
GAIN = {DENSE: 0.08, SRSTE: 0.0, LINEAR: 0.05, "sdgf-stepwise": 0.0}


def cell(
    recipe: str, keys: Mapping[str, Any] | None = None, seeds: int = 3, base: float = 0.4
) -> Iterator[dict[str, Any]]:
    """A recipe's runs in one setting; the linear one is better by 0.05, give or take little."""
    for seed in range(seeds):
        accuracy = base + GAIN[recipe] + 0.01 * seed
        accuracy += 0.002 * ((seed * 7 + len(recipe)) % 3) * (recipe != SRSTE)
        yield result(recipe, seed, 3 - accuracy, accuracy, keys, tracked=[])


def crossed(*recipes: str, key: str, values: list[Any], seeds: int = 3) -> list[dict[str, Any]]:
    return [
        run
        for place, value in enumerate(values)
        for recipe in recipes
        for run in cell(recipe, {key: value}, seeds, 0.4 - 0.03 * place)
    ]


def patterns(*values: str) -> list[dict[str, Any]]:
    """Two sparse recipes at three patterns; dense was run at the first alone."""
    chosen: list[Any] = list(values) or ["1:4", "1:8", "1:16"]
    sparse = crossed(SRSTE, LINEAR, key="pattern", values=chosen)
    return [*cell(DENSE, {"pattern": "1:4"}), *sparse]


def page(folder: Path, runs: list[dict[str, Any]], **more: Any) -> str:
    save(folder / "runs", runs)
    html = write_report([folder / "runs"], folder / "report", **more).read_text()
    return re.sub(r'data:image/svg\+xml;base64,[^"]*', "", html)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The page of two sparse recipes at two patterns, and its folder."""
    folder = tmp_path_factory.mktemp("swept")
    return folder, page(folder, patterns("1:4", "1:8"))


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "report" / name).open() as file:
        return list(csv.DictReader(file))


# -- families -------------------------------------------------------------------------------------


def test_a_dense_run_bounds_every_placement_of_its_network_and_training():
    found = comparing.settings(patterns(), SRSTE)
    assert len(found) == 3
    assert len({setting.family for setting in found}) == 1
    for setting in found:
        assert [recipe.name for recipe in setting.recipes] == [DENSE, SRSTE, LINEAR]
        assert setting.dense is not None
        assert setting.dense.values("accuracy") == found[0].recipes[0].values("accuracy")
        assert setting.sample["recipe"] != "Dense"
    assert [len(setting.lent) for setting in found] == [0, 3, 3]


def test_a_setting_of_nothing_but_lent_dense_runs_is_no_section():
    elsewhere = list(cell(DENSE, {"pattern": "1:2"}))
    sparse = crossed(SRSTE, LINEAR, key="pattern", values=["1:4", "1:8"])
    found = comparing.settings([*elsewhere, *sparse], SRSTE)
    assert [setting.sample["pattern"] for setting in found] == ["1:4", "1:8"]
    twice = [*elsewhere, *cell(DENSE, {"pattern": "1:4"})]
    (alone,) = comparing.settings(twice, SRSTE)  # and of dense runs only, one stands for all
    assert [recipe.name for recipe in alone.recipes] == [DENSE]


def test_another_network_or_learning_rate_is_another_family():
    runs = [*patterns(), *cell(DENSE, {"training.learning_rate": 0.5}), *narrow(8)]
    found = comparing.settings(runs, SRSTE)
    assert len({setting.family for setting in found}) == 3
    assert [setting.sparse == [] for setting in found] == [False] * 3 + [True] * 2


def test_what_the_seeds_of_a_setting_lack_is_lent():
    first, *others = patterns()
    own = result(DENSE, 0, 2.0, 0.9, {"pattern": "1:16"})
    found = comparing.settings([first, own, *others], SRSTE)
    last = next(s for s in found if s.sample["pattern"] == "1:16")
    assert last.dense is not None
    assert last.dense.values("accuracy")[0] == 0.9  # its own stays
    assert sorted(run["seed"] for run in last.lent) == [1, 2]


def test_dense_may_be_the_baseline_of_settings_that_it_is_lent_to():
    found = comparing.settings(patterns(), DENSE)
    for setting in found:
        assert setting.comparison(setting.sparse[0], "accuracy") is not None
        assert "the dense network" not in " ".join(words.shown(setting))


def narrow(width: int) -> list[dict[str, Any]]:
    return list(cell(DENSE, {"model.fields": {"n_inner": width}}, base=0.3))


# -- one adjustment -------------------------------------------------------------------------------


def test_the_page_adjusts_all_its_headline_comparisons_at_once():
    runs = crossed(SRSTE, LINEAR, "sdgf-stepwise", key="pattern", values=["1:4", "1:8", "1:16"])
    found = comparing.settings(runs, SRSTE)
    contest = families.adjust(found)
    assert len(contest) == 6
    assert {c.metric for c in contest} == {"accuracy"}
    raw = []
    for c in contest:
        setting = next(s for s in found if c in s.comparisons)
        assert setting.baseline is not None
        these, those = c.recipe.values("accuracy"), setting.baseline.values("accuracy")
        raw.append(stats.ttest_rel(list(these.values()), list(those.values())).pvalue)
    ranked = sorted(raw)
    for c, p in zip(contest, raw, strict=True):
        place = ranked.index(p)
        wanted = max(min(1.0, (6 - i) * ranked[i]) for i in range(place + 1))
        assert c.overall == pytest.approx(wanted)


def test_an_interval_of_a_mean_is_that_of_scipy():
    values = [0.2, 0.5, 0.1, 0.9]
    test = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((test.low, test.high))
    assert interval([1.0]) is None


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


# -- drawings -------------------------------------------------------------------------------------


def test_no_two_recipes_of_a_page_look_alike():
    looks = [tuple(map(str, plots.style(place).values())) for place in range(300)]
    assert len(set(looks)) == 300
    first = [plots.style(place) for place in range(8)]
    for part in ("color", "linestyle", "marker"):
        assert len({str(one[part]) for one in first}) == 8


def test_a_recipe_looks_the_same_in_every_setting():
    mixed = [*cell(LINEAR, {"pattern": "1:4"}), *cell(SRSTE, {"pattern": "1:8"})]
    mixed += cell(LINEAR, {"pattern": "1:8"})
    found = comparing.settings(mixed, SRSTE)
    places = {(r.title, r.place) for setting in found for r in setting.recipes}
    assert len(places) == 2


def test_keys_in_fixed_company_go_along_one_axis():
    both = [("1:4", "ff"), ("1:16", "all"), ("1:16", "ff"), ("1:4", "all")]
    runs = [r for p, i in both for r in cell(SRSTE, {"pattern": p, "include": i})]
    (group,) = families.groups(comparing.settings(runs, SRSTE))
    along, found = overview_plots.panels(group)
    assert along == ["pattern"]
    assert list(found) == ["include all", "include ff"]
    (group,) = families.groups(comparing.settings(runs[:6], SRSTE))
    along, found = overview_plots.panels(group)
    assert along == ["pattern", "include"]
    assert len(found) == 1


# -- any sweep ------------------------------------------------------------------------------------

PLACED = [
    {"pattern": "1:16", "include": "ff"},
    {"pattern": {"ff": "1:16", "qk": "1:4"}, "include": ["ff", "qk"]},
]
ELSEWHERE = [
    {**run, "data": {**run["data"], "sha256": "cd" * 32}}
    for recipe in (SRSTE, LINEAR)
    for run in cell(recipe, {"data.limit": 5})
]
LACKING = result(LINEAR, 1, 2.0, 0.4, {"pattern": "1:8"})["id"]
RATES = crossed(SRSTE, LINEAR, key="training.learning_rate", values=[1e-3, 3e-3])
SWEEPS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "patterns": (
        patterns("1:4", "1:8"),
        ["all count as one family", "another placement (1:4)", "Better than"],
    ),
    "rates": (RATES, ["training.learning_rate 0.003", "other settings of the page vary"]),
    "placement": (
        [run for keys in PLACED for recipe in (DENSE, LINEAR) for run in cell(recipe, keys)],
        ["No setting has a run of the baseline sr-ste", "ff 1:16, qk 1:4 in ff, qk"],
    ),
    "networks": (
        [*patterns("1:4", "1:8"), *narrow(8), *narrow(16)],
        ["model.fields.n_inner 8", "dense networks of other sizes are in the plots"],
    ),
    "budgets": (
        crossed(SRSTE, LINEAR, key="training.budget", values=[1e9, 2e9]),
        ["training.budget 2e+09", "a budget of 1 G training FLOPs", "from 40 to 50 steps"],
    ),
    "one seed": (
        crossed(DENSE, SRSTE, LINEAR, key="pattern", values=["1:4", "1:8"], seeds=1),
        ["no interval and no test", "one seed"],
    ),
    "one recipe": (
        crossed(SRSTE, key="pattern", values=["1:4", "1:8"]),
        ["SR-STE is the only recipe here"],
    ),
    "no baseline": (
        crossed(DENSE, LINEAR, "sdgf-stepwise", key="pattern", values=["1:4", "1:8"]),
        ["No setting has a run of the baseline sr-ste"],
    ),
    "a seed missing": (
        [
            r
            for r in patterns("1:4", "1:8")
            if (r["recipe"], r["pattern"], r["seed"]) != ("Linear", "1:8", 1)
        ],
        ["missing are: Linear at 1:8 (seed 1)"],
    ),
    "recipes apart": (
        [*cell(LINEAR, {"pattern": "1:4"}), *cell(SRSTE, {"pattern": "1:8"})],
        ["1 setting is without a run of the baseline sr-ste", "nothing is compared there: 1:4"],
    ),
    "dense alone": (
        [*cell(DENSE), *narrow(8)],
        ["model.fields.n_inner", "learning rate and schedule were not tuned"],
    ),
    "two tasks": (
        [*patterns("1:4", "1:8"), *ELSEWHERE],
        ["What this page holds", "Quality against cost: language-modelling"],
    ),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_over_any_axis_makes_a_page_without_nonsense(name: str, tmp_path: Path):
    runs, sentences = SWEEPS[name]
    html = page(tmp_path, runs)
    for sentence in sentences:
        assert sentence in html, sentence
    said = re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)
    for wrong in ("nan", "None", "inf", "[]", "{", "}", "  ,"):
        assert not re.search(rf"(?<!\w){re.escape(wrong)}(?!\w)", said), wrong
    assert not re.search(r"\b1 (settings|comparisons|seeds|recipes) ", said)
    targets = set(re.findall(r'href="#([^"]*)"', html))
    assert targets <= set(re.findall(r'id="([^"]*)"', html))
    assert html.count("<details>") == len(comparing.settings(runs, SRSTE))
    plain = (tmp_path / "report" / "report.md").read_text()
    links = re.findall(r"\]\((figures/[^)]*)\)", plain)
    assert len(links) == len(set(links)) == len(list((tmp_path / "report" / "figures").iterdir()))
    assert all((tmp_path / "report" / link).is_file() for link in links)
    headline = [r for r in rows(tmp_path, "summary.csv") if r["metric"] == "accuracy"]
    assert len(headline) == len(rows(tmp_path, "pareto.csv"))


def test_the_summary_has_what_differs_as_columns(swept: tuple[Path, str]):
    found = {
        (r["pattern"], r["recipe"]): r
        for r in rows(swept[0], "summary.csv")
        if r["metric"] == "accuracy"
    }
    assert set(found) == {
        ("–", "Dense"),
        *((p, r) for p in ("1:4", "1:8") for r in ("SR-STE", "Linear")),
    }
    one = found["1:8", "Linear"]
    assert float(one["p"]) <= float(one["p_holm_page"]) <= 2 * float(one["p"])
    assert float(one["mean_low"]) < float(one["mean"]) < float(one["mean_high"])


def test_density_by_layer_has_a_column_a_pattern(swept: tuple[Path, str]):
    _, html = swept
    (line,) = re.findall(r"<tr><td class=\"word\">h\.0\.weight</td>(.*?)</tr>", html)
    assert re.findall(r">([\d.]+%)<", line) == ["25.00%", "12.50%"]


def test_dense_runs_that_should_agree_and_do_not_are_said():
    odd = result(DENSE, 0, 2.0, 0.9, {"pattern": "1:16"})
    said = overview_words.unlike_dense([*patterns(), odd], comparing.family_hash)
    assert "differ for seed 0" in said
    assert overview_words.unlike_dense(patterns(), comparing.family_hash) == ""


def test_a_difference_that_the_adjustment_takes_away_is_not_called_shown(tmp_path: Path):
    runs = [result(SRSTE, seed, 2.0, 0.4) for seed in range(3)]
    runs += [result(LINEAR, s, 1.9, 0.45 + 0.01 * s, {"pattern": "1:16"}) for s in range(3)]
    steps = [0.4, 0.43, 0.38]
    runs += [result("sdgf-stepwise", s, 2.0, steps[s]) for s in range(3)]
    (setting,) = comparing.settings(runs, SRSTE)
    found = setting.comparison(setting.sparse[1], "accuracy")
    assert found is not None
    found.adjusted = 0.2
    (sentence,) = [s for s in words.shown(setting) if s.startswith("Linear") and "accuracy" in s]
    assert "it is not shown" in sentence


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


def test_without_a_measurement_the_page_says_how_to_make_one(swept: tuple[Path, str]):
    assert "--time" in swept[1]


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


# -- the browser ----------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def browse(page: Path, *words: str) -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    done = subprocess.run(
        [
            str(BROWSER),
            *flags,
            "--enable-logging=stderr",
            "--v=0",
            f"--user-data-dir={page.parent / 'profile'}",
            *words,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_chromium_shows_the_page_of_a_sweep_and_prints_what_is_folded(tmp_path: Path):
    save(tmp_path / "runs", [*patterns("1:4", "1:8"), *narrow(8)])
    html = write_report([tmp_path / "runs"], tmp_path / "report")
    # The page forbids every request (its Content-Security-Policy): one would be a complaint.
    assert "default-src 'none'" in html.read_text()
    shot = tmp_path / "page.png"
    assert browse(html, f"--screenshot={shot}", "--window-size=1100,4000") == ""
    assert shot.stat().st_size > 50_000
    printed = tmp_path / "page.pdf"
    assert browse(html, f"--print-to-pdf={printed}") == ""
    # Three settings of three pages or more, which are folded on the screen.
    assert len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes())) > 12
