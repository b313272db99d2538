"""The page that decides: a smaller dense network of the same cost, or int8, instead of sparsity."""

from __future__ import annotations

import pandas as pd
from choose import RESULTS, results
from compare import Cell, by_seed, family
from figures import forest
from tables import (
    OURS,
    gain,
    heading,
    in_points,
    main_runs,
    ran,
    sparse_patterns,
    spread,
    table,
    there,
)
from tasks import TASKS, Task

from nmflow.experiments.report.statistics import summary

COSTS = {"1:8": (36, 72), "1:16": (18, 42), "1:32": (10, 28)}
"""FF widths of `lm` whose bytes, and whose measured time, are those of the sparse FF."""
INT8 = "Dense, int8"


SHOWN = (OURS, "MDGF-Exponential", "SR-STE")


def against_narrower(task: Task) -> tuple[dict[str, str], list[Cell]]:
    """The dense network of equal FLOPs by pattern, and the comparisons with it, one family."""
    frame = main_runs(task)
    narrow = {p: task.rival(p) for p in sparse_patterns(frame)}
    narrow = {p: name for p, name in narrow.items() if by_seed(frame, name, None, "points")}
    pairs = [(s, p, narrow[p], None) for p in narrow for s in SHOWN]
    return narrow, family(frame, pairs, "points")


def rivals() -> str:
    """The narrower dense network of equal FLOPs, bytes or time against the sparse ones."""
    out = heading("l. Or simply a smaller dense network?")
    for task in TASKS:
        if not (ran(task) and there(f"{task.name}-dense")):
            out += [f"*{task.title}: not run yet.*", ""]
            continue
        frame = main_runs(task)
        narrow, cells = against_narrower(task)
        rows = []
        for p in narrow:
            rival = summary(list(by_seed(frame, narrow[p], None, "points").values()))
            found = {c.setup: c for c in cells if c.pattern == p}
            rows.append([p, narrow[p], spread(rival),
                         *(gain(found[s]) if s in found else "–" for s in SHOWN)])  # fmt: skip
        held = [c.pattern for c in cells if c.setup == OURS and c.better]
        lost = [c.pattern for c in cells if c.setup == OURS and c.worse]
        out += [
            f"## {task.title}",
            "",
            f"**Against the dense network of the same inference FLOPs, settling wins at "
            f"{', '.join(held) or 'no pattern'} and loses at {', '.join(lost) or 'none'}** (Holm "
            f"over all {len(cells)} cells). The other differences are not significant.",
            "",
            table(["pattern", "rival", "rival, points", *(f"{s} − rival" for s in SHOWN)], rows),
            forest([c for c in cells if c.setup == OURS], f"l-{task.name}"),
            "",
            *(_costs(task) if there(f"{task.name}-dense-costs") else []),
        ]
    return "\n".join(out)


def _costs(task: Task) -> list[str]:
    """Rivals of equal bytes and of equal time, and int8."""
    frame = pd.concat(
        [main_runs(task), in_points(results(f"{task.name}-dense-costs"), task), _int8(task)],
        ignore_index=True,
    )
    patterns = [p for p in COSTS if by_seed(frame, OURS, p, "points")]
    pairs = [(OURS, p, rival, None) for p in patterns for rival in _named(p)]
    cells = {(c.pattern, c.rival): c for c in family(frame, pairs, "points")}
    rows = []
    for p in patterns:
        row = [p]
        for rival in _named(p):
            if (p, rival) in cells:
                row += [rival, gain(cells[p, rival])]
            else:
                row += [rival, "–"]
        rows.append(row)
    eight = list(by_seed(frame, INT8, None, "points").values())
    return [
        "Settling against three more rivals: a dense network of the same bytes, one of the same "
        "time, and int8, which keeps 0.25 of the bytes of every linear layer.",
        "",
        table(["pattern", "same bytes", "settling −", "same time", "settling −", "int8",
               "settling −"], rows),
        "Bytes are values and indices as packed. Times are those of ViT-Base's FF at 197 tokens "
        "([the benchmark](../benchmarks/kernels.md)). The int8 network is the dense one after "
        "torch's dynamic quantization"
        + (f"; it has {spread(summary(eight))} points" if eight else "")
        + ". Bold: Holm's p over the table is below 0.05.",
        "",
    ]  # fmt: skip


def _named(pattern: str) -> tuple[str, str, str]:
    of_bytes, of_time = COSTS[pattern]
    return f"Dense, FF {of_bytes}", f"Dense, FF {of_time}", INT8


def _int8(task: Task) -> pd.DataFrame:
    file = RESULTS / f"{task.name}-int8" / "int8.parquet"
    if not file.is_file():
        return pd.DataFrame()
    found = pd.read_parquet(file)
    points = 100 * found["int8_accuracy"]
    return pd.DataFrame({"setup": INT8, "pattern": "", "seed": found["seed"], "points": points})
