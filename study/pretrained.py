"""The study's second part: which sweeps come next, from the tables of those that are finished.

`pretrained_tuning.py` makes the choices, `pretrained_runs.py` runs what this module names, and
`pretrained_page.py` says what came out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from choose import SEEDS
from pretrained_setups import (
    CONVENTIONAL,
    CUTS,
    DENSE_RATES,
    GENERAL,
    LONG,
    LONG_TAUGHT,
    MORE,
    NARROWER,
    OPTIONS,
    PANELS,
    PATTERN,
    PERMUTED,
    RATE,
    RATES,
    SPARSE_FIRST,
    SPARSEST,
    STARTED,
    TASKS,
    TAUGHT,
    TITLES,
)
from pretrained_tuning import (
    Choice,
    at,
    best_of,
    choices,
    edges,
    noisy,
    rates,
    said,
    settled,
)
from tables import there


class Sweep(NamedTuple):
    """A sweep that may run: the place in the order of all, its name's end, what it is for."""

    turn: int
    part: str
    about: str
    axes: dict[str, Any]


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
        turn = 5 * number
        chosen = choices(task, group)
        if not chosen:
            continue
        plain = [choice.keys(name, TITLES[name]) for name, choice in chosen.items()]
        about = "The main runs, without a teacher."
        yield Sweep(3 + turn, f"main-1-8{group}", about, _main(plain, PATTERN))
        if not number and noisy(task, "main-1-8", CONVENTIONAL):
            axes = _main(plain, PATTERN, MORE)
            yield Sweep(6, "main-1-8-more", _MORE_SEEDS, axes)
        best = []
        if there(f"{task}-teacher"):
            yield from _distilled(task, group, chosen, taught, 3 + turn)
            if there(f"{task}-distilled-rates{group}"):
                each = _each(chosen, taught)
                best = best_of(task, f"distilled-rates{group}", each)
        if not number:
            for pattern in TASKS[task].patterns:
                end, turn = pattern.replace(":", "-"), 9 if pattern in SPARSEST else 7
                yield from _at(task, pattern, f"main-{end}", about, plain, turn)
                if best:
                    yield from _at(task, pattern, f"distilled-{end}", _DISTILLED, best, turn)
            if best:
                yield from _longer(task, [{"label": "Dense", "recipe": "dense", RATE: rate}, *best])
            if best and TASKS[task].wide:
                yield from _wider(plain, best)
                yield from _sparse_first(task, chosen["mdgf-exponential"], taught)
                yield from _from_dense(task, chosen, taught)


def _at(
    task: str, pattern: str, part: str, about: str, setups: list[dict[str, Any]], turn: int
) -> Iterator[Sweep]:
    """The main runs at another pattern than 1:8, and more seeds where differences vary."""
    yield Sweep(turn, part, about, _main(setups, pattern))
    rival = CONVENTIONAL + (TAUGHT if part.startswith("distilled") else "")
    if noisy(task, part, rival):
        yield Sweep(12, f"{part}-more", _MORE_SEEDS, _main(setups, pattern, MORE))


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
        turn = 4 * number
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
        best = best_of(task, f"distilled-rates{group}", each)
        saved = [{**setup, "training.save_model": True} for setup in best]
        yield Sweep(turn + 1, f"distilled-1-8{group}", _DISTILLED, _main(saved, PATTERN))
        if not group and noisy(task, "distilled-1-8", CONVENTIONAL + TAUGHT):
            axes = _main(best, PATTERN, MORE)
            yield Sweep(6, "distilled-1-8-more", _MORE_SEEDS, axes)


def _each(chosen: Mapping[str, Choice], taught: dict[str, Any]) -> list[dict[str, Any]]:
    """Every recipe with a teacher, at every rate."""
    return [
        Choice(choice.options, rate).keys(name, f"{TITLES[name]}{TAUGHT}", **taught)
        for name, choice in chosen.items()
        for rate in RATES
    ]


def _longer(task: str, setups: list[dict[str, Any]]) -> Iterator[Sweep]:
    """Four times the steps, at what was tuned before."""
    if not TASKS[task].long:
        return
    axes = _main([{**one, **LONG} for one in setups], PATTERN)
    yield Sweep(6, "long", "Four times the steps.", axes)
    if there(f"{task}-rivals"):
        best = best_of(task, "rivals-rates", _cut(task))
        axes = _main([{**one, **LONG} for one in best], PATTERN)
        yield Sweep(12, "rivals-long", "Smaller dense networks, four times the steps.", axes)
        yield from _longer_taught(task, [*setups, *best])


