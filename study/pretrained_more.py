"""The second part beside its main table: other patterns, attention, panels, the aims."""

from __future__ import annotations

import pandas as pd
from compare import LEAST, Cell, by_seed, family
from pretrained_setups import (
    CONVENTIONAL,
    LONG_TAUGHT,
    NARROWER,
    PANELS,
    PATTERN,
    PERMUTED,
    SHALLOWER,
    TASKS,
    TAUGHT,
    TITLES,
)
from pretrained_tuning import joined
from tables import gain, spread, table

from nmflow.experiments.report.statistics import summary

ORDER = ("2:4", "1:4", "1:8", "1:16", "1:32", "1:128")
THIS = "Settling"
GAIN = 5.0
"""The paper's gain over SR-STE in fine-tuning, in points."""
BEST = ("MDGF-Exponential", "SDGF-Stepwise")
"""The paper's recipes that run here."""


def in_points(frame: pd.DataFrame, task: str) -> pd.DataFrame:
    """With the held-out figure and the one on validation rows as points."""
    metric = TASKS[task].metric
    return frame.assign(
        points=100 * frame[f"test_{metric}"], beside=100 * frame[f"validation_{metric}"]
    )


def patterns(task: str) -> list[str]:
    """The main runs at every pattern, without a teacher and with one."""
    out = []
    for part, end, word in (("main", "", "without a teacher"), ("distilled", TAUGHT, "distilled")):
        ends = [p.replace(":", "-") for p in TASKS[task].patterns]
        parts = [f"{part}-{end}{more}" for end in ends for more in ("", "-more")]
        others = joined(task, *parts)
        if others is None:
            continue
        frame = in_points(pd.concat([others, joined(task, f"{part}-1-8")]), task)
        names = [n + end for n in TITLES.values() if (others["setup"] == n + end).any()]
        shown = [p for p in ORDER if (frame["pattern"] == p).any()]
        rival = CONVENTIONAL + end
        cells = {(c.setup, c.pattern): c for c in at_every_pattern(frame, end)}
        rows = [
            [name.removesuffix(end), *(points_of(frame, name, p) for p in shown)] for name in names
        ]
        rows += [
            [
                f"{name.removesuffix(end)} over SR-STE",
                *(gain_of(cells.get((name, p))) for p in shown),
            ]
            for name in names
            if name != rival
        ]
        about = f"Every pattern, {word}, at what was tuned at 1:8. Bold: Holm over the table."
        out += [about, "", table(["", *shown], rows)]
    return out


def attention(task: str) -> list[str]:
    """FF and attention sparse, against FF alone and against SR-STE."""
    both = joined(task, "attention")
    if both is None:
        return []
    word = " with attention"
    both = both.assign(setup=both["setup"] + word)
    alone = joined(task, "main-1-8", "distilled-1-8")
    frame = in_points(pd.concat([both, alone]), task)
    names = list(dict.fromkeys(both["setup"].str.removesuffix(word)))
    pairs = [(n + word, PATTERN, n, PATTERN) for n in names]
    lost = {c.rival: c for c in family(frame, pairs, "points")}
    pairs = [(n + word, PATTERN, _conventional(n) + word, PATTERN)
             for n in names if n != _conventional(n)]  # fmt: skip
    over = {c.setup.removesuffix(word): c for c in family(frame, pairs, "points")}
    rows = [
        [n, points_of(frame, n + word, PATTERN), gain_of(over.get(n)), gain_of(lost.get(n))]
        for n in names
    ]
    about = "FF and attention at 1:8, at what was tuned for FF. Bold: Holm over the column."
    return [about, "", table(["", "held-out rows", "over SR-STE", "over FF alone"], rows)]


