"""The study's second part: which runs come next, from the tables of those that are finished.

    python study/pretrained.py cola     # writes the sweeps that the tables allow, in their order

A choice is the best figure of the task on GLUE's validation rows, on the tuning seed, as the
protocol says. The held-out test rows are never looked at before the main runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
from choose import SEEDS, SWEEPS, TITLES, results, write
from compare import Cell, by_seed, family
from tables import gain, spread, table, there

from nmflow.experiments.report.statistics import summary

METRICS = {"cola": ("CoLA", "matthews")}
"""The tasks of this part: their titles, and the figures that they are judged by."""
RATES = (2e-4, 4e-4, 8e-4)
PATTERN = "1:8"
_RATE = "training.learning_rate"
CONVENTIONAL, TAUGHT = "SR-STE", ", distilled"
_DECAYING = [
    {"gradient": "masked", "finetune": 0.2},
    {"gradient": "masked", "finetune": 0.4},
    {"gradient": "straight-through", "finetune": 0.2},
]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sr-ste": [{"lam": lam} for lam in (2e-3, 2e-4, 2e-2)],
    "mdgf-exponential": _DECAYING,
    "settling": [{"pull": pull, "finetune": 0.2} for pull in (3.0, 0.3, 1.0)],
    "one-shot": [{"dense": dense} for dense in (0.15, 0.0, 0.5)],
    "gradual": [
        {"gradient": "masked", "finetune": 0.2},
        {"gradient": "masked", "finetune": 0.5},
        {"gradient": "straight-through", "finetune": 0.2},
    ],
    "sdgf-stepwise": _DECAYING,
}
"""Three settings for every recipe: the first with three rates, the others at the best of them."""


class Choice(NamedTuple):
    """What a recipe runs with."""

    options: dict[str, Any]
    rate: float

    def keys(self, name: str, title: str) -> dict[str, Any]:
        """As the keys of a configuration."""
        recipe = {"name": name, "label": title.partition(TAUGHT)[0], **self.options}
        return {"label": title, "recipe": recipe, "training.learning_rate": self.rate}


def joined(task: str, *parts: str) -> pd.DataFrame | None:
    """The tables of a task that are there, one below the other."""
    found = [results(f"{task}-{part}") for part in parts if there(f"{task}-{part}")]
    for i, frame in enumerate(found):
        if "setup" in frame and "training.learning_rate" not in frame:  # said at its label's end
            rates_of = frame["setup"].str.rpartition(" at ")[2]
            found[i] = frame.assign(**{_RATE: pd.to_numeric(rates_of, errors="coerce")})
    return pd.concat(found, ignore_index=True) if found else None


def tuned(frame: pd.DataFrame, task: str, by: str) -> pd.DataFrame:
    """The validation figure of each of `by` and rate, in points, best first."""
    figure = f"validation_{METRICS[task][1]}"
    found = frame.groupby([by, _RATE], sort=False, dropna=False)[figure].mean().mul(100)
    return found.rename("points").reset_index().sort_values("points", ascending=False)


def rates(task: str) -> dict[str, float]:
    """The best rate of each recipe, and of the dense network, by title."""
    frame = joined(task, "rates", "rates-others", "dense-rates", "rates-edges")
    best = None if frame is None else tuned(frame, task, "recipe").drop_duplicates("recipe")
    return {} if best is None else dict(zip(best["recipe"], best[_RATE], strict=True))


def edges(task: str) -> Iterator[tuple[str, float]]:
    """Recipes that are best at the least or the greatest rate, and the next one."""
    frame = joined(task, "rates", "rates-others", "dense-rates")
    for title, best in rates(task).items() if frame is not None else ():
        tried = frame.loc[frame["recipe"] == title, _RATE]  # type: ignore[index]
        if best in (tried.min(), tried.max()):
            yield title, best * 2 if best == tried.max() else best / 2


def choices(task: str) -> dict[str, Choice]:
    """The rate and the options of every recipe whose tuning is finished, by name."""
    own = rates(task)
    frame = joined(task, "options")
    points = {} if frame is None else dict(tuned(frame, task, "setup")[["setup", "points"]].values)
    first = joined(task, "rates", "rates-others", "rates-edges")
    found = {}
    for name, every in OPTIONS.items():
        title = TITLES[name]
        labels = [_said(title, options) for options in every[1:]]
        if title not in own or first is None or not set(labels) <= set(points):
            continue
        at_first = tuned(first, task, "recipe").set_index("recipe")["points"]
        scores = [float(at_first.loc[[title]].max()), *(points[label] for label in labels)]
        found[name] = Choice(every[scores.index(max(scores))], own[title])
    return found


def sweeps(task: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every sweep that the finished tables allow: its name, what it is for, its axes."""
    own = rates(task)
    tuning = {"seed": [100]}
    if beyond := list(edges(task)):
        setups = [_first(title, rate) for title, rate in beyond]
        yield "rates-edges", "One rate beyond an edge.", {"setup": setups, **tuning}
    known = [name for name in OPTIONS if TITLES[name] in own]
    if known:
        setups = [
            Choice(options, own[TITLES[name]]).keys(name, _said(TITLES[name], options))
            for name in known
            for options in OPTIONS[name][1:]
        ]
        yield "options", "Two more settings at the best rate.", {"setup": setups, **tuning}
    if "Dense" in own:
        best = {"label": "Dense", "recipe": "dense", "training.learning_rate": own["Dense"]}
        saved = {**best, "training.save_model": True}
        yield "teacher", "The teacher: dense, of the tuning seed.", {"setup": [saved], **tuning}
        yield "dense", "The dense network at every seed.", {"setup": [best], "seed": SEEDS}
    chosen = choices(task)
    if not chosen:
        return
    plain = [choice.keys(name, TITLES[name]) for name, choice in chosen.items()]
    main = {"setup": plain, "pattern": [PATTERN], "seed": SEEDS}
    yield "main-1-8", "The main runs at 1:8, without a teacher.", main
    distill = {"teacher": f"runs/study-{task}/teacher"}
    each = [
        {
            **Choice(c.options, rate).keys(name, f"{TITLES[name]}{TAUGHT}"),
            "label": _at(f"{TITLES[name]}{TAUGHT}", rate),
            "distill": distill,
        }
        for name, c in chosen.items()
        for rate in RATES
    ]
    yield "distilled-rates", "Learning rates with a teacher.", {"setup": each, **tuning}
    frame = joined(task, "distilled-rates")
    if frame is not None:
        best_of: dict[str, str] = {}
        for label in tuned(frame, task, "setup")["setup"]:
            best_of.setdefault(label.rpartition(" at ")[0], label)
        taught = [
            {**one, "label": title}
            for title, best in best_of.items()
            for one in each
            if one["label"] == best
        ]
        main = {"setup": taught, "pattern": [PATTERN], "seed": SEEDS}
        yield "distilled-1-8", "The main runs at 1:8, distilled.", main