def _longer_taught(task: str, setups: list[dict[str, Any]]) -> Iterator[Sweep]:
    """The dense network of four times the steps teaches as long."""
    dense, *others = ({**one, **LONG} for one in setups)
    axes = {"setup": [{**dense, "training.save_model": True}], "seed": [100]}
    yield Sweep(6, "long-teacher", "The teacher that had four times the steps.", axes)
    if not there(f"{task}-long-teacher"):
        return
    teacher = {"distill": {"teacher": f"runs/study-{task}/long-teacher"}}
    taught = [{**one, **teacher, "label": one["label"] + LONG_TAUGHT} for one in others]
    first = (TITLES["mdgf-exponential"], NARROWER)
    about = "Taught by the longer dense network"
    chosen = [one for one in taught if one["label"].startswith(first)]
    yield Sweep(6, "long-taught", f"{about}: the best recipe and rival.", _main(chosen, PATTERN))
    rest = [one for one in taught if one not in chosen]
    yield Sweep(12, "long-taught-more", f"{about}: the others.", _main(rest, PATTERN))


def _wider(plain: list[dict[str, Any]], best: list[dict[str, Any]]) -> Iterator[Sweep]:
    """Attention as well, and rows that share their columns, with and without an order of units."""
    attention = {"include": ["ff", "attn"]}
    axes = _main([{**one, **attention} for one in (*plain, *best)], PATTERN)
    yield Sweep(10, "attention", "FF and attention.", axes)
    setups = []
    for one in best:
        if not one["label"].startswith(CONVENTIONAL):
            setups += [one, {**one, "label": one["label"] + PERMUTED, "permute": True}]
    axes = {"setup": setups, "pattern": list(PANELS), "seed": list(SEEDS)}
    yield Sweep(11, "panels", "Panels, as the units stand and in order.", axes)
    axes = _main([one for one in setups if "permute" in one], PATTERN)
    yield Sweep(11, "permuted", "Units in order, without panels.", axes)


def general(rate: float) -> str:
    """The sweep of the encoder that is made sparse first, and the folder of its one run."""
    return f"general-{rate:g}"


def _sparse_first(task: str, choice: Choice, taught: dict[str, Any]) -> Iterator[Sweep]:
    """An encoder is made sparse on sentences of another task, and fine-tuned with its mask held."""
    for rate in RATES:
        one = Choice(choice.options, rate).keys("mdgf-exponential", "Encoder", **GENERAL)
        yield Sweep(5, general(rate), "A sparse encoder.", {"setup": [one], "seed": [100]})
    if not all(there(f"{task}-{general(rate)}") for rate in RATES):
        return
    each = [
        Choice({"dense": 0.0}, rate).keys(
            "one-shot",
            at(f"{SPARSE_FIRST} at {first:g}", rate),
            **{"model.load": f"runs/study-{task}/{general(first)}"},
            **taught,
        )
        for first in RATES
        for rate in RATES
    ]
    yield Sweep(6, "first-rates", "Rates of both stages.", {"setup": each, "seed": [100]})


def _from_dense(task: str, chosen: Mapping[str, Choice], taught: dict[str, Any]) -> Iterator[Sweep]:
    """Decaying recipes that start from the fine-tuned dense network, which teaches them."""
    start = {"model.load": f"runs/study-{task}/teacher", **taught}
    each = [
        Choice(choice.options, rate).keys(name, f"{TITLES[name]}{TAUGHT}{STARTED}", **start)
        for name, choice in chosen.items()
        if TITLES[name] != CONVENTIONAL
        for rate in DENSE_RATES
    ]
    axes = {"setup": _told(each), "pattern": [PATTERN], "seed": [100]}
    yield Sweep(7, "start-rates", "Rates from the fine-tuned dense network on.", axes)
    if there(f"{task}-start-rates"):
        axes = _main(best_of(task, "start-rates", each), PATTERN)
        yield Sweep(7, "start", "From the fine-tuned dense network on.", axes)


_DISTILLED = "The main runs, distilled."
_MORE_SEEDS = "Seeds 5 to 9, since differences vary."


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
        axes = {"setup": best_of(task, "rivals-rates", each), "seed": SEEDS}
        yield Sweep(6, "rivals", "Smaller dense networks at every seed.", axes)


def _main(
    setups: list[dict[str, Any]], pattern: str, seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
    return {"setup": setups, "pattern": [pattern], "seed": list(seeds)}


def _told(setups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Setups that differ in their rate, with the rate in their labels."""
    return [{**one, "label": at(one["label"], one[RATE])} for one in setups]
