"""The report over finished runs: one page as HTML and Markdown, and its figures as CSV."""

from __future__ import annotations

import base64
import csv
import datetime
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from nmflow.experiments.blocks import Block, Code, Figure, Section, Table, Text
from nmflow.experiments.comparing import Setting, settings
from nmflow.experiments.results import finished_runs, write
from nmflow.experiments.sections import sections, title
from nmflow.experiments.statistics import summary

OWN_DATA = """\
# your own text: one file or a folder of .txt
nmflow train configs/demo.yaml --set data.source=text --set data.path=MY_TEXT.txt --output runs/mine
# your own images: a folder of classes
nmflow train configs/digits.yaml --set data.source=images --set data.path=MY_FOLDER \\
    --set options.size=32 --set options.channels=3 --set model.fields.patch_size=4 \\
    --output runs/mine
nmflow report runs/mine
"""


def write_report(runs: Sequence[Path | str], output: Path, baseline: str = "sr-ste") -> Path:
    """Write `report.html`, `report.md` with its `figures/`, `runs.csv` and `summary.csv`.

    Args:
        runs: folders that hold finished runs, at any depth.
        output: where to write.
        baseline: the recipe, by name or label, that the others are paired with.

    Returns:
        The path of the HTML page.

    Raises:
        ConfigError: no finished run, or a folder that cannot be written.
    """
    results = finished_runs(list(runs))
    found = settings(results, baseline)
    parts = [(title(setting), sections(setting)) for setting in found]
    context = {
        "title": f"nmflow: {found[0].sample['run']['name']}" if len(found) == 1 else "nmflow",
        "intro": _intro(results, found),
        "parts": parts,
        "closing": Section("The same with your own data", [Text(CLOSING), Code(OWN_DATA)]),
        "date": datetime.date.today().isoformat(),
    }
    place = jinja2.Environment(
        loader=jinja2.PackageLoader("nmflow.experiments"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    place.filters["data_uri"] = _data_uri
    place.filters["cell"] = lambda text: text.replace("|", "\\|")
    page = place.get_template("report.html.j2").render(context)
    plain = place.get_template("report.md.j2").render(context)
    for number, (_, parts_of) in enumerate(parts):
        for figure in _figures(parts_of):
            write(output / "figures" / f"{number}-{figure.name}.svg", figure.svg)
    write(output / "runs.csv", _csv(_run_rows(results)))
    write(output / "summary.csv", _csv(_summary_rows(found)))
    write(output / "report.md", plain)
    write(output / "report.html", page)
    return output / "report.html"


CLOSING = (
    "Every key of a configuration can be set on the command line; Parquet files and data sets of "
    "the hub are sources too (see the comments in configs/)."
)


def _intro(results: Sequence[dict[str, Any]], found: Sequence[Setting]) -> list[Block]:
    seeds = sorted({run["seed"] for run in results})
    text = (
        f"{len(results)} finished runs, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}. In N:M, "
        "N is the number of weights kept of every M consecutive ones. Every sparse network below "
        "was trained by its recipe, finalized to exactly N:M, and then evaluated on test data that "
        "was never trained on."
    )
    blocks: list[Block] = [Text(text)]
    if len(found) > 1:
        names = list(dict.fromkeys(r.title for s in found for r in s.recipes))
        rows = []
        for setting in found:
            by = {r.title: r.summary(setting.headline) for r in setting.recipes}
            rows.append([title(setting), *(f"{by[n].mean:.3f}" if n in by else "–" for n in names)])
        blocks.append(
            Table("Mean of each setting's headline figure on test data.", ["setting", *names], rows)
        )
    return blocks


def _figures(parts: Sequence[Section]) -> list[Figure]:
    return [block for part in parts for block in part.blocks if isinstance(block, Figure)]


def _run_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for run in results:
        rows.append(
            {
                "id": run["id"],
                "recipe": run["recipe"],
                "pattern": run["pattern"],
                "seed": run["seed"],
                **{f"test_{name}": value for name, value in run["test"].items()},
                **{f"validation_{name}": value for name, value in run["validation"].items()},
                "audit_ok": run["audit"]["ok"],
                "train_seconds": run["train_seconds"],
                "config_hash": run["config_hash"],
                "data_sha256": run["data"]["sha256"],
                **{f"version_{name}": value for name, value in run["versions"].items()},
            }
        )
    return rows


def _summary_rows(found: Sequence[Setting]) -> list[dict[str, Any]]:
    rows = []
    for setting in found:
        for recipe in setting.recipes:
            for metric in setting.metrics:
                s = summary(list(recipe.values(metric).values()))
                c = setting.comparison(recipe, metric)
                d = c.difference if c else None
                rows.append(
                    {
                        "setting": title(setting),
                        "setting_hash": setting.hash,
                        "recipe": recipe.title,
                        "metric": metric,
                        "n": s.n,
                        "mean": s.mean,
                        "sd": s.sd,
                        "baseline": setting.baseline.title if setting.baseline and c else None,
                        "difference": d.mean if d else None,
                        "low": d.low if d else None,
                        "high": d.high if d else None,
                        "p": d.p if d else None,
                        "p_holm": c.adjusted if c else None,
                        "seeds_in_favour": c.in_favour if c else None,
                    }
                )
    return rows


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    sink = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sink, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