def _said(title: str, options: Mapping[str, Any]) -> str:
    return f"{title}: " + ", ".join(f"{key} {value}" for key, value in options.items())


def _first(title: str, rate: float) -> dict[str, Any]:
    name = next(name for name, one in TITLES.items() if one == title)
    keys = Choice(OPTIONS[name][0] if name in OPTIONS else {}, rate).keys(name, title)
    return {**keys, "label": _at(title, rate)}


def _at(title: str, rate: float) -> str:
    return f"{title} at {rate:g}"


def pretrained() -> str:
    """The page of this part: what has run, what it shows, what is missing."""
    out = ["# n. Pretrained networks", "", f"*{_MISSING}*", ""]
    for task, (title, metric) in METRICS.items():
        out += [f"## {title}, MiniLM-L6", "", "Tuning, validation points on seed 100:", ""]
        frame = joined(task, "dense-rates", "rates", "rates-others", "rates-edges")
        if frame is not None:
            found = tuned(frame, task, "recipe")
            tried = sorted(found[_RATE].unique())
            rows = []
            for name in dict.fromkeys(frame["recipe"]):
                one = found[found["recipe"] == name].set_index(_RATE)["points"]
                rows.append([name, *(f"{one[r]:.1f}" if r in one else "" for r in tried)])
            out += [table(["recipe", *(f"{rate:g}" for rate in tried)], rows)]
        main = joined(task, "dense", "main-1-8", "distilled-1-8")
        if main is None:
            out += ["*The main runs have not been made yet: nothing is judged.*", ""]
            continue
        out += _judged(main.assign(points=100 * main[f"test_{metric}"]), metric)
    return "\n".join(out)


def _judged(frame: pd.DataFrame, metric: str) -> list[str]:
    names = list(dict.fromkeys(frame["setup"]))
    taught = [name for name in names if name.endswith(TAUGHT)]
    plain = [name for name in names if name not in taught and name != "Dense"]

    def against(some: list[str], rival: str) -> list[Cell]:
        rest = [name for name in some if name != rival]
        return family(frame, [(name, PATTERN, rival, PATTERN) for name in rest], "points")

    families = {
        "against SR-STE": against(plain, CONVENTIONAL) + against(taught, CONVENTIONAL + TAUGHT),
        "against no teacher": family(
            frame, [(t, PATTERN, t.removesuffix(TAUGHT), PATTERN) for t in taught], "points"
        ),
    }
    rows = []
    for name in names:
        own = summary(list(by_seed(frame, name, None, "points").values()))
        beside = frame.loc[frame["setup"] == name, f"validation_{metric}"].mean() * 100
        cells = {key: next((c for c in found if c.setup == name), None)
                 for key, found in families.items()}  # fmt: skip
        said = [gain(cell) if cell else "–" for cell in cells.values()]
        rows.append([name, spread(own), f"{beside:.2f}", str(own.n), *said])
    head = ["", "held-out points", "validation, mean", "seeds", *families]
    return [f"Held-out rows at {PATTERN}, mean ± sd:", "", table(head, rows)]


_MISSING = (
    "Under way: what a table does not have has not run, and the protocol says what is planned. The "
    "network is pretrained and fine-tuned; the other pages are of small networks from scratch."
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("task", choices=METRICS)
    task = parser.parse_args().task
    for part, about, axes in sweeps(task):
        path = SWEEPS / f"{task}-{part}.yaml"
        if path.is_file() and there(f"{task}-{part}"):
            continue
        write(f"{task}-{part}", about, task, {"axes": axes}, script="study/pretrained.py")
        if part == "teacher":  # alone in its folder, which the configurations name
            text = path.read_text("utf-8").replace(f"study-{task}/cells", f"study-{task}/teacher")
            path.write_text(text, "utf-8")
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
