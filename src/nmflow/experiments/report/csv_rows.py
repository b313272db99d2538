"""The figures of a report as rows of CSV files: runs, summaries and points."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nmflow.experiments.report import pareto
from nmflow.experiments.report.setting import title
from nmflow.experiments.report.settings import Group
from nmflow.experiments.report.statistics import interval, summary
from nmflow.experiments.report.times import Times


def runs(results: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per run."""
    for run in results:
        yield {
            "id": run["id"],
            "recipe": run["recipe"],
            "pattern": run["pattern"],
            "seed": run["seed"],
            **{f"test_{name}": value for name, value in run["test"].items()},
            **{f"validation_{name}": value for name, value in run["validation"].items()},
            "audit_ok": run["audit"]["ok"],
            "train_seconds": run["train_seconds"],
            "resumed_at": " ".join(map(str, run.get("resumed_at", []))),
            "config_hash": run["config_hash"],
            "data_sha256": run["data"]["sha256"],
            **{f"version_{name}": value for name, value in run["versions"].items()},
        }


def summaries(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """One row per recipe, setting and figure; keys that differ among settings are columns."""
    for group in groups:
        for cell in group.cells():
            for metric in cell.setting.metrics:
                values = list(cell.recipe.values(metric).values())
                s, (low, high) = summary(values), interval(values) or (None, None)
                c = cell.setting.comparison(cell.recipe, metric)
                d, base = c.difference if c else None, cell.setting.baseline
                yield {
                    "setting": title(cell.setting),
                    "setting_hash": cell.setting.hash,
                    **group.place(cell),
                    "recipe": cell.recipe.title,
                    "metric": metric,
                    "n": s.n,
                    "mean": s.mean,
                    "sd": s.sd,
                    "mean_low": low,
                    "mean_high": high,
                    "baseline": base.title if base and c else None,
                    "difference": d.mean if d else None,
                    "low": d.low if d else None,
                    "high": d.high if d else None,
                    "p": d.p if d else None,
                    "p_holm": c.adjusted if c else None,
                    "p_holm_page": c.overall if c else None,
                    "seeds_in_favour": c.in_favour if c else None,
                }


def fronts(groups: Sequence[Group], times: Times) -> Iterator[dict[str, Any]]:
    """One row per point of the plots of quality against cost."""
    for group in groups:
        yield from pareto.rows(group, times)


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV; a column is empty in rows that lack it."""
    held, sink = list(rows), io.StringIO()
    fields = list(dict.fromkeys(key for row in held for key in row))
    writer = csv.DictWriter(sink, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(held)
    return sink.getvalue()
