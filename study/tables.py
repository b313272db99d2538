"""What the pages share: the runs of a task, and how figures are written."""

from __future__ import annotations

import pandas as pd
from choose import PATTERNS, RESULTS, results
from compare import Cell
from tasks import Task

from nmflow.experiments.report.statistics import Summary

PAGES = RESULTS.parent
CONVENTIONAL = ("One-shot", "Gradual", "SR-STE", "STEP")
PAPERS = ("MDGF-Linear", "MDGF-Exponential", "SDGF-Stepwise", "SDGF-Geometric", "Hybrid")
OURS = "Settling"
NARROW = "Dense, as narrow as the FLOPs of the pattern"
DECAYING = (*PAPERS, OURS)


def heading(title: str, but: str = "") -> list[str]:
    """A page's title, and what its figures are of, `but` for some."""
    setting = (
        f"All figures{but} are from small networks trained from scratch. The paper, and nearly "
        "every user, fine-tunes a pretrained network: [page n](n-pretrained.md) does so, and "
        "differs."
    )
    return [f"# {title}", "", f"*{setting}*", ""]


def there(name: str) -> bool:
    """Whether a sweep's table has been kept."""
    return (RESULTS / name / "results.parquet").is_file()


def in_points(frame: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The task's runs with the figure in points in the column `points`."""
    factor = 1.0 if frame[task.metric].max() > 1.5 else 100.0
    return frame.assign(points=frame[task.metric] * factor)


def main_runs(task: Task) -> pd.DataFrame:
    """The main runs of a task, and its dense ones."""
    return in_points(pd.concat([results(n) for n in _tables(task)], ignore_index=True), task)


def sparse_patterns(frame: pd.DataFrame) -> list[str]:
    """The patterns at which sparse networks were trained, densest first."""
    sparse = frame[~frame["setup"].str.startswith("Dense")]
    return [p for p in PATTERNS if (sparse["pattern"] == p).any()]


def with_one_rival(frame: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The runs with the narrower networks as one setup, each at the pattern whose FLOPs it has."""
    own = {task.rival(p): p for p in sparse_patterns(frame)}
    is_rival = frame["setup"].isin(list(own))
    keep = frame[is_rival | ~frame["setup"].str.startswith("Dense,")]
    pattern = keep["setup"].map(own).fillna(keep["pattern"])
    setup = keep["setup"].where(~keep["setup"].isin(list(own)), NARROW)
    return keep.assign(pattern=pattern, setup=setup)


def ran(task: Task) -> bool:
    """Whether the task has main runs."""
    return any("-main" in name for name in _tables(task))


def _tables(task: Task) -> list[str]:
    kept = [p.parent.name for p in sorted(RESULTS.glob(f"{task.name}-*/results.parquet"))]
    return [n for n in kept if n.startswith(f"{task.name}-main") or n == f"{task.name}-dense"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def spread(s: Summary) -> str:
    """Mean ± sd."""
    return f"{s.mean:.2f}" if s.sd is None else f"{s.mean:.2f} ± {s.sd:.2f}"


def gain(cell: Cell) -> str:
    """A difference with its interval; bold where Holm's p is below 0.05."""
    d = cell.difference
    said = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]".replace("-", "−")
    return f"**{said}**" if cell.p < 0.05 else said
