"""The report over finished runs: one page as HTML and Markdown, and its figures as CSV."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from nmflow import disk
from nmflow.experiments.files import one_sentence, write
from nmflow.experiments.report import csv_rows as report_rows
from nmflow.experiments.report import overview, tradeoffs
from nmflow.experiments.report import settings as families
from nmflow.experiments.report.blocks import Block, Code, Figure, Section, Text, markdown
from nmflow.experiments.report.compare import PLACEMENT, Setting, settings
from nmflow.experiments.report.setting import sections, title
from nmflow.experiments.report.setting_words import Page
from nmflow.experiments.report.settings import Group
from nmflow.experiments.report.times import Times
from nmflow.experiments.report.times import read as read_times
from nmflow.experiments.report.verdict import verdict
from nmflow.experiments.run_folder import finished_runs, unfinished_runs

OWN_DATA = """\
# your own text: one file or a folder of .txt
nmflow train configs/demo.yaml --set data.source=text --set data.path=MY_TEXT.txt --output runs/mine
# your own images: a folder of classes
nmflow train configs/digits.yaml --set data.source=images --set data.path=MY_FOLDER \\
    --set options.size=32 --set options.channels=3 --set model.fields.patch_size=4 \\
    --output runs/mine
nmflow report runs/mine
"""
CLOSING = (
    "Every key of a configuration can be set on the command line; Parquet files and data sets of "
    "the hub are sources too (see the comments in configs/)."
)


@dataclass(frozen=True)
class Part:
    """A heading with its sections; `folded` ones open on a click, and are open in print."""

    title: str
    sections: Sequence[Section]
    folded: bool = False


def write_report(
    runs: Sequence[Path | str],
    output: Path,
    baseline: str = "sr-ste",
    times: Times | None = None,
) -> Path:
    """Write `report.html`, `report.md` with `figures/`, `runs.csv`, `summary.csv`, `pareto.csv`.

    Args:
        runs: folders that hold finished runs, at any depth.
        output: where to write.
        baseline: the recipe, by name or label, that the others are paired with.
        times: inference times; None reads the files beside the runs.

    Returns:
        The path of the HTML page.

    Raises:
        ConfigError: there is no finished run, or the folder cannot be written.
    """
    results = finished_runs(list(runs))
    times = read_times(results) if times is None else times
    found = settings(results, baseline)
    contest = families.adjust(found)
    groups = families.groups(found)
    costs = tradeoffs.costs(groups, times)
    first = verdict(groups, contest, unfinished_runs(list(runs)), times)
    if len(found) == 1:
        page = Page(timed=bool(times.entries))
        parts = [Part(title(found[0]), sections(found[0], page, costs))]
    else:
        front = [*overview.overview(groups, contest, results, baseline), *costs]
        parts = [Part("All settings side by side", front)]
        for group in groups:
            page = _page(group, times)
            parts += [
                Part(_heading(group, setting), sections(setting, page), folded=True)
                for setting in group.settings
            ]
    context = {
        "title": "nmflow: " + ", ".join(dict.fromkeys(s.sample["run"]["name"] for s in found)),
        "intro": _intro(results, found),
        "first": first,
        "parts": parts,
        "closing": Section("The same with your own data", [Text(CLOSING), Code(OWN_DATA)]),
        "date": datetime.date.today().isoformat(),
    }
    place = jinja2.Environment(
        loader=jinja2.PackageLoader("nmflow.experiments.report"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    place.filters["data_uri"] = _data_uri
    place.globals["sorting"] = script = _script()
    place.globals["sorting_sha256"] = _sha256(script)
    place.filters["plain"] = markdown
    place.filters["cell"] = lambda text: markdown(text).replace("|", "\\|")
    page_text = place.get_template("report.html.j2").render(context)
    plain = place.get_template("report.md.j2").render(context)
    with one_sentence(output):
        output.mkdir(parents=True, exist_ok=True)
        with disk.locked(output):  # two reports at once: all files come from the last one
            for number, part in [("verdict", Part("", [first])), *enumerate(parts)]:
                for figure in _figures(part.sections):
                    write(output / "figures" / f"{number}-{figure.name}.svg", figure.svg)
            write(output / "runs.csv", report_rows.text(report_rows.runs(results)))
            write(output / "summary.csv", report_rows.text(report_rows.summaries(groups)))
            write(output / "pareto.csv", report_rows.text(report_rows.fronts(groups, times)))
            write(output / "report.md", plain)
            write(output / "report.html", page_text)
    return output / "report.html"


def _intro(results: Sequence[dict[str, Any]], found: Sequence[Setting]) -> list[Block]:
    seeds = sorted({run["seed"] for run in results})
    runs = f"{len(results)} finished run{'s' if len(results) > 1 else ''}"
    text = f"{runs}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}."
    if any(setting.sparse for setting in found):
        text += (
            " In N:M, N is the number of weights kept of every M consecutive ones. Every sparse "
            "network below was trained by its recipe, finalized to exactly N:M, and then evaluated "
            "on test data that was never trained on."
        )
    else:
        text += " Every network was evaluated on test data that was never trained on."
    return [Text(text)]


def _page(group: Group, times: Times) -> Page:
    network = [key for key in group.keys if key.startswith("model.")]
    dense = {c.setting.family for c in group.cells() if c.dense}
    training = [key for key in group.keys if key not in PLACEMENT and key not in network]
    return Page(
        alone=False,
        networks=bool(network) and len(dense) > 1,
        tuned=tuple(training),
        timed=bool(times.entries),
    )


def _heading(group: Group, setting: Setting) -> str:
    label = group.label(setting, dense=not setting.sparse)
    if not label:
        return title(setting)
    sample = setting.sample
    network = sample["run"]["model"]["kind"] or sample["run"]["model"]["load"]
    kind = "" if setting.sparse else "dense, "
    return f"{kind}{label} ({group.title}, {network})"


def _figures(parts: Sequence[Section]) -> list[Figure]:
    return [block for part in parts for block in part.blocks if isinstance(block, Figure)]


def _script() -> str:
    """The page's only script, which sorts tables; the page's policy allows it by its hash."""
    return (
        (resources.files("nmflow.experiments.report") / "templates" / "sort.js")
        .read_text("utf-8")
        .strip()
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
