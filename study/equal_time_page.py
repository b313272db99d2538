"""Page b's second part: what the same processor time buys, from the tables of its runs."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from choose import SEEDS, results
from compare import Cell, family
from equal_time_ways import (
    AS_LONG,
    DENSE,
    GROWING,
    HELD,
    MORE,
    MORE_NAME,
    NAME,
    ORDERED,
    ORDERS,
    SPENT,
    WHOLE,
)
from tables import gain, spread, table, there

from nmflow.experiments.report.statistics import summary

SAME = 1.0
"""Points within which two ways to compute one run count as the same quality."""
MDGF, RIVAL, SETTLING = "MDGF-Exponential", "SR-STE", "Settling"


def equal_time() -> list[str]:
    """Fine-tuning MiniLM in the same processor time, with steps on kept places."""
    if not there(NAME):
        return []
    frame = _points(NAME)
    others = frame.iloc[:0] if not there(MORE_NAME) else _points(MORE_NAME)
    return [*_first(frame), *(_more(pd.concat([frame, others])) if len(others) else [])]


def _points(name: str) -> pd.DataFrame:
    frame = results(name)
    spent = pd.read_csv(SPENT[name])[["setup", "seed", "cpu_seconds"]]
    frame = frame.merge(spent, on=["setup", "seed"], how="left")
    return frame.assign(
        points=100 * frame["test_accuracy"], check=100 * frame["validation_accuracy"]
    )


def _first(frame: pd.DataFrame) -> list[str]:
    sparse = [s for s in dict.fromkeys(frame["setup"]) if s not in (HELD, DENSE)]
    over = _family(frame, {s: RIVAL for s in sparse if s != RIVAL})
    behind = _family(frame, dict.fromkeys(sparse, DENSE))
    won, lost = ([c.setup for c in over if getattr(c, way)] for way in ("better", "worse"))
    steps = frame.loc[frame["setup"] == DENSE, "steps"].iloc[0]
    return [
        "",
        "## At equal time, fine-tuned on a CPU",
        "",
        "*MiniLM-L6, pretrained, SST-2, FF and attention at 1:8, float32, one thread; change (26) "
        "of the [protocol](protocol.md#changes) was committed before the runs. Rates are of page "
        "n's search; phases are set for [steps on kept places](../howto/sparse-steps.md), "
        "untried.*",
        "",
        f"**In the processor time of {steps} dense "
        f"steps, {_names(won)} {'are' if len(won) > 1 else 'is'} above SR-STE"
        f"{f', and {_names(lost)} below' if lost else ''}.** "
        f"{_twin(_family(frame, {SETTLING: HELD}))}",
        "",
        _table(frame, {"over SR-STE": over, "over dense": behind}),
        "Accuracy × 100: mean ± standard deviation over seeds, differences paired by seed with "
        "95 % intervals; bold: Holm's p over the column is below 0.05. Steps follow from a step's "
        "CPU seconds of each phase, timed with nothing else on the machine (`step_seconds.csv`). "
        "*CPU s* is the mean of what the runs took, on a machine that others used too: such "
        f"seconds are longer, and not equally so. *{HELD}* has as many steps as settling, "
        f"and more time.{_short(frame)}",
    ]


def _more(frame: pd.DataFrame) -> list[str]:
    """The other recipes, panels, and what is the recipe's when steps are equal."""
    mine = frame[frame["setup"].isin(MORE) & (frame["setup"] != DENSE)]
    added = [s for s in dict.fromkeys(mine["setup"]) if s != AS_LONG]
    over = _family(frame, dict.fromkeys(added, MDGF))
    behind = _family(frame, dict.fromkeys(added, DENSE))
    panels = _family(frame, {s: WHOLE for s in added if s in (ORDERED, GROWING)})
    won, lost = ([c.setup for c in over if getattr(c, way)] for way in ("better", "worse"))
    level = [c.setup for c in over if not c.better and not c.worse]
    said = [
        f"{_names([f'*{name}*' for name in names])} {'are' if len(names) > 1 else 'is'} {word}"
        for names, word in ((won, "above it"), (lost, "below it"), (level, "not told apart"))
        if names
    ]
    order = pd.read_csv(ORDERS[MORE_NAME])["cpu_seconds"].iloc[0]
    return [
        "",
        "### Other recipes and panels on kept places",
        "",
        "*Change (28) of the protocol, committed before the runs: the same task, rate and time.*",
        "",
        f"**Beside MDGF-Exponential at 1:8 (single rows), {'; '.join(said)}.** {_split(frame)}",
        "",
        _table(
            mine,
            {"over MDGF-Exponential, 1:8": over, "over dense": behind, "over panels": panels},
        ),
        f"*Panels* is MDGF-Exponential at 1:8@16. *{ORDERED}* permutes the hidden units first, "
        f"which takes {order:.1f} CPU seconds that are not counted here. *{GROWING}* is "
        "SDGF-Panels: single rows at first, then panels of 2, 4, 8 and 16. "
        f"*{AS_LONG}* has less time than the others.{_short(mine)}",
    ]


