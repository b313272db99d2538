"""Statistics, comparisons, words and the pages of a report, from made-up results."""

from __future__ import annotations

import csv
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from scipy import stats

from made_up import RECIPES, result, save
from nmflow.errors import ConfigError
from nmflow.experiments.report import compare as comparing
from nmflow.experiments.report import setting_words as words
from nmflow.experiments.report.blocks import number, quantity
from nmflow.experiments.report.page import write_report
from nmflow.experiments.report.statistics import holm, paired, summary
from nmflow.experiments.run_folder import finished_runs


def results() -> list[dict]:
    """SR-STE at 2.0; linear better by about 0.1 in every seed; stepwise not to be told apart."""
    out = []
    for seed in range(4):
        wobble = 0.01 * seed
        out.append(result("dense", seed, 1.8 + wobble, 0.50))
        out.append(result("sr-ste", seed, 2.0 + wobble, 0.40))
        out.append(
            result("mdgf-linear", seed, 1.9 + wobble + 0.001 * (seed % 2), 0.45 + 0.001 * seed)
        )
        out.append(result("sdgf-stepwise", seed, 2.0 + wobble + 0.02 * (-1) ** seed, 0.40))
    return out


def test_paired_is_the_paired_t_test_of_scipy():
    these, those = {0: 1.0, 1: 2.5, 2: 2.0, 3: 4.0}, {0: 1.5, 1: 2.0, 2: 3.0, 3: 5.0, 9: 0.0}
    found = paired(these, those)
    shared = [0, 1, 2, 3]
    test = stats.ttest_rel([these[s] for s in shared], [those[s] for s in shared])
    assert found is not None
    assert found.n == 4
    assert math.isclose(found.p or 0, test.pvalue)
    low, high = test.confidence_interval(0.95)
    assert math.isclose(found.low or 0, low)
    assert math.isclose(found.high or 0, high)
    assert (found.below, found.above) == (3, 1)
    assert not found.differs


def test_one_pair_has_no_interval_and_no_pair_is_none():
    found = paired({3: 1.0}, {3: 2.0})
    assert found is not None
    assert (found.mean, found.low, found.p, found.differs) == (-1.0, None, None, False)
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert summary([5.0]).sd is None


def test_equal_runs_do_not_differ():
    found = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert found is not None
    assert found.p == 1.0
    assert not found.differs


def test_holm_is_monotone_and_never_below_the_raw_value():
    raw = [0.04, 0.001, 0.5, 0.02]
    adjusted = holm(raw)
    assert adjusted == pytest.approx([0.08, 0.004, 0.5, 0.06])


def test_settings_keep_apart_what_differs_in_more_than_recipe_and_seed():
    other = result("sr-ste", 0, 2.0, 0.4)
    other["setting_hash"] = "another"
    found = comparing.settings([*results(), other], "sr-ste")
    # The other has the same network and training, so the dense runs of the first are its bound.
    assert [len(setting.recipes) for setting in found] == [4, 2]
    assert len(found[1].lent) == 4
    assert [run["setting_hash"] for run in found[1].own] == ["another"]
    assert [recipe.name for recipe in found[0].recipes] == list(RECIPES)


def test_the_words_say_what_the_intervals_say():
    (setting,) = comparing.settings(results(), "sr-ste")
    said = words.shown(setting)
    linear = next(s for s in said if s.startswith("Linear") and "loss" in s)
    assert "is better than SR-STE" in linear
    assert "4 of 4 seeds" in linear
    (null,) = [s for s in said if "nor shown to be equal" in s]
    assert "Steps in test loss" in null
    assert "Steps in test accuracy" in null
    assert "Linear" not in null
    assert any("closes" in s and "of that gap" in s for s in said)
    doubts = " ".join(words.not_shown(setting))
    assert "4 seeds are few" in doubts
    many = words.multiplicity(setting)
    assert "4 comparisons" in many
    assert "Linear in loss" in many


def test_worse_is_called_worse():
    worse = [result("sr-ste", s, 2.0 + s / 100, 0.4) for s in range(3)]
    worse += [result("mdgf-linear", s, 2.2 + s / 100 + s / 1000, 0.3 - s / 1000) for s in range(3)]
    (setting,) = comparing.settings(worse, "sr-ste")
    assert all(
        "is worse than" in sentence for sentence in words.shown(setting) if "Linear" in sentence
    )


