"""The study's second part: which sweeps come next, from the tables of those that are finished.

A choice is the best figure of the task on GLUE's validation rows, on the tuning seed, as the
protocol says. The held-out test rows are never looked at before the main runs.
`pretrained_runs.py` runs what this module names; `pretrained_page.py` says what came out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from choose import SEEDS, results
from pretrained_setups import (
    CONVENTIONAL,
    CUTS,
    DENSE_RATES,
    LONG,
    MORE,
    NOISY,
    OPTIONS,
    PANELS,
    PATTERN,
    PERMUTED,
    RATE,
    RATES,
    TASKS,
    TAUGHT,
    TITLES,
)
from tables import there


class Sweep(NamedTuple):
    """A sweep that may run: the place in the order of all, its name's end, what it is for."""

    turn: int
    part: str
    about: str
    axes: dict[str, Any]


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


def sweeps(task: str) -> Iterator[Sweep]:
    """Every sweep that the finished tables allow, those that have run among them."""
    yield from _searches(task)
    if not settled(task, "dense-rates"):
        return
    rate = rates(task, "dense-rates")["Dense"]
    best = {"label": "Dense", "recipe": "dense", RATE: rate}
    saved = {**best, "training.save_model": True}
    about = "The teacher: dense, of the tuning seed."
    yield Sweep(3, "teacher", about, {"setup": [saved], "seed": [100]})
    yield Sweep(4, "dense", "The dense network at every seed.", {"setup": [best], "seed": SEEDS})
    taught = {"distill": {"teacher": f"runs/study-{task}/teacher"}}
    if there(f"{task}-teacher"):
        yield from _rivals(task)
    for number, group in enumerate(TASKS[task].groups):
        turn = 4 * number
        chosen = choices(task, group)
        if not chosen:
            continue
        plain = [choice.keys(name, TITLES[name]) for name, choice in chosen.items()]
        about = "The main runs, without a teacher."
        yield Sweep(4 + turn, f"main-1-8{group}", about, _main(plain, PATTERN))
        if not number and noisy(task, "main-1-8", CONVENTIONAL):
            axes = _main(plain, PATTERN, MORE)
            yield Sweep(6, "main-1-8-more", "Seeds 5 to 9, since differences vary.", axes)
        best = []
        if there(f"{task}-teacher"):
            yield from _distilled(task, group, chosen, taught, 4 + turn)
            if there(f"{task}-distilled-rates{group}"):
                each = _each(chosen, taught)
                best = _best(task, f"distilled-rates{group}", each)
        if not number:
            for pattern in TASKS[task].patterns:
                end = pattern.replace(":", "-")
                yield Sweep(7, f"main-{end}", about, _main(plain, pattern))
                if best:
                    yield Sweep(7, f"distilled-{end}", _DISTILLED, _main(best, pattern))
            if best:
                yield from _longer(task, [{"label": "Dense", "recipe": "dense", RATE: rate}, *best])
            if best and TASKS[task].wide:
                yield from _wider(plain, best)


def _searches(task: str) -> Iterator[Sweep]:
    """Rates, the rate beyond an edge, and settings at the best rate."""
    tuning = {"seed": [100]}
    axes = {"recipe": [{"name": "dense", "label": "Dense"}], RATE: DENSE_RATES, **tuning}
    yield Sweep(0, "dense-rates", "Learning rates of the dense network.", axes)
    about = "One rate beyond an edge."
    if beyond := edges(task, "dense-rates"):
        setups = [Choice({}, rate).keys("dense", title) for title, rate in beyond]
        yield Sweep(2, "dense-rates-edges", about, {"setup": _told(setups), **tuning})
    for number, (group, names) in enumerate(TASKS[task].groups.items()):
        turn = 6 * number
        recipes = [{"name": n, "label": TITLES[n], **OPTIONS[n][0]} for n in names]
        axes = {"recipe": recipes, RATE: RATES, **tuning}
        yield Sweep(1 + turn, f"rates{group}", "Learning rates, on the tuning seed.", axes)
        known = {TITLES[name]: name for name in names}
        if beyond := edges(task, f"rates{group}"):
            setups = [
                Choice(OPTIONS[known[title]][0], rate).keys(known[title], title)
                for title, rate in beyond
            ]
            axes = {"setup": _told(setups), **tuning}
            yield Sweep(2 + turn, f"rates{group}-edges", about, axes)
        if settled(task, f"rates{group}"):
            own = rates(task, f"rates{group}")
            setups = [
                Choice(options, own[title]).keys(name, said(title, options))
                for title, name in known.items()
                for options in OPTIONS[name][1:]
            ]
            axes = {"setup": setups, **tuning}
            yield Sweep(3 + turn, f"options{group}", "Two more settings at the best rate.", axes)


