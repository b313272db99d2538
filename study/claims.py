"""The pages that compare recipes with each other."""

from __future__ import annotations

from choose import PATTERNS
from compare import Cell, by_seed, family, joined
from figures import by_pattern, forest
from tables import (
    CONVENTIONAL,
    DECAYING,
    NARROW,
    OURS,
    PAGES,
    PAPERS,
    gain,
    heading,
    main_runs,
    ran,
    sparse_patterns,
    spread,
    table,
    with_one_rival,
)
from tasks import TASKS, Task

from nmflow.experiments.report.statistics import summary


def claim_one() -> str:
    """Decaying recipes against the conventional ones, by pattern and task."""
    out = heading("a. Do decaying recipes beat the usual ones at high sparsity?")
    for task in TASKS:
        if not ran(task):
            out += [f"*{task.title}: not run yet.*", ""]
            continue
        frame = main_runs(task)
        patterns = sparse_patterns(frame)
        pairs = [(s, p, "SR-STE", p) for p in patterns for s in DECAYING]
        cells = family(frame, pairs, "points")
        out += [f"## {task.title}", "", *_answer(task, cells), ""]
        rows = []
        by_rival = with_one_rival(frame, task)
        for setup in ("Dense", NARROW, *CONVENTIONAL, *DECAYING):
            shown = []
            for p in patterns:
                mine = by_seed(by_rival, setup, None if setup == "Dense" else p, "points")
                shown.append(spread(summary(list(mine.values()))) if mine else "–")
            if any(figure != "–" for figure in shown):
                rows.append([setup, *shown])
        out += [
            "Test figure in points, mean ± standard deviation over seeds:",
            "",
            table(["", *patterns], rows),
        ]
        rows = [
            [s, *(next((gain(c) for c in cells if (c.setup, c.pattern) == (s, p)), "–")
                  for p in patterns)]
            for s in DECAYING if any(c.setup == s for c in cells)
        ]  # fmt: skip
        out += [
            "Difference to SR-STE, paired by seed, with its 95 % interval. Bold: p is below 0.05 "
            f"after Holm's correction over all {len(cells)} cells.",
            "",
            table(["", *patterns], rows),
        ]
        for rival in ("STEP", "Gradual", "One-shot"):
            others = family(frame, [(s, p, rival, p) for p in patterns for s in DECAYING], "points")
            if not others:
                continue
            best = f"{max(c.difference.mean for c in others):+.2f}".replace("-", "−")
            won = sum(c.better for c in others)
            lost = sum(c.worse for c in others)
            out += [
                f"* Against {rival}: better in {won} and worse in {lost} of {len(others)} cells "
                f"(Holm). The largest difference is {best} points."
            ]
        if len(patterns) > 1:
            name = f"{task.name}-quality"
            by_pattern(by_rival, patterns, PAGES / "figures" / f"{name}.svg")
            out += ["", f"![Quality over patterns](figures/{name}.svg)", ""]
        else:
            out += ["", forest(cells, f"a-{task.name}"), ""]
    return "\n".join(out)


def better() -> str:
    """Our recipe against the best of the paper's in each cell; all cells are one family."""
    ready = [task for task in TASKS if ran(task)]
    rows: dict[str, list[Cell]] = {}
    best: dict[tuple[str, str], str] = {}
    for task in ready:
        frame = main_runs(task)
        patterns = [p for p in PATTERNS if by_seed(frame, OURS, p, "points")]
        for p in patterns:
            best[task.name, p] = max(
                (s for s in PAPERS if by_seed(frame, s, p, "points")),
                key=lambda s, p=p, f=frame: summary(list(by_seed(f, s, p, "points").values())).mean,
            )
        pairs = [(OURS, p, best[task.name, p], p) for p in patterns]
        rows[task.name] = family(frame, pairs, "points")
    rows = joined(rows)
    every = [(task, cell) for task in ready for cell in rows[task.name]]
    held = [f"{t.title} at {c.pattern}" for t, c in every if c.better]
    lost = [f"{t.title} at {c.pattern}" for t, c in every if c.worse]
    where = [f"{t.title}, {c.pattern}" for t, c in every]
    shown = [
        [t.title, c.pattern, best[t.name, c.pattern], f"{c.mean:.2f}", gain(c), f"{c.p:.3g}"]
        for t, c in every
    ]
    return "\n".join(
        [
            *heading("A better recipe: settling"),
            f"**Of {len(every)} cells, settling is significantly better than the best of the "
            f"paper's recipes in {_count(held)}, and worse in {_count(lost)}** (Holm over all "
            f"cells). Its mean is higher in {sum(c.difference.mean > 0 for _, c in every)} of "
            "them. The best of the paper's recipes is chosen by its test mean, which favours it.",
            "",
            table(["task", "pattern", "best of the paper's", "settling, points", "difference",
                   "p (Holm)"], shown),
            forest([c for _, c in every], "settling", where),
            "",
            "[The recipes](../recipes.md#settling-settling) describes settling, and [the "
            "search](search.md) how it was found.",
        ]
    )  # fmt: skip


def _answer(task: Task, cells: list[Cell]) -> list[str]:
    if not cells:
        return ["No pairs of seeds yet."]
    sparse = [c for c in cells if c.pattern in ("1:8", "1:16", "1:32", "1:64")]
    words = [c.verdict().partition(",")[0] for c in sparse]
    said = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words)))
    below = sum("below" in c.verdict(task.claimed) for c in sparse)
    top = max(sparse, key=lambda c: c.difference.mean)
    power = max(c.detectable for c in sparse)
    return [
        f"**{_comparisons(len(sparse))} with tuned SR-STE at 1:8 and sparser: {said}.** The "
        f"largest gain is {gain(top).strip('*')} points ({top.setup}, {top.pattern}). The paper "
        f"claims up to {task.claimed:g}: {_of(below, len(sparse))} below that, in this small "
        f"network trained from scratch. These runs would have shown a difference of {power:.2f} "
        "points in every cell (power 80 %, before adjustment)."
    ]


def _comparisons(n: int) -> str:
    return f"{n} comparisons" if n != 1 else "One comparison"


def _of(n: int, total: int) -> str:
    """How many intervals of a family lie somewhere."""
    if n in (0, total):
        return f"{'none' if n == 0 else 'all'} of the intervals {'lies' if n == 0 else 'lie'}"
    return f"{n} of the {total} intervals lie{'s' if n == 1 else ''}"


def _count(cells: list[str]) -> str:
    """How many cells, and which."""
    return f"{len(cells)} ({', '.join(cells)})" if cells else "none"
