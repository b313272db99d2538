"""The pages of single questions: gradient rule, panels, phases, the hybrid, low sparsity."""

from __future__ import annotations

import pandas as pd
from choose import means, results
from compare import by_seed, family
from figures import forest
from tables import OURS, gain, heading, in_points, main_runs, sparse_patterns, spread, table, there
from tasks import BY_NAME

from nmflow.experiments.report.statistics import summary

RULES = ("straight-through", "masked")


def rule() -> str:
    """Straight-through or masked gradient."""
    lm = BY_NAME["lm"]
    frame = pd.concat([main_runs(lm), in_points(results("lm-rule"), lm)], ignore_index=True)
    names = ("MDGF-Linear", "MDGF-Exponential")
    pairs = [(n, "1:16", f"{n}, {RULES[0]}", "1:16") for n in names]
    cells = family(frame, pairs, "points")
    shown = [
        [c.setup, *(spread(summary(list(by_seed(frame, s, "1:16", "points").values())))
                    for s in (c.rival, c.setup)), gain(c)]
        for c in cells
    ]  # fmt: skip
    won = [c.setup for c in cells if c.better]
    return "\n".join(
        [
            *heading("e. Straight-through or masked gradient?"),
            f"**The masked rule is better for {' and '.join(won) or 'neither decay'}** "
            "(characters, GPT-2, 1:16; Holm over the two). Under it, pruned weights receive less "
            "and less gradient. The likely reason is that the mask then comes to rest before it "
            "turns binary. These runs did not measure that.",
            "",
            "Test accuracy in points, mean ± standard deviation over seeds, each rule with its own "
            "best settings:",
            "",
            table(["", *RULES, "masked − straight-through"], shown),
            forest(cells, "e-rule"),
            "",
            "The tuning shows the same for every recipe that has the rule. The least validation "
            "loss of its settings under each rule:",
            "",
            table(["", *RULES], _tried()),
            *_on_images(),
        ]
    )


def _on_images() -> list[str]:
    """The least validation loss of either rule on the ViT, on the tuning seed."""
    if not there("vit-rule"):
        return []
    frame = results("vit-rates")
    masked = frame[frame["recipe"] == "MDGF-Exponential"]["validation_loss"].min()
    through = results("vit-rule")["validation_loss"].min()
    return [
        f"MDGF-Exponential on CIFAR-10 (ViT, tuning seed): {through:.4f} straight-through, "
        f"{masked:.4f} masked, each at its best rate. That is one seed, so nothing follows from it."
    ]


def _tried() -> list[list[str]]:
    found = means(results("lm-options"), ["setup"])
    title, _, options = (found["setup"].str.partition(": ")[k] for k in (0, 1, 2))
    rows = []
    for name in dict.fromkeys(sorted(title)):
        least = [
            found.loc[(title == name) & options.str.contains(f"gradient {r}"), "mean"].min()
            for r in RULES
        ]
        if not pd.isna(least).any():
            rows.append([name, *(f"{loss:.4f}" for loss in least)])
    return rows


def panels() -> str:
    """What sharing columns among rows costs."""
    lm = BY_NAME["lm"]
    ran = in_points(results("lm-panels"), lm)
    frame = pd.concat([main_runs(lm), ran], ignore_index=True)
    asked = list(dict.fromkeys(zip(ran["setup"], ran["pattern"], strict=True)))
    single = {pattern: pattern.partition("@")[0] for _, pattern in asked}
    cells = family(frame, [(n, p, n, single[p]) for n, p in asked], "points")
    against = family(frame, [(n, p, lm.rival(single[p]), None) for n, p in asked], "points")
    rows = [
        [c.setup, c.pattern, f"{c.mean:.2f}", gain(c), gain(r)]
        for c, r in zip(cells, against, strict=True)
    ]
    low, high = (
        f"{f(c.difference.mean for c in cells):+.2f}".replace("-", "−") for f in (min, max)
    )
    lost = [f"{c.setup} at {c.pattern}" for c in against if c.difference.mean < 0]
    return "\n".join(
        [
            *heading("j. What do panels cost?"),
            f"**Sharing columns among 16 or 64 rows changes accuracy by {low} to {high} "
            f"points** (characters, GPT-2, {' and '.join(dict.fromkeys(single.values()))}). "
            + (
                f"Below the narrower dense network: {', '.join(lost)}. "
                if lost
                else "No mean falls below that of the narrower dense network. "
            )
            + "A panel has the FLOPs of its pattern and as many bytes of values. It needs fewer "
            "bytes of indices, and its product is a dense one over fewer inputs.",
            "",
            table(["", "pattern", "points", "− single rows", "− narrower dense"], rows),
            forest([*cells, *against], "j-panels"),
            "",
            "Differences are paired by seed, with 95 % intervals. Bold: Holm's p over the column "
            "is below 0.05. In this network a panel of 64 rows is a quarter of the FF's first "
            "weight and the whole of its second: the strictest case.",
        ]
    )