def panels(task: str) -> list[str]:
    """Rows that share their columns, as the units stand and in order, against 1:8 without."""
    shared = joined(task, "panels", "permuted")
    if shared is None:
        return []
    frame = in_points(pd.concat([shared, joined(task, "distilled-1-8")]), task)
    names = list(dict.fromkeys(shared["setup"].str.removesuffix(PERMUTED)))
    shown = [p for p in (PATTERN, *PANELS) if (frame["pattern"] == p).any()]
    each = [(n + end, p) for n in names for end in ("", PERMUTED) for p in shown]
    pairs = [(n, p, n.removesuffix(PERMUTED), PATTERN)
             for n, p in each if (n in names) < (p != PATTERN) or n not in names]  # fmt: skip
    cells = {(c.setup, c.pattern): c for c in family(frame, pairs, "points")}
    rows = []
    for name in [n + end for n in names for end in ("", PERMUTED)]:
        title = name.replace(TAUGHT, "")
        rows.append([title, *(points_of(frame, name, p) for p in shown)])
        gains = [gain_of(cells.get((name, p))) for p in shown]
        rows.append([f"{title}, over 1:8 as units stand", *gains])
    about = (
        "Panels at 1:8, distilled: so many rows share their columns. *In order*: the hidden units "
        "were put into an order that masks keep more of. Bold: Holm over the table."
    )
    return [about, "", table(["", *shown], rows)]


def ours(frames: dict[str, pd.DataFrame]) -> list[str]:
    """Settling against the paper's best recipe of each cell, all cells one family."""
    pairs, rows = [], []
    for task, frame in frames.items():
        for end in ("", TAUGHT):
            for p in ORDER:
                means = {}
                for name in BEST:
                    figures = by_seed(frame, name + end, p, "points")
                    if len(figures) >= LEAST:
                        means[name + end] = sum(figures.values()) / len(figures)
                if means:
                    pairs.append((task, end, p, max(means, key=lambda name: means[name])))
    whole = pd.concat(
        [frame.assign(setup=task + "/" + frame["setup"]) for task, frame in frames.items()]
    )
    cells = family(
        whole, [(f"{t}/{THIS}{end}", p, f"{t}/{best}", p) for t, end, p, best in pairs], "points"
    )
    for c in cells:
        task, _, setup = c.setup.partition("/")
        word = "distilled" if setup.endswith(TAUGHT) else "no teacher"
        best = c.rival.partition("/")[2].removesuffix(TAUGHT)
        rows.append([TASKS[task].title, c.pattern, word, best, gain(c), c.verdict()])
    if not rows:
        return []
    about = (
        f"Settling against the best of the paper's recipes in each cell. All {len(rows)} cells are "
        "one family (Holm)."
    )
    head = ["task", "pattern", "", "the paper's best", "settling over it", "verdict"]
    return ["## A recipe of ours over the paper's", "", about, "", table(head, rows)]


def at_every_pattern(frame: pd.DataFrame, end: str) -> list[Cell]:
    """Claim 1's family: every recipe over SR-STE at every pattern, with a teacher or without."""
    titles = [n for n in TITLES.values() if n != "Dense"]
    names = [n + end for n in titles if (frame["setup"] == n + end).any()]
    rival = CONVENTIONAL + end
    shown = [p for p in ORDER if (frame["pattern"] == p).any()]
    return family(frame, [(n, p, rival, p) for p in shown for n in names if n != rival], "points")


def _greatest(frames: dict[str, pd.DataFrame]) -> str:
    """Whether the paper's gain over SR-STE is reached, and where the greatest is."""
    cells = [(t, c) for t, frame in frames.items() for c in at_every_pattern(frame, "")]
    if not cells:
        return ""
    reached = [(t, c) for t, c in cells if c.difference.mean >= GAIN]
    word = "reached in the mean" if reached else "reached in no mean; the greatest"
    shown = reached or [max(cells, key=lambda pair: pair[1].difference.mean)]
    said = "; ".join(f"{TASKS[t].title} at {c.pattern}, {c.setup} {gain(c)}" for t, c in shown)
    return (
        f"* The paper's +{GAIN:g} over SR-STE on one task, without a teacher: {word}, at what was "
        f"tuned at {PATTERN}: {said}."
    )