def test_without_the_baseline_nothing_is_compared():
    (setting,) = comparing.settings([result("mdgf-linear", 0, 1.0, 0.5)], "sr-ste")
    assert setting.comparisons == []
    assert "nothing is compared" in words.shown(setting)[0]


def test_the_pages_hold_every_figure(tmp_path: Path):
    save(tmp_path / "runs", results())
    page = write_report([tmp_path / "runs"], tmp_path / "report")
    html, plain = page.read_text(), (tmp_path / "report" / "report.md").read_text()
    for text in (html, plain):
        for title in RECIPES.values():
            assert title in text
        assert "ab" * 32 in text
        assert "1.9110" in text  # a raw figure
        assert "What they do not show" in text
        assert "nmflow train configs/demo.yaml --set data.source=text" in text
        assert "holds 1:16 exactly" in text
    assert "a &lt;fast&gt; machine" in html
    assert html.count("data:image/svg+xml;base64,") == 4
    # Nothing is asked of a network: no address but those inside the drawings' own markup.
    outside = re.sub(r'data:image/svg\+xml;base64,[^"]*', "", html)
    assert not re.search("https?:", outside)
    for link in re.findall(r"\]\((figures/[^)]*)\)", plain):
        assert (tmp_path / "report" / link).is_file()
    with (tmp_path / "report" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    losses = sorted(float(row["test_loss"]) for row in rows if row["recipe"] == "SR-STE")
    assert losses == pytest.approx([2.0, 2.01, 2.02, 2.03])
    with (tmp_path / "report" / "summary.csv").open() as file:
        found = {(r["recipe"], r["metric"]): r for r in csv.DictReader(file)}
    assert float(found["Linear", "loss"]["difference"]) == pytest.approx(-0.0995)
    assert found["SR-STE", "loss"]["difference"] == ""


def test_a_report_is_the_same_every_time(tmp_path: Path):
    save(tmp_path / "runs", results())
    one = write_report([tmp_path / "runs"], tmp_path / "a").read_bytes()
    two = write_report([tmp_path / "runs"], tmp_path / "b").read_bytes()
    assert one == two


def test_a_network_that_broke_its_pattern_and_a_broken_pairing_are_said_aloud(tmp_path: Path):
    found = results()
    found[2]["audit"]["ok"] = False
    found[2]["initial_sha256"] = "another start"
    save(tmp_path / "runs", found)
    html = write_report([tmp_path / "runs"], tmp_path / "report").read_text()
    assert "NOT N:M: Linear, seed 0" in html
    assert "NOT PAIRED" in html


def test_one_seed_makes_a_page_without_intervals(tmp_path: Path):
    save(tmp_path / "runs", [result("sr-ste", 0, 2.0, 0.4), result("mdgf-linear", 0, 1.9, 0.5)])
    html = write_report([tmp_path / "runs"], tmp_path / "report").read_text()
    assert "on one seed: no interval" in html


def test_no_runs_is_one_sentence(tmp_path: Path):
    with pytest.raises(ConfigError, match="no finished run"):
        write_report([tmp_path], tmp_path / "report")
    with pytest.raises(ConfigError, match="no such folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report")


@pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")), reason="no Chromium here"
)
def test_chromium_shows_the_page_without_a_complaint(tmp_path: Path):
    save(tmp_path / "runs", results())
    page = write_report([tmp_path / "runs"], tmp_path / "report")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    done = subprocess.run(
        [
            str(browser),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--enable-logging=stderr",
            "--v=0",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={tmp_path / 'page.png'}",
            "--window-size=1000,3000",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (tmp_path / "page.png").stat().st_size > 50_000
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []


def test_numbers_are_set_as_people_read_them():
    assert number(-0.00001, 3) == "0.000"
    assert number(0.25, 2, sign=True) == "+0.25"
    assert quantity(7e9) == "7 G"


def test_a_result_of_another_version_is_one_sentence(tmp_path: Path):
    for name, text in (("old", '{"run": {}}'), ("cut", '{"run": ')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "result.json").write_text(text)
        with pytest.raises(ConfigError, match="run again"):
            finished_runs([folder])