def longer() -> str:
    """The same with four times the steps."""
    lm = BY_NAME["lm"]
    long, short = in_points(results("lm-long"), lm), main_runs(lm)
    rival = lm.rival("1:32")
    pairs = [
        (OURS, "1:32", "SR-STE", "1:32"),
        ("MDGF-Exponential", "1:32", "SR-STE", "1:32"),
        (OURS, "1:32", "MDGF-Exponential", "1:32"),
        (OURS, "1:32", rival, None),
        ("SR-STE", "1:32", rival, None),
    ]
    cells, before = family(long, pairs, "points"), family(short, pairs, "points")
    rows = [
        [f"{c.setup} − {c.rival}", gain(b), gain(c)] for b, c in zip(before, cells, strict=True)
    ]
    steps = [int(frame["steps"].max()) for frame in (short, long)]
    names = (OURS, "MDGF-Exponential", "SR-STE", rival)
    at = {n: None if n == rival else "1:32" for n in names}

    def points(frame: pd.DataFrame, name: str) -> str:
        return spread(summary(list(by_seed(frame, name, at[name], "points").values())))

    first = cells[0]
    said = (
        "is still significant" if first.better
        else "is reversed" if first.worse
        else "is no longer significant"
    )  # fmt: skip
    return "\n".join(
        [
            *heading("m. Does it last? Four times the steps"),
            f"**At 1:32 and {steps[1]:,} steps instead of {steps[0]:,}, the gain of settling over "
            f"SR-STE {said}: {gain(first).strip('*')} points. Its gain over the narrower dense "
            f"network is {gain(cells[3]).strip('*')}** (characters, GPT-2; Holm over the last "
            "column of the second table). Settings and rates are those tuned at the shorter "
            "length.",
            "",
            table(
                ["test accuracy, points", *(f"{n:,} steps" for n in steps)],
                [[n, points(short, n), points(long, n)] for n in names],
            ),
            table(["difference", *(f"{n:,} steps" for n in steps)], rows),
            forest(cells, "m-longer"),
        ]
    )


def phases() -> str:
    """Phases of MDGF-Exponential and the pull of settling."""
    lm = BY_NAME["lm"]
    main = main_runs(lm)
    tried = in_points(results("lm-phases"), lm)
    frame = pd.concat([main[main["pattern"] == "1:16"], tried], ignore_index=True)
    setups = list(dict.fromkeys(tried["setup"]))
    pairs = [(s, "1:16", s.partition(",")[0], "1:16") for s in setups]
    pairs.append(("MDGF-Linear", "1:16", "MDGF-Exponential", "1:16"))
    cells = family(frame, pairs, "points")
    rows = [[c.setup, c.rival, f"{c.mean:.2f}", gain(c)] for c in cells]
    worse = [c.setup for c in cells if c.worse]
    better = [c.setup for c in cells if c.better]
    return "\n".join(
        [
            *heading("f. Which δ schedule, which phases?"),
            f"**Worse than the tuned settings: {'; '.join(worse) or 'none'}. Better: "
            f"{'; '.join(better) or 'none'}** (characters, GPT-2, 1:16; Holm over the table). The "
            "other differences are not significant.",
            "",
            table(["setting", "against the tuned", "points", "difference"], rows),
            forest(cells, "f-phases"),
            "",
            "The tuned settings: MDGF-Exponential is dense for 5 % of the run and fine-tuned for "
            "40 %, and settling has a pull of 3. MDGF-Linear has a learning rate of its own.",
        ]
    )


def hybrid() -> str:
    """The hybrid against its two parts."""
    frame = main_runs(BY_NAME["lm"])
    parts = ("MDGF-Exponential", "SDGF-Stepwise")
    cells = family(frame, [("Hybrid", "1:16", part, "1:16") for part in parts], "points")
    won = [c.rival for c in cells if c.better]
    lost = [c.rival for c in cells if c.worse]
    return "\n".join(
        [
            *heading("g. Does the hybrid beat its parts?"),
            f"**It beats {', '.join(won) or 'neither'} and loses to "
            f"{', '.join(lost) or 'neither'}** (characters, GPT-2, 1:16). The table shows its lead "
            "in points, paired by seed; Holm over the two.",
            "",
            table(["hybrid −", "points"], [[c.rival, gain(c)] for c in cells]),
            forest(cells, "g-hybrid"),
            "",
            f"The hybrid has {cells[0].mean:.2f} points. [Page a](a-recipes.md) has all recipes.",
        ]
    )


def low_sparsity() -> str:
    """Where half or a quarter is kept."""
    lm = BY_NAME["lm"]
    frame = main_runs(lm)
    patterns = [p for p in ("2:4", "1:4") if p in sparse_patterns(frame)]
    recipes = ("MDGF-Exponential", "Settling", "One-shot")
    cells = family(frame, [(s, p, "SR-STE", p) for p in patterns for s in recipes], "points")
    dense = family(frame, [(OURS, p, "Dense", None) for p in patterns], "points")
    won = [f"{c.setup} at {c.pattern}" for c in cells if c.better]
    rows = [
        [p, *(gain(c) for s in recipes for c in cells if (c.setup, c.pattern) == (s, p)),
         *(gain(c) for c in dense if c.pattern == p)]
        for p in patterns
    ]  # fmt: skip
    return "\n".join(
        [
            *heading("h. At low sparsity?"),
            f"**Significantly better than SR-STE at 2:4 or 1:4: {', '.join(won) or 'none'}** "
            f"(characters, GPT-2; Holm over the first {len(recipes)} columns). The last column is "
            "what these patterns cost against the dense network.",
            "",
            table(["pattern", *(f"{s} − SR-STE" for s in recipes), f"{OURS} − dense"], rows),
            forest(cells, "h-low-sparsity"),
        ]
    )