def _distilled(
    task: str, group: str, chosen: Mapping[str, Choice], taught: dict[str, Any], turn: int
) -> Iterator[Sweep]:
    each = _each(chosen, taught)
    axes = {"setup": _told(each), "seed": [100]}
    yield Sweep(turn, f"distilled-rates{group}", "Learning rates with a teacher.", axes)
    if there(f"{task}-distilled-rates{group}"):
        best = _best(task, f"distilled-rates{group}", each)
        saved = [{**setup, "training.save_model": True} for setup in best]
        yield Sweep(turn + 1, f"distilled-1-8{group}", _DISTILLED, _main(saved, PATTERN))
        if not group and noisy(task, "distilled-1-8", CONVENTIONAL + TAUGHT):
            axes = _main(best, PATTERN, MORE)
            yield Sweep(6, "distilled-1-8-more", "Seeds 5 to 9, since differences vary.", axes)


def _each(chosen: Mapping[str, Choice], taught: dict[str, Any]) -> list[dict[str, Any]]:
    """Every recipe with a teacher, at every rate."""
    return [
        Choice(choice.options, rate).keys(name, f"{TITLES[name]}{TAUGHT}", **taught)
        for name, choice in chosen.items()
        for rate in RATES
    ]


def _longer(task: str, setups: list[dict[str, Any]]) -> Iterator[Sweep]:
    """Four times the steps, at what was tuned before."""
    axes = _main([{**one, **LONG} for one in setups], PATTERN)
    turn = 6 if TASKS[task].wide else 8
    yield Sweep(turn, "long", "Four times the steps.", axes)
    if there(f"{task}-rivals"):
        best = _best(task, "rivals-rates", _cut(task))
        axes = _main([{**one, **LONG} for one in best], PATTERN)
        yield Sweep(turn, "rivals-long", "Smaller dense networks, four times the steps.", axes)


def _wider(plain: list[dict[str, Any]], best: list[dict[str, Any]]) -> Iterator[Sweep]:
    """Attention as well, and rows that share their columns, with and without an order of units."""
    attention = {"include": ["ff", "attn"]}
    axes = _main([{**one, **attention} for one in (*plain, *best)], PATTERN)
    yield Sweep(8, "attention", "FF and attention.", axes)
    setups = []
    for one in best:
        if not one["label"].startswith(CONVENTIONAL):
            setups += [one, {**one, "label": one["label"] + PERMUTED, "permute": True}]
    axes = {"setup": setups, "pattern": list(PANELS), "seed": list(SEEDS)}
    yield Sweep(9, "panels", "Panels, as the units stand and in order.", axes)
    axes = _main([one for one in setups if "permute" in one], PATTERN)
    yield Sweep(9, "permuted", "Units in order, without panels.", axes)


_DISTILLED = "The main runs, distilled."


def _cut(task: str) -> list[dict[str, Any]]:
    """Smaller dense networks at every rate."""
    taught = {"distill": {"teacher": f"runs/study-{task}/teacher"}}
    return [
        {"label": title, "recipe": "dense", RATE: rate, **cut, **taught}
        for title, cut in CUTS.items()
        for rate in DENSE_RATES
    ]


def _rivals(task: str) -> Iterator[Sweep]:
    each = _cut(task)
    axes = {"setup": _told(each), "seed": [100]}
    yield Sweep(5, "rivals-rates", "Learning rates of smaller dense networks.", axes)
    if there(f"{task}-rivals-rates"):
        axes = {"setup": _best(task, "rivals-rates", each), "seed": SEEDS}
        yield Sweep(6, "rivals", "Smaller dense networks at every seed.", axes)


def _best(task: str, part: str, each: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The setups of a search at their best rates."""
    frame = joined(task, part)
    assert frame is not None
    best: dict[str, str] = {}
    for label in tuned(frame, task, "setup")["setup"]:
        best.setdefault(label.rpartition(" at ")[0], label)
    return [one for one in each if best[one["label"]] == _at(one["label"], one[RATE])]


def noisy(task: str, part: str, rival: str) -> bool:
    """Whether five seeds are too few: a paired standard deviation above `NOISY` points."""
    frame = joined(task, part)
    if frame is None or frame["seed"].nunique() < len(SEEDS):
        return False
    figure = frame.pivot(index="seed", columns="setup", values=f"test_{TASKS[task].metric}")
    return bool((figure.sub(figure[rival], axis=0).std() * 100 > NOISY).any())


def _main(
    setups: list[dict[str, Any]], pattern: str, seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
    return {"setup": setups, "pattern": [pattern], "seed": list(seeds)}


def _told(setups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Setups that differ in their rate, with the rate in their labels."""
    return [{**one, "label": _at(one["label"], one[RATE])} for one in setups]


def said(title: str, options: Mapping[str, Any]) -> str:
    """What the tables call a recipe with other settings than its first."""
    return f"{title}: " + ", ".join(f"{key} {value}" for key, value in options.items())


def _at(title: str, rate: float) -> str:
    return f"{title} at {rate:g}"