def aims(frames: dict[str, pd.DataFrame], everywhere: dict[str, pd.DataFrame]) -> list[str]:
    """What the protocol wants of this part, and how far it is.

    Args:
        frames: the main runs by task.
        everywhere: those at every pattern.
    """
    confirmed = [
        TASKS[task].title
        for task, frame in frames.items()
        if any(c.better for c in over_conventional(frame, ""))
    ]
    held = "holds" if len(confirmed) >= 2 else "does not hold"
    lines = [
        f"* Claim 1 {held} in fine-tuning (a recipe above SR-STE on two of the three tasks): it is "
        f"confirmed on {' and '.join(confirmed) or 'none'}.",
        _greatest(everywhere),
    ]
    for task, most in (("cola", 3.0), ("sst2-minilm", 1.0)):
        if task not in frames:
            continue
        pairs = [(n + TAUGHT, PATTERN, "Dense", None) for n in TITLES.values() if n != "Dense"]
        cells = family(frames[task], pairs, "points")
        if not cells:
            continue
        best = max(cells, key=lambda c: c.difference.mean)
        longer = _longest(task, pairs)
        word = "reached" if (longer or best).difference.mean >= -most else "missed"
        beside = f" (after 800 steps, both: {gain(best)})" if longer else ""
        lines.append(
            f"* At 1:8 with a teacher, at most {most:g} behind dense on {TASKS[task].title}"
            f"{', both after 3,200 steps' if longer else ''}: {word}, "
            f"{(longer or best).setup} {gain(longer or best)}{beside}."
        )
    for task, frame in frames.items():
        for rival in (NARROWER, SHALLOWER):
            pairs = [(n + TAUGHT, PATTERN, rival, None) for n in TITLES.values() if n != "Dense"]
            cells = family(frame, pairs, "points")
            if cells:
                best = max(cells, key=lambda c: c.difference.mean)
                word = "above" if best.better else "below" if best.worse else "undecided against"
                lines.append(
                    f"* {TASKS[task].title}: {best.setup} is {word} {rival}: {gain(best)}."
                )
    return ["**What this part aims at:**", "", *lines, ""]


def _longest(task: str, pairs: list[tuple[str, str, str, str | None]]) -> Cell | None:
    """The best recipe of four times the steps against the dense network of as many."""
    frame = joined(task, "long", "long-taught", "long-taught-more")
    if frame is None:
        return None
    longer = [(name + LONG_TAUGHT, p, rival, of) for name, p, rival, of in pairs]
    cells = family(in_points(frame, task), [*pairs, *longer], "points")
    return max(cells, key=lambda c: c.difference.mean, default=None)


def over_conventional(frame: pd.DataFrame, end: str) -> list[Cell]:
    """The sparse setups against SR-STE: those without a teacher, or those with one."""
    names = [n for n in dict.fromkeys(frame["setup"]) if not n.startswith("Dense")]
    some = [n for n in names if n.endswith(TAUGHT) == bool(end)]
    rival = CONVENTIONAL + end
    return family(frame, [(n, PATTERN, rival, None) for n in some if n != rival], "points")


def _conventional(name: str) -> str:
    return CONVENTIONAL + TAUGHT if name.endswith(TAUGHT) else CONVENTIONAL


def points_of(frame: pd.DataFrame, name: str, pattern: str | None) -> str:
    """Mean and standard deviation over seeds."""
    figures = list(by_seed(frame, name, pattern, "points").values())
    if not figures:
        return "–"
    few = f" ({len(figures)} of {LEAST} seeds)" if len(figures) < LEAST else ""
    return spread(summary(figures)) + few


def gain_of(cell: Cell | None) -> str:
    """A difference with its interval, where there is one."""
    return gain(cell) if cell else "–"
