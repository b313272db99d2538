"""The pages about what is spent: equal training FLOPs, the sparsest pattern that will do."""

from __future__ import annotations

import pandas as pd
from choose import ROOT, results
from compare import by_seed, family
from equal_time_page import equal_time
from figures import forest
from tables import (
    DECAYING,
    gain,
    heading,
    in_points,
    main_runs,
    sparse_patterns,
    spread,
    table,
)
from tasks import BY_NAME

from nmflow.experiments.report.statistics import summary

HALF = 0.5
"""Points within which a sparser network counts as good as 2:4 (the paper's claim 3)."""
TOKENS = 197
KERNELS = {"Sapphire Rapids": "kernels-f32.csv", "Zen 3": "kernels-zen3.csv"}


def equal_flops() -> str:
    """Recipes at the training FLOPs of SR-STE."""
    lm = BY_NAME["lm"]
    main = main_runs(lm)
    main = main[main["pattern"] == "1:16"]
    spent = in_points(results("lm-flops"), lm)
    rival = main[main["setup"] == "SR-STE"]
    frame = pd.concat([spent, rival], ignore_index=True)
    setups = list(dict.fromkeys(spent["setup"]))
    cells = family(frame, [(s, "1:16", "SR-STE", "1:16") for s in setups], "points")
    same_steps = family(main, [(s, "1:16", "SR-STE", "1:16") for s in setups], "points")
    rows = [["SR-STE", f"{rival['steps'].iloc[0]:,}", _points(rival, "SR-STE"), "", ""]]
    for cell, at_steps in zip(cells, same_steps, strict=True):
        steps = spent.loc[spent["setup"] == cell.setup, "steps"].iloc[0]
        points = _points(spent, cell.setup)
        rows.append([cell.setup, f"{steps:,}", points, gain(cell), gain(at_steps)])
    won = [c.setup for c in cells if c.better]
    lost = [c.setup for c in cells if c.worse]
    return "\n".join(
        [
            *heading("b. At equal training FLOPs?", but=", except those at equal time,"),
            "**At the training FLOPs of SR-STE's "
            f"{rival['steps'].iloc[0]:,} steps, {' and '.join(won) or 'no recipe'} does better "
            f"than SR-STE, and {' and '.join(lost) or 'none'} do worse** (characters, GPT-2, 1:16; "
            "significant after Holm's correction over these). A recipe that stays dense for longer "
            "pays for it with steps.",
            "",
            table(["", "steps", "points", "− SR-STE", "− SR-STE at equal steps"], rows),
            forest(cells, "b-equal-flops"),
            "",
            "`nmflow.cost` counts the FLOPs: products with a weight count by the share of the "
            "weight that is not zero. Products for its gradient count in full, unless the rule is "
            "masked ([Run sweeps](../sweeps.md#equal-cost)). Bold: Holm's p over the column is "
            "below 0.05.",
            *equal_time(),
        ]
    )


def sparsest() -> str:
    """The sparsest pattern that is within half a point of SR-STE at 2:4."""
    lm = BY_NAME["lm"]
    frame = main_runs(lm)
    setups = [s for s in DECAYING if by_seed(frame, s, "2:4", "points")]
    patterns = sparse_patterns(frame)
    cells = family(frame, [(s, p, "SR-STE", "2:4") for s in setups for p in patterns], "points")
    within = [c.pattern for c in cells if c.difference.mean >= -HALF]
    last = max(within, key=patterns.index) if within else None
    packed = _kernels()
    rows = []
    for p in patterns:
        n, m = map(int, p.split(":"))
        mine = [gain(c) for s in setups for c in cells if (c.setup, c.pattern) == (s, p)]
        one = packed[packed["way"] == p]
        share = f"{one['bytes_share'].iloc[0]:.3f}" if len(one) else "–"
        times = [
            f"{1 / found.mean():.2f}" if len(found) else "–"
            for cpu in KERNELS
            for found in [one.loc[one["machine"] == cpu, "times_best_dense"]]
        ]
        rows.append([p, *mine, f"{n / m:.3f}", share, *times])
    return "\n".join(
        [
            *heading("c. How sparse for the quality of 2:4?"),
            "**The sparsest pattern at which a decaying recipe comes within half a point of SR-STE "
            f"at 2:4 is {last or 'none of these'}** (characters, GPT-2, means of five seeds). The "
            "paper reports 1:16.",
            "",
            table(
                ["pattern", *(f"{s} − SR-STE at 2:4" for s in setups), "FLOPs", "bytes",
                 *(f"time, {cpu}" for cpu in KERNELS)],
                rows,
            ),
            "Points, paired by seed, with 95 % intervals. Bold: Holm's p over all cells is below "
            "0.05. FLOPs, bytes and time are those of the sparse weights, dense = 1. Times are "
            f"measured on ViT-Base's FF weights at {TOKENS} tokens, packed against the best dense "
            "way ([the benchmark](../benchmarks/kernels.md)): the study's own network is too small "
            "for any kernel to matter.",
            "",
            forest(cells, "c-sparsest"),
        ]
    )  # fmt: skip


def _points(frame: pd.DataFrame, setup: str) -> str:
    return spread(summary(list(by_seed(frame, setup, "1:16", "points").values())))


def _kernels() -> pd.DataFrame:
    parts = []
    for cpu, file in KERNELS.items():
        read = pd.read_csv(ROOT / "docs" / "benchmarks" / "data" / file)
        parts.append(read[read["tokens"] == TOKENS].assign(machine=cpu))
    return pd.concat(parts, ignore_index=True)
