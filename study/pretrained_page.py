"""The page of the study's second part: what has run, what it shows, what is missing."""

from __future__ import annotations

import pandas as pd
import pretrained_longer as longer
import pretrained_more as more
from choose import RESULTS
from compare import Cell, by_seed, family
from pretrained_setups import (
    CONVENTIONAL,
    NARROWER,
    OPTIONS,
    PATTERN,
    RATE,
    SHALLOWER,
    TASKS,
    TAUGHT,
    TITLES,
)
from pretrained_tuning import choices, joined, tuned
from tables import gain, spread, table

from nmflow.experiments.report.statistics import summary

_SEARCHES = (
    "dense-rates",
    "dense-rates-edges",
    *(f"rates{group}{end}" for group in ("", "-others") for end in ("", "-edges")),
)
_MAIN = (
    "dense",
    *(
        f"{part}{group}{more}"
        for group in ("", "-others")
        for part in ("main-1-8", "distilled-1-8")
        for more in ("", "-more")
    ),
    "rivals",
)


def pretrained() -> str:
    """Tuning, held-out figures, and the families of comparisons that the protocol names."""
    out = ["# n. Pretrained networks", "", f"*{_ABOUT}*", ""]
    verdicts = []
    frames: dict[str, pd.DataFrame] = {}
    mains: dict[str, pd.DataFrame] = {}
    for task, told in TASKS.items():
        frame = joined(task, *_MAIN)
        out += [f"## {told.title}", ""]
        if frame is None or not (frame["setup"] == CONVENTIONAL).any():
            out += ["*The main runs have not been made: nothing is judged.*", ""]
        else:
            frame = mains[task] = more.in_points(frame, task)
            frames[task] = more.in_points(_all(task, frame), task)
            out += _judged(frame, task)
            verdicts += [f"* {told.title}: {line}" for line in _verdict(frame)]
        out += longer.longer(task) + longer.longer_taught(task) + longer.start(task)
        out += (
            more.patterns(task)
            + more.attention(task)
            + more.panels(task)
            + _int8(task)
            + _tuning(task)
        )
    out += more.ours(frames)
    if verdicts:
        told = ["**Claim 1 in fine-tuning, at 1:8 in FF:**", "", *verdicts, ""]
        out[4:4] = [*more.aims(mains, frames), *told]
    return "\n".join(out)


