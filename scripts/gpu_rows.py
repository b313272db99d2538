"""The rows that `make test-gpu` measured, and the cuts that they make the best."""

from __future__ import annotations

import ast
import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nmflow.kernels import gpu_cuts, gpu_plan
from nmflow.kernels.gpu_cuts import Cut
from nmflow.kernels.gpu_plan import Card, Plan
from nmflow.kernels.layout import Shape

WRONG = 0.01  # relative error; that of rounding is 0.002
NOISE = 1.03  # plans that are so near to the best are as good as it

Row = Mapping[str, str]
Product = tuple[Shape, int]


def read(*paths: Path) -> list[Row]:
    """The rows of runs; `run` is the number of each."""
    return [
        {**row, "run": str(number)}
        for number, path in enumerate(paths)
        for row in csv.DictReader(path.open(newline=""))
    ]


def newest(rows: list[Row], what: str) -> list[Row]:
    """The rows of a kind of the last run that has any."""
    some = [row for row in rows if row["what"] == what]
    return [row for row in some if row.get("run") == some[-1].get("run")]


def product(row: Row) -> Product:
    """The shape and the tokens of a row."""
    return Shape.of(int(row["out"]), int(row["inputs"]), row["pattern"]), int(row["tokens"])


def cut_of(row: Row) -> Cut:
    """The numbers that `gpu_plan.make` takes for the plan of a row, the least shares of them."""
    (shape, tokens), want = product(row), ast.literal_eval(row["plan"])
    kind, rows, int8 = want.get("kernel", "decode"), want.get("RT", 1), row["what"] == "int8"
    for shares in range(want["grid"][1], 2 * want["grid"][1] + 1):
        numbers = (want["WARPS"], want["SLICES"], rows, shares, want["STAGES"])
        cut = Cut(shape, tokens, *numbers, kind, int8)
        plan = made(cut)
        if plan is not None and plan.told() == want:
            return cut
    raise SystemExit(f"no plan of today is that of {row}")


def decisive(rows: list[Row]) -> dict[Product, list[Row]]:
    """The rows of each product, of the last run that timed more than one plan of it, or the last.

    Cards differ, so runs are not mixed.
    """
    found: dict[Product, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(product(row), {}).setdefault(row.get("run", ""), []).append(row)
    every = {one: [*runs.values()][::-1] for one, runs in found.items()}
    return {
        one: next((some for some in runs if len({row["plan"] for row in some}) > 1), runs[0])
        for one, runs in every.items()
    }


def timed(
    rows: list[Row], kinds: Sequence[str] = ("decode", "search"), groups: bool = True
) -> dict[Product, dict[Cut, list[tuple[float, float]]]]:
    """Microseconds and gains of each product's plans; without `groups` none of warp groups."""
    right_ones = [
        row
        for row in rows
        if row["what"] in kinds and row["plan"] and right(row) and served(row)
        if groups or cut_of(row).kind not in gpu_plan.OF_GROUPS
    ]
    found: dict[Product, dict[Cut, list[tuple[float, float]]]] = {}
    for one, some in decisive(right_ones).items():
        for row in some:
            took = float(row["packed_us"]), float(row["ratio"])
            found.setdefault(one, {}).setdefault(cut_of(row), []).append(took)
    return found


def served(row: Row) -> bool:
    """Whether the product has a plan today."""
    shape, tokens = product(row)
    return tokens <= gpu_plan.most_tokens(shape)


def right(row: Row) -> bool:
    """Whether a product was timed, and was that of float64 but for rounding."""
    return bool(row["packed_us"]) and float(row["error"]) < WRONG


def best(cuts: Mapping[Cut, list[tuple[float, float]]]) -> float:
    """The least microseconds of a product."""
    return min(us for took in cuts.values() for us, _ in took)


def kept(rows: list[Row]) -> list[Cut]:
    """What products take: the best of each, and the best of cards without warp groups."""
    first, second = chosen(timed(rows)), chosen(timed(rows, groups=False))
    int8 = chosen(timed(rows, ["int8"]))
    return [*first, *(cut for cut in second if cut not in first), *int8]


def chosen(found: Mapping[Product, Mapping[Cut, list[tuple[float, float]]]]) -> list[Cut]:
    """A cut for each product within the noise of its best; the same for many where it can be."""
    left = {one: {cut[2:]: cut for cut in as_good(cuts)} for one, cuts in found.items()}
    taken: dict[Product, Cut] = {}
    while left:
        fits = Counter(numbers for cuts in left.values() for numbers in cuts)
        numbers = max(fits, key=lambda numbers: (fits[numbers], numbers))
        taken |= {one: cuts[numbers] for one, cuts in left.items() if numbers in cuts}
        left = {one: cuts for one, cuts in left.items() if numbers not in cuts}
    return [taken[one] for one in found]


def as_good(cuts: Mapping[Cut, list[tuple[float, float]]]) -> list[Cut]:
    """Cuts within the noise of the best; one that orders x first only if no other is as good."""
    near = [cut for cut, took in cuts.items() if max(took)[0] <= NOISE * best(cuts)]
    near = near or [cut for cut, took in cuts.items() if min(took)[0] == best(cuts)]
    return [cut for cut in near if cut.kind != "ready"] or near


def cuts_file(cuts: list[Cut]) -> str:
    """`cuts.csv`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["pattern", "out", "inputs", *Cut._fields[1:]])
    for cut in cuts:
        writer.writerow([cut.shape.pattern, cut.shape.out, cut.shape.inputs, *cut[1:]])
    return text.getvalue()


def neighbours(found: Mapping[Product, Mapping[Cut, list[tuple[float, float]]]]) -> list[float]:
    """What the plan of the nearest other product costs, of the best, where it was timed."""
    every, lost = gpu_cuts.measured(), []
    for (shape, tokens), cuts in found.items():
        if len(cuts) == 1:
            continue
        others = tuple(c for c in every if (c.shape, c.tokens) != (shape, tokens))
        gpu_cuts.measured = lambda others=others: others  # pyright: ignore
        plan = next(gpu_cuts.near(shape, False, tokens, Card()))
        took = [us for cut, times in cuts.items() for us, _ in times if made(cut) == plan]
        lost += [min(took) / best(cuts)] if took else []
    gpu_cuts.measured = lambda: every  # pyright: ignore
    return lost


def made(cut: Cut) -> Plan | None:
    """The plan of a cut on a card like an H100."""
    return gpu_plan.make(cut.shape, False, cut.tokens, Card(), *cut[2:])
