"""What the second part's searches chose: by the figure on validation rows, on the tuning seed.

The held-out test rows are never looked at before the main runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
from choose import SEEDS, results
from pretrained_setups import NOISY, OPTIONS, RATE, TASKS, TAUGHT, TITLES
from tables import there


class Choice(NamedTuple):
    """What a recipe runs with."""

    options: dict[str, Any]
    rate: float

    def keys(self, name: str, title: str, **more: Any) -> dict[str, Any]:
        """As the keys of a configuration."""
        recipe = {"name": name, "label": title.partition(TAUGHT)[0], **self.options}
        return {"label": title, "recipe": recipe, RATE: self.rate, **more}


def joined(task: str, *parts: str) -> pd.DataFrame | None:
    """The tables of a task that are there, one below the other."""
    found = [results(f"{task}-{part}") for part in parts if there(f"{task}-{part}")]
    for i, frame in enumerate(found):
        if "setup" in frame and RATE not in frame:  # said at its label's end
            ends = frame["setup"].str.rpartition(" at ")[2]
            found[i] = frame.assign(**{RATE: pd.to_numeric(ends, errors="coerce")})
    return pd.concat(found, ignore_index=True) if found else None


def tuned(frame: pd.DataFrame, task: str, by: str) -> pd.DataFrame:
    """The validation figure of each of `by` and rate, in points, best first."""
    figure = f"validation_{TASKS[task].metric}"
    found = frame.groupby([by, RATE], sort=False, dropna=False)[figure].mean().mul(100)
    return (
        found.rename("points").reset_index().sort_values("points", ascending=False, kind="stable")
    )


def rates(task: str, part: str) -> dict[str, float]:
    """The best rate of each recipe of a search and of its edges, by title."""
    frame = joined(task, part, f"{part}-edges")
    best = None if frame is None else tuned(frame, task, "recipe").drop_duplicates("recipe")
    return {} if best is None else dict(zip(best["recipe"], best[RATE], strict=True))


def edges(task: str, part: str) -> list[tuple[str, float]]:
    """Recipes that are best at the least or the greatest of the three rates, and the next one."""
    frame = joined(task, part)
    if frame is None:
        return []
    best = tuned(frame, task, "recipe").drop_duplicates("recipe")
    found = []
    for title, rate in zip(best["recipe"], best[RATE], strict=True):
        tried = frame.loc[frame["recipe"] == title, RATE]
        if rate in (tried.min(), tried.max()):
            found.append((title, rate * 2 if rate == tried.max() else rate / 2))
    return found


def settled(task: str, part: str) -> bool:
    """Whether a search of rates is finished, with the rate beyond each edge."""
    return there(f"{task}-{part}") and (not edges(task, part) or there(f"{task}-{part}-edges"))


def choices(task: str, group: str) -> dict[str, Choice]:
    """The rate and the options of every recipe of a group whose tuning is finished, by name."""
    if not there(f"{task}-options{group}"):
        return {}
    own = rates(task, f"rates{group}")
    at_rates = joined(task, f"rates{group}", f"rates{group}-edges")
    options = joined(task, f"options{group}")
    assert at_rates is not None
    assert options is not None
    first = tuned(at_rates, task, "recipe").groupby("recipe")["points"].max()
    points = dict(tuned(options, task, "setup")[["setup", "points"]].values)
    found = {}
    for name in TASKS[task].groups[group]:
        title, every = TITLES[name], OPTIONS[name]
        scores = [first[title], *(points[said(title, one)] for one in every[1:])]
        found[name] = Choice(every[scores.index(max(scores))], own[title])
    return found


def best_of(task: str, part: str, each: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The setups of a search at their best rates."""
    frame = joined(task, part)
    assert frame is not None
    best: dict[str, str] = {}
    for label in tuned(frame, task, "setup")["setup"]:
        best.setdefault(label.rpartition(" at ")[0], label)
    return [one for one in each if best[one["label"]] == at(one["label"], one[RATE])]


def noisy(task: str, part: str, rival: str) -> bool:
    """Whether five seeds are too few: a paired standard deviation above `NOISY` points."""
    frame = joined(task, part)
    if frame is None or frame["seed"].nunique() < len(SEEDS):
        return False
    figure = frame.pivot(index="seed", columns="setup", values=f"test_{TASKS[task].metric}")
    return bool((figure.sub(figure[rival], axis=0).std() * 100 > NOISY).any())


def said(title: str, options: Mapping[str, Any]) -> str:
    """What the tables call a recipe with other settings than its first."""
    return f"{title}: " + ", ".join(f"{key} {value}" for key, value in options.items())


def at(title: str, rate: float) -> str:
    """What the tables call a setup at one of several rates."""
    return f"{title} at {rate:g}"
