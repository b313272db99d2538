"""The page over a sweep: families, one adjustment, fronts, times, and any axis without nonsense."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from scipy import stats

from made_up import DENSE, LINEAR, SRSTE, cell, crossed, narrow, page, patterns, result, rows, save
from nmflow.experiments.report import compare as comparing
from nmflow.experiments.report import overview_plots, overview_words, tuning
from nmflow.experiments.report import setting_plots as plots
from nmflow.experiments.report import setting_words as words
from nmflow.experiments.report import settings as families
from nmflow.experiments.report.blocks import Table
from nmflow.experiments.report.page import write_report
from nmflow.experiments.report.statistics import interval


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The page of two sparse recipes at two patterns, and its folder."""
    folder = tmp_path_factory.mktemp("swept")
    return folder, page(folder, patterns("1:4", "1:8"))


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


# -- each recipe at its best ----------------------------------------------------------------------


def test_the_best_learning_rate_is_chosen_on_validation_data_not_on_the_test():
    runs = []
    for recipe, good in ((SRSTE, 0.5), (LINEAR, 0.6)):
        for rate, held_out in ((0.001, 0.1), (0.003, 0.9), (0.01, 0.2)):
            for seed in range(3):
                one = result(
                    recipe, seed, 2.0, good + rate + seed / 100, {"training.learning_rate": rate}
                )
                runs.append({**one, "validation": {"loss": 2.0, "accuracy": held_out}})
    (group,) = families.groups(comparing.settings(runs, SRSTE))
    found = tuning.best(group)
    assert [b.cell.setting.sample["run"]["training"]["learning_rate"] for b in found] == [0.003] * 2
    assert [(b.tried, b.end) for b in found] == [(3, False)] * 2
    (section,) = tuning.section(group)
    table = section.blocks[0]
    assert isinstance(table, Table)
    by = {row[0]: row for row in table.rows}
    assert by["SR-STE"][1:3] == ["0.003", "3"]
    assert by["SR-STE"][-1] == "baseline"
    assert by["Linear"][-1].startswith("+0.1000 [")
    for run in runs:  # now the least rate is the best, an end of what was tried
        rate = run["run"]["training"]["learning_rate"]
        run["validation"] = {"loss": 2.0, "accuracy": -rate}
    (group,) = families.groups(comparing.settings(runs, SRSTE))
    assert all(b.end for b in tuning.best(group))


def test_nothing_is_best_where_nothing_was_tuned():
    longer = crossed(SRSTE, LINEAR, key="training.steps", values=[40, 80])
    for runs in (patterns(), longer):
        (group,) = families.groups(comparing.settings(runs, SRSTE))
        assert tuning.section(group) == []


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
    "rates": (
        RATES,
        ["training.learning_rate 0.003", "other settings of the page vary", "by validation"],
    ),
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
        ["Missing seeds: Linear at 1:8 (seed 1)"],
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
    said = re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)
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
        timeout=600,
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
