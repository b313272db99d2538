"""Names in a report are names: whatever a label holds, it makes no HTML, link or formula."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import made_up
from nmflow.experiments.report.blocks import markdown
from nmflow.experiments.report.page import write_report

EVIL = "<script>alert(1)</script> [a](javascript:b) ![c](http://d) $x^{$ | `e` & f\n# g"


def poisoned(value: Any, key: str = "") -> Any:
    """Every text of a result that names something, with `EVIL` in it."""
    kept = ("id", "name_of", "kind", "phase", "pattern", "task", "source", "headline", "schedule",
            "optimizer", "precision", "device_kind", "include", "exclude", "remainder")  # fmt: skip
    if isinstance(value, dict):
        return {k: poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, key) for v in value]
    if isinstance(value, str) and key not in kept and not key.endswith(("hash", "sha256")):
        return f"{value} {EVIL}"
    return value


def results(seeds: int = 2) -> list[dict[str, Any]]:
    made = []
    for recipe in (made_up.DENSE, made_up.SRSTE, made_up.LINEAR):
        for seed in range(seeds):
            one = made_up.result(recipe, seed, 2.0 + seed / 10, 0.5)
            name = one["run"]["recipe"]["name"]
            one = poisoned(one)
            one["run"]["recipe"]["name"] = name
            one["run"]["model"]["kind"] = None
            one["run"]["model"]["load"] = EVIL
            made.append(one)
    return made


@pytest.mark.parametrize("several", [False, True])
def test_names_are_escaped_in_every_file_of_a_report(tmp_path: Path, several: bool) -> None:
    found = results()
    if several:
        for one in results():
            one["run"]["pattern"] = one["pattern"] = "1:4"
            one["setting_hash"] = "c" * 64
            one["id"] += "-other"
            found.append(one)
    made_up.save(tmp_path, found)
    page = write_report([tmp_path], tmp_path / "report").read_text()
    text = (tmp_path / "report" / "report.md").read_text()
    assert "alert(1)" in page
    assert "alert(1)" in text
    assert "<script>alert" not in page
    prose = re.sub(r"```sh\n.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"<[a-zA-Z/!?]", prose)
    assert not re.search(r"\]\((?!figures/)", prose)
    assert not re.search(r"^# g", prose, re.MULTILINE)
    assert not re.search(r"(?<!\\)`", prose)
    for row in (line for line in prose.splitlines() if line.startswith("|")):
        assert row.endswith("|")
    for drawing in (tmp_path / "report" / "figures").iterdir():
        assert "<script" not in drawing.read_text()
    assert not [f for f in (tmp_path / "report").iterdir() if f.name.startswith(".")]
    json.dumps(text)


def test_plain_text_stays_readable_in_markdown() -> None:
    for text in ("h.0.mlp.c_fc.weight", "−0.031 [−0.05, +0.01]", "a * b_c", "100 %"):
        assert markdown(text) == text