def _split(frame: pd.DataFrame) -> str:
    """How much of MDGF's gain is the recipe's, and how much is that of more steps."""
    pair = [(AS_LONG, "1:8", RIVAL, "1:8"), (MDGF, "1:8", AS_LONG, "1:8")]
    cells = family(frame, pair, "points")
    if len(cells) < len(pair):
        return ""
    steps = dict(zip(frame["setup"], frame["steps"], strict=True))
    recipe, longer = (gain(cell) for cell in cells)
    return (
        f"At SR-STE's {steps[RIVAL]} steps, MDGF-Exponential is {recipe} over SR-STE, in less "
        f"time; the other {steps[MDGF] - steps[RIVAL]} steps that fit into the time add {longer}."
    )


def _family(frame: pd.DataFrame, rivals: Mapping[str, str]) -> list[Cell]:
    at = dict(zip(frame["setup"], frame["pattern"], strict=True))
    pairs = [(s, at[s], r, at[r]) for s, r in rivals.items() if s in at and r in at]
    return family(frame, pairs, "points")


def _table(frame: pd.DataFrame, families: Mapping[str, list[Cell]]) -> str:
    columns = [{cell.setup: gain(cell) for cell in cells} for cells in families.values()]
    rows = []
    for setup in dict.fromkeys(frame["setup"]):
        mine = frame[frame["setup"] == setup]
        own = summary(list(mine["points"]))
        rows.append(
            [setup, f"{mine['steps'].iloc[0]:,}", spread(own), f"{mine['check'].mean():.2f}",
             f"{own.n}", *(column.get(setup, "–") for column in columns),
             f"{mine['cpu_seconds'].mean():.0f}"]
        )  # fmt: skip
    heads = ["", "steps", "held-out rows", "validation", "seeds", *families, "CPU s"]
    return table(heads, rows)


def _short(frame: pd.DataFrame) -> str:
    fewest = frame.groupby("setup").size().min()
    asked = f" {len(SEEDS)} seeds each were asked for: the others have not run."
    return asked if fewest < len(SEEDS) else ""


def _names(names: list[str]) -> str:
    *others, last = names or ["none"]
    return f"{', '.join(others)} and {last}" if others else last


def _twin(cells: list[Cell]) -> str:
    """Whether kept places and dense products of one run are the same quality."""
    if not cells:
        return "Kept places beside dense products of the same run: too few seeds yet."
    d = cells[0].difference
    said = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]".replace("-", "−")
    within = d.low is not None and d.high is not None and d.low > -SAME and d.high < SAME
    verdict = "the same quality" if within else "not shown to be the same quality"
    return (
        f"Settling on kept places over the same run with dense products: {said}, {verdict} by the "
        f"protocol's rule (within ±{SAME:g})."
    )