def _all(task: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The main runs at every pattern."""
    ends = [p.replace(":", "-") for p in TASKS[task].patterns]
    each = (f"{part}-{end}" for part in ("main", "distilled") for end in ends)
    others = joined(task, *(f"{part}{more}" for part in each for more in ("", "-more")))
    return frame if others is None else pd.concat([frame, others])


def _judged(frame: pd.DataFrame, task: str) -> list[str]:
    names = list(dict.fromkeys(frame["setup"]))
    sparse = [name for name in names if not name.startswith("Dense")]
    taught = [name for name in sparse if name.endswith(TAUGHT)]
    plain = [name for name in sparse if name not in taught]
    families = {
        "over SR-STE": _against(frame, plain, CONVENTIONAL)
        + _against(frame, taught, CONVENTIONAL + TAUGHT),
        "over no teacher": family(
            frame, [(t, PATTERN, t.removesuffix(TAUGHT), PATTERN) for t in taught], "points"
        ),
        "over dense": _against(frame, sparse, "Dense"),
        "over FF 192, distilled": _against(frame, taught, NARROWER),
        "over 3 layers, distilled": _against(frame, taught, SHALLOWER),
    }
    families = {head: cells for head, cells in families.items() if cells}
    rows = []
    for name in names:
        mine = frame[frame["setup"] == name]
        found = [next((c for c in cells if c.setup == name), None) for cells in families.values()]
        own = summary(list(by_seed(frame, name, None, "points").values()))
        beside = f"{mine['beside'].mean():.2f}"
        gains = [gain(c) if c else "–" for c in found]
        rows.append([name, spread(own), beside, str(own.n), *gains])
    metric = {"matthews": "Matthews × 100", "score": "mean of accuracy and F1"}
    said = metric.get(TASKS[task].metric, "accuracy")
    return [
        f"Held-out rows at {PATTERN} ({said}): mean ± standard deviation over seeds, and "
        "differences paired by seed with their 95 % intervals. Bold: p is below 0.05 after Holm's "
        "correction over the column; in the first, rows with a teacher are a family of their own. "
        "Validation stands beside and is not judged.",
        "",
        table(["", "held-out rows", "validation", "seeds", *families], rows),
    ]


def _against(frame: pd.DataFrame, some: list[str], rival: str) -> list[Cell]:
    pairs = [(name, PATTERN, rival, None) for name in some if name != rival]
    return family(frame, pairs, "points")


def _verdict(frame: pd.DataFrame) -> list[str]:
    """A line for the runs without a teacher, and one for those with it."""
    lines = []
    for end, word in (("", "without a teacher"), (TAUGHT, "distilled")):
        cells = more.over_conventional(frame, end)
        if not cells:
            continue
        each = [
            f"{c.setup.removesuffix(TAUGHT)} {gain(c)} ({c.verdict(more.GAIN)})"
            for c in sorted(cells, key=lambda c: -c.difference.mean)
        ]
        shown = max(c.detectable for c in cells)
        lines.append(
            f"{word}, over SR-STE: {'; '.join(each)}. A difference of {shown:.1f} points would "
            "have been shown in every cell (power 80 %, before correction)."
        )
    return lines


def _int8(task: str) -> list[str]:
    """What rounding costs the networks that were distilled, seed by seed."""
    file = RESULTS / f"{task}-int8" / "int8.parquet"
    if not file.is_file():
        return []
    frame = pd.read_parquet(file)
    ways = [way for way in dict.fromkeys(frame["way"]) if way != "float32"]
    rows = []
    for name, mine in frame.groupby("recipe", sort=False):
        points = 100 * mine.pivot(index="seed", columns="way", values="test")
        lost = points[[way for way in ways if way in points]].sub(points["float32"], axis=0)
        cells = [f"{lost[way].mean():+.2f} ({lost[way].min():+.2f} to {lost[way].max():+.2f})"
                 if way in lost else "–" for way in ways]  # fmt: skip
        cells = [cell.replace("-", "−") for cell in cells]
        own = f"{points['float32'].mean():.2f}"
        title = TITLES.get(str(name), str(name))
        rows.append([title, own, str(len(points)), *cells])
    about = (
        "What 8 bits change in the distilled networks, in points of held-out rows: the mean over "
        "seeds, and the least and the greatest. Dense is the teacher."
    )
    return [about, "", table(["", "float32", "seeds", *ways], rows)]


def _tuning(task: str) -> list[str]:
    frame = joined(task, *_SEARCHES)
    if frame is None:
        return []
    found = tuned(frame, task, "recipe")
    tried = sorted(found[RATE].unique())
    rows = []
    for name in dict.fromkeys(frame["recipe"]):
        one = found[found["recipe"] == name].set_index(RATE)["points"]
        rows.append([name, *(f"{one[r]:.1f}" if r in one else "" for r in tried)])
    out = ['??? note "Tuning: validation points on seed 100, by learning rate"', ""]
    out += [f"    {line}" for line in table(["", *(f"{r:g}" for r in tried)], rows).splitlines()]
    for group in TASKS[task].groups:
        if chosen := choices(task, group):
            each = [
                f"{TITLES[name]} {c.rate:g}, "
                + (", ".join(f"{k} {v}" for k, v in c.options.items()) or "no option")
                for name, c in chosen.items()
                if name in OPTIONS
            ]
            out += ["", f"    Chosen: {'; '.join(each)}."]
    if none := [str(name) for name, one in found.groupby("recipe") if (one["points"] == 0).all()]:
        out += ["", f"    At every rate {' and '.join(none)} predicted one class alone."]
    searches = ("distilled-rates", "distilled-rates-others", "rivals-rates", "start-rates")
    taught = joined(task, *searches)
    if taught is not None:
        best = tuned(taught, task, "setup")
        name = best["setup"].str.rpartition(" at ")[0]
        top = best.assign(name=name).drop_duplicates("name")
        each = [f"{n} {r:g} ({p:.1f})" for n, r, p in top[["name", RATE, "points"]].values]
        out += ["", f"    With a teacher, the best of three rates: {'; '.join(each)}."]
    return [*out, ""]


_ABOUT = (
    "MiniLM-L6 (22.7 M parameters), pretrained, fine-tuned for 800 steps of 32 rows; FF is sparse. "
    "The [protocol](protocol.md#second-part-pretrained-networks) was committed before the runs; "
    "what a table does not have has not run. Pages a to m are of small networks trained from "
    "scratch, except page b's part at equal time."
)
