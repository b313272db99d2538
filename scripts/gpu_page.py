"""From what `make test-gpu` measured: the cuts that `gpu_plan` takes, and the tables of a page.

    python scripts/gpu_page.py docs/benchmarks/data/gpu-h200.csv [--check]

Writes `src/nmflow/kernels/cuda/cuts.csv` and what stands between the markers of
`docs/benchmarks/gpu.md`. With `--check` it writes nothing, and fails where they would change.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from nmflow.kernels import gpu_cuts, gpu_plan
from nmflow.kernels.gpu_cuts import Cut
from nmflow.kernels.gpu_plan import Card, Plan
from nmflow.kernels.layout import Shape

ROOT = Path(__file__).resolve().parents[1]
CUTS = ROOT / "src/nmflow/kernels/cuda/cuts.csv"
PAGE = ROOT / "docs/benchmarks/gpu.md"
WRONG = 0.01  # relative error; that of rounding is 0.002
NOISE = 1.03  # plans that are so near to the best are as good as it
GOALS = {  # (out, tokens up to): pattern to goal
    (28672, 16): {"1:4": 3.3, "1:8": 5.5, "1:16": 7.0, "2:4": 1.7},
    (11008, 16): {"1:4": 3.2, "1:8": 4.5, "1:16": 5.5, "2:4": 1.7},
    (28672, 64): {"1:8": 2.0},
    (11008, 64): {"1:8": 2.0},
}
MANY_GOALS = {"1:16@64": 6.0, "1:8@64": 3.7}

KINDS = {
    "decode": "fragments", "groups": "warp groups", "ready": "warp groups, x in order",
    "lookup": "look-up",
}  # fmt: skip

Row = Mapping[str, str]
Product = tuple[Shape, int]


def read(path: Path) -> list[Row]:
    """The rows of a run."""
    return list(csv.DictReader(path.open(newline="")))


def product(row: Row) -> Product:
    """The shape and the tokens of a row."""
    return Shape.of(int(row["out"]), int(row["inputs"]), row["pattern"]), int(row["tokens"])


def cut_of(row: Row) -> Cut:
    """The numbers that `gpu_plan.make` takes for the plan of a row, the least shares of them."""
    (shape, tokens), want = product(row), ast.literal_eval(row["plan"])
    kind, rows = want.get("kernel", "decode"), want.get("RT", 1)
    for shares in range(want["grid"][1], 2 * want["grid"][1] + 1):
        numbers = (want["WARPS"], want["SLICES"], rows, shares, want["STAGES"])
        cut = Cut(shape, tokens, *numbers, kind)
        plan = made(cut)
        if plan is not None and plan.told() == want:
            return cut
    raise SystemExit(f"no plan of today is that of {row}")


def timed(rows: list[Row]) -> dict[Product, dict[Cut, list[tuple[float, float]]]]:
    """Microseconds and gains of every plan of every product that was timed."""
    found: dict[Product, dict[Cut, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["what"] in ("decode", "search") and row["plan"] and right(row) and served(row):
            took = float(row["packed_us"]), float(row["ratio"])
            found.setdefault(product(row), {}).setdefault(cut_of(row), []).append(took)
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


def kept(found: Mapping[Product, Mapping[Cut, list[tuple[float, float]]]]) -> list[Cut]:
    """What products take: the best of each, and the best of cards without warp groups."""
    old = {
        one: {cut: took for cut, took in cuts.items() if cut.kind not in gpu_plan.OF_GROUPS}
        for one, cuts in found.items()
    }
    first, second = chosen(found), chosen({one: cuts for one, cuts in old.items() if cuts})
    return [*first, *(cut for cut in second if cut not in first)]


def chosen(found: Mapping[Product, Mapping[Cut, list[tuple[float, float]]]]) -> list[Cut]:
    """A cut for each product within the noise of its best; the same for many where it can be."""
    left = {
        one: {cut[2:]: cut for cut, took in cuts.items() if max(took)[0] <= NOISE * best(cuts)}
        or {cut[2:]: cut for cut, took in cuts.items() if min(took)[0] == best(cuts)}
        for one, cuts in found.items()
    }
    taken: dict[Product, Cut] = {}
    while left:
        fits = Counter(numbers for cuts in left.values() for numbers in cuts)
        numbers = max(fits, key=lambda numbers: (fits[numbers], numbers))
        taken |= {one: cuts[numbers] for one, cuts in left.items() if numbers in cuts}
        left = {one: cuts for one, cuts in left.items() if numbers not in cuts}
    return [taken[one] for one in found]


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


# --- tables -----------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(rows: list[Row]) -> Iterator[str]:
    """The tables of the page."""
    found = timed(rows)
    cuts = {(cut.shape, cut.tokens): cut for cut in chosen(found)}
    lines = []
    order = sorted(found, key=lambda one: (-one[0].out, one[0].inputs, one[1]))
    for shape, tokens in order:
        every = found[shape, tokens]
        us, gain = min(every[cuts[shape, tokens]])
        before = taken(rows, (shape, tokens))
        goal = next(
            (goals[str(shape.pattern)] for (out, most), goals in GOALS.items()
             if out == shape.out and tokens <= most and str(shape.pattern) in goals), None,
        )  # fmt: skip
        rate = gpu_plan.bytes_of(shape, shape.inputs) * shape.tiles / us / 1e6
        lines.append([
            f"({shape.out}, {shape.inputs})", str(tokens), str(shape.pattern),
            KINDS[cuts[shape, tokens].kind], before, f"**{gain:.2f}**",
            f"{us:.1f}", f"{rate:.2f}", f"{len(every)}", against(gain, goal),
        ])  # fmt: skip
    head = ["(out, in)", "tokens", "pattern", "kernel", "× cuBLAS before", "× cuBLAS now", "µs"]
    yield table([*head, "TB/s", "plans timed", "goal"], lines)
    lost = neighbours(found)
    mean = math.exp(sum(map(math.log, lost)) / len(lost))
    yield (
        f"Where a product is left out, and the nearest other one gives the plan, {len(lost)} of "
        f"{sum(len(c) > 1 for c in found.values())} plans are among those that were timed: they "
        f"take {mean:.2f} times as long as the best in the mean, {max(lost):.2f} at worst."
    )
    searched: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["what"] in ("panels", "panels-search") and right(row):
            key = tuple(row[k] for k in ("out", "inputs", "tokens", "pattern"))
            searched.setdefault(key, []).append(row)
    lines = []
    for (out, inputs, tokens, pattern), some in searched.items():
        ours = [row for row in some if row["plan"].startswith("Group")]
        fast = max(ours or some, key=lambda r: float(r["ratio"]))
        triton = [float(row["ratio"]) for row in some if row["plan"].startswith("Block")]
        goal = MANY_GOALS.get(pattern) if (out, tokens) == ("11008", "4096") else None
        gain, dense = float(fast["ratio"]), float(fast["dense_us"])
        ready = float(fast["ready_us"])
        lines.append([
            f"({out}, {inputs})", tokens, pattern, f"{max(triton):.2f}" if triton else "–",
            f"**{gain:.2f}**", f"{dense:.0f}", f"{float(fast['packed_us']):.0f}",
            f"{float(fast['turn_us']):.0f}" if ours else "–",
            f"{dense / ready:.2f}" if ours else "–", f"{len(some)}", against(gain, goal),
        ])  # fmt: skip
    head = ["(out, in)", "tokens", "pattern", "× cuBLAS, Triton", "× cuBLAS", "cuBLAS, µs"]
    head += ["packed, µs", "turning x, µs", "× cuBLAS, x turned", "blocks timed", "goal"]
    yield table(head, lines)
    yield table(
        ["a Llama-2-7B's shape, batch 1", "tokens a second", "× dense"],
        [
            [r["pattern"], f"{float(r['tokens_per_s']):.0f}", f"{float(r['ratio']):.2f}"]
            for r in rows if r["what"] == "llama-7b" and r["tokens_per_s"]
        ],
    )  # fmt: skip
    lines = []
    for row in rows:
        if row["what"] == "steps":
            low, high = re.findall(r"\d+\.\d+", row["failed"])
            lines.append([
                row["plan"], row["pattern"], f"{float(row['packed_us']) / 1e3:.1f}",
                f"{float(row['ratio']):.2f}", f"{float(low):.2f}–{float(high):.2f}",
            ])  # fmt: skip
    yield table(["training step", "pattern", "ms", "× dense", "quartiles"], lines)


def taken(rows: list[Row], one: Product) -> str:
    """The gain of the plan that was taken in the run: of a table, or else of a search."""
    kinds = ("decode", "search")
    found = [r for r in rows if r["what"] in kinds and r["taken"] == "True" and r["ratio"]]
    own = sorted((r for r in found if product(r) == one), key=lambda r: kinds.index(r["what"]))
    return f"{float(own[0]['ratio']):.2f}" if own else "–"


def against(gain: float, goal: float | None) -> str:
    """What a gain is beside its goal."""
    if goal is None:
        return "–"
    return f"{goal} ({'met' if round(gain, 2) >= goal else 'missed'})"


def page(text: str, parts: list[str]) -> str:
    """The page with each part between its markers."""
    for i, part in enumerate(parts):
        begin, end = f"<!-- table {i} -->", f"<!-- end {i} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return text


def main(argv: list[str] | None = None) -> int:
    """Write both, or compare: the number of files that are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    rows = read(args.csv)
    new = {CUTS: cuts_file(kept(timed(rows)))}
    if not args.check:
        CUTS.write_text(new[CUTS])
    new[PAGE] = page(PAGE.read_text(), list(tables(rows)))
    if not args.check:
        PAGE.write_text(new[PAGE])
    stale = [str(path) for path, text in new.items() if path.read_text() != text]
    print(*(f"{path} is not what {args.csv} gives" for path in stale), sep="\n")
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
