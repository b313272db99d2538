"""The second part: longer training, who teaches, and where training starts."""

from __future__ import annotations

import pandas as pd
from compare import family
from pretrained_more import gain_of, in_points, points_of
from pretrained_setups import (
    CONVENTIONAL,
    LONG_TAUGHT,
    NARROWER,
    PATTERN,
    SHALLOWER,
    STARTED,
    TAUGHT,
)
from pretrained_tuning import joined
from tables import table

SHORT = "Dense, 800 steps"


def longer(task: str) -> list[str]:
    """Four times the steps, beside the dense network of both lengths and the smaller ones."""
    frame = joined(task, "long", "rivals-long")
    if frame is None:
        return []
    frame = in_points(pd.concat([frame, _short(task)]), task)
    names = [n for n in dict.fromkeys(frame["setup"]) if n != SHORT]
    sparse = [n for n in names if not n.startswith("Dense")]
    rivals = {
        "over SR-STE": CONVENTIONAL + TAUGHT,
        "over dense": "Dense",
        "over dense, 800 steps": SHORT,
        "over FF 192": NARROWER,
        "over 3 layers": SHALLOWER,
    }
    families = {
        head: family(frame, [(n, PATTERN, r, None) for n in sparse if n != r], "points")
        for head, r in rivals.items()
    }
    families = {head: cells for head, cells in families.items() if cells}
    rows = []
    for name in names:
        found = [next((c for c in cells if c.setup == name), None) for cells in families.values()]
        beside = f"{frame.loc[frame['setup'] == name, 'beside'].mean():.2f}"
        rows.append([name, points_of(frame, name, None), beside, *map(gain_of, found)])
    about = (
        "Four times the steps (3,200), at what was tuned at 800. Bold: p is below 0.05 after "
        "Holm's correction over the column."
    )
    if joined(task, "first-rates") is not None:
        about += _FIRST
    return [about, "", table(["", "held-out rows", "validation", *families], rows)]


_FIRST = (
    " *A sparse encoder first* (2,400 steps on sentences of SST-2, which teach the encoder its own "
    "dense hidden states, then 800 on the task with the mask held) was searched and not gone on "
    "with: the best of nine pairs of rates was level with MDGF-Exponential without it."
)


def longer_taught(task: str) -> list[str]:
    """Four times the steps, taught by the dense network that had as many."""
    frame = joined(task, "long-taught", "long-taught-more")
    teacher = joined(task, "long-teacher")
    if frame is None or teacher is None:
        return []
    names = list(dict.fromkeys(frame["setup"].str.removesuffix(LONG_TAUGHT)))
    before = joined(task, "long", "rivals-long")
    frame = in_points(pd.concat([frame, before, _short(task)]), task)
    sparse = [n for n in names if not n.startswith("Dense")]
    rivals = {
        "over the teacher of 800 steps": None,
        "over SR-STE": CONVENTIONAL + TAUGHT + LONG_TAUGHT,
        "over dense": "Dense",
        "over dense, 800 steps": SHORT,
        "over FF 192": NARROWER + LONG_TAUGHT,
        "over 3 layers": SHALLOWER + LONG_TAUGHT,
    }
    families = {}
    for head, rival in rivals.items():
        judged = names if rival is None else [n for n in sparse if n + LONG_TAUGHT != rival]
        pairs = [(n + LONG_TAUGHT, PATTERN, rival or n, None) for n in judged]
        if cells := family(frame, pairs, "points"):
            families[head] = {c.setup: c for c in cells}
    rows = []
    for name in names:
        late = name + LONG_TAUGHT
        beside = f"{frame.loc[frame['setup'] == late, 'beside'].mean():.2f}"
        gains = [gain_of(cells.get(late)) for cells in families.values()]
        rows.append([name, points_of(frame, late, PATTERN), beside, *gains])
    own = in_points(teacher, task)["points"].item()
    about = (
        f"A better teacher: four times the steps, taught by a dense network that had as many "
        f"({own:.2f} on held-out rows). Nothing is searched. Bold: Holm over the column."
    )
    return [about, "", table(["", "held-out rows", "validation", *families], rows)]


def _short(task: str) -> pd.DataFrame:
    """The dense network of the main runs."""
    found = joined(task, "dense")
    assert found is not None
    return found.assign(setup=SHORT)


def start(task: str) -> list[str]:
    """From the fine-tuned dense network on, against from the pretrained one on."""
    frame = joined(task, "start")
    if frame is None:
        return []
    names = list(dict.fromkeys(frame["setup"].str.removesuffix(STARTED)))
    others = joined(task, "distilled-1-8", "dense")
    frame = in_points(pd.concat([frame, others]), task)
    before = [(n + STARTED, PATTERN, n, None) for n in names]
    dense = [(n + STARTED, PATTERN, "Dense", None) for n in names]
    cells = [c for pairs in (before, dense) for c in family(frame, pairs, "points")]
    found = {(c.setup, c.rival): c for c in cells}
    rows = []
    for n in names:
        late = n + STARTED
        gains = [gain_of(found.get((late, rival))) for rival in (n, "Dense")]
        beside = f"{frame.loc[frame['setup'] == late, 'beside'].mean():.2f}"
        own = [points_of(frame, one, PATTERN) for one in (late, n)]
        rows.append([n, own[0], beside, own[1], *gains])
    about = (
        "Where training starts: from the fine-tuned dense network, which also teaches, instead of "
        "from the pretrained one. The rate is the best of three again. Bold: Holm over the column."
    )
    head = ["", "held-out rows", "validation", "from the pretrained one", "over it", "over dense"]
    return [about, "", table(head, rows)]
