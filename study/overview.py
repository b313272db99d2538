"""The tables of the page for engineers, docs/explained/study.md, from the study's own tables."""

from __future__ import annotations

import re

import pretrained_setups as fine_tuned
from choose import ROOT
from compare import by_seed
from pretrained_tuning import joined
from rivals import against_narrower
from tables import NARROW, OURS, main_runs, sparse_patterns, table, with_one_rival
from tasks import BY_NAME, TASKS

from nmflow.experiments.report.statistics import summary

PAGE = ROOT / "docs" / "explained" / "study.md"
PATTERN = "1:16"
SETUPS = {
    "Dense": "dense",
    OURS: "`settling`",
    "MDGF-Exponential": "MDGF-Exponential",
    "SR-STE": "SR-STE, λ tuned",
    "One-shot": "one-shot",
    NARROW: "narrower dense",
}
"""What the page shows, by the tables' names."""


def overview() -> str:
    """The page, its tables made anew between their markers."""
    page = PAGE.read_text("utf-8")
    blocks = {"tasks": tasks(), "patterns": patterns(), "narrower": narrower()}
    for name, made in (blocks | {"pretrained": pretrained()}).items():
        block = re.compile(rf"(<!-- {name}: make study -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page, count = block.subn(lambda found, made=made: f"{found[1]}\n{made}\n{found[2]}", page)
        assert count == 1, f"{PAGE} has no place for {name}"
    return page


def tasks() -> str:
    """Every task at 1:16."""
    rows = []
    for task in TASKS:
        frame = with_one_rival(main_runs(task), task)
        rows.append([task.title, *(_mean(frame, setup, PATTERN) for setup in SETUPS)])
    return table(["", *SETUPS.values()], rows).rstrip()


def patterns() -> str:
    """Characters at every pattern."""
    lm = BY_NAME["lm"]
    frame = with_one_rival(main_runs(lm), lm)
    shown = sparse_patterns(frame)
    rows = [[said, *(_mean(frame, setup, p) for p in shown)] for setup, said in SETUPS.items()]
    return table(["characters, GPT-2", *shown], rows).rstrip()


def narrower() -> str:
    """Settling at 1:16 against the dense network of equal FLOPs."""
    rows = []
    for task in TASKS:
        _, cells = against_narrower(task)
        cell = next(c for c in cells if (c.setup, c.pattern) == (OURS, PATTERN))
        d = cell.difference
        said = f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]".replace("-", "−")
        word = "sparse wins" if cell.better else "the narrower one wins" if cell.worse else ""
        rows.append([task.title, said, word or "no significant difference"])
    return table(["task", f"`settling` at {PATTERN} − narrower dense", "verdict"], rows).rstrip()


def pretrained() -> str:
    """MiniLM at 1:8 in FF, without and with a teacher."""
    shown = {key: said for key, said in SETUPS.items() if key not in ("One-shot", NARROW)}
    rows = []
    for task, told in fine_tuned.TASKS.items():
        frame = joined(task, "dense", "main-1-8", "distilled-1-8")
        for end, word in (("", ""), (fine_tuned.TAUGHT, ", with a teacher")):
            if frame is not None and (frame["setup"] == fine_tuned.CONVENTIONAL + end).any():
                points = frame.assign(points=100 * frame[f"test_{told.metric}"])
                names = [name if name == "Dense" else name + end for name in shown]
                cells = [_mean(points, name, fine_tuned.PATTERN) for name in names]
                rows.append([told.title + word, *cells])
    return table(["MiniLM-L6, 1:8", *shown.values()], rows).rstrip()


def _mean(frame: object, setup: str, pattern: str) -> str:
    found = by_seed(frame, setup, None if setup == "Dense" else pattern, "points")  # type: ignore[arg-type]
    return f"{summary(list(found.values())).mean:.1f}" if found else "–"
