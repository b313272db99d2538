"""The tables of `docs/benchmarks/gpu.md`, from the rows that `make test-gpu` measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from gpu_rows import (
    Product,
    Row,
    chosen,
    decisive,
    neighbours,
    newest,
    product,
    right,
    timed,
)

from nmflow.kernels import gpu_plan

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
    lines = []
    many = [row for row in rows if row["what"] in ("panels", "panels-search") and right(row)]
    for (shape, tokens), some in decisive(many).items():
        ours = [row for row in some if row["plan"].startswith("Group")]
        fast = max(ours or some, key=lambda r: float(r["ratio"]))
        triton = [float(row["ratio"]) for row in some if row["plan"].startswith("Block")]
        pattern = str(shape.pattern)
        goal = MANY_GOALS.get(pattern) if (shape.out, tokens) == (11008, 4096) else None
        gain, dense = float(fast["ratio"]), float(fast["dense_us"])
        of_x_turned = dense / float(fast["ready_us"])
        blocks = len({row["plan"] for row in some if row["plan"]})
        lines.append([
            f"({shape.out}, {shape.inputs})", str(tokens), pattern,
            f"{max(triton):.2f}" if triton else "–",
            f"**{gain:.2f}**", f"{dense:.0f}", f"{float(fast['packed_us']):.0f}",
            f"{float(fast['turn_us']):.0f}" if ours else "–",
            f"{of_x_turned:.2f}" if ours else "–", str(blocks or "–"), against(gain, goal),
        ])  # fmt: skip
    head = ["(out, in)", "tokens", "pattern", "× cuBLAS, Triton", "× cuBLAS", "cuBLAS, µs"]
    head += ["packed, µs", "turning x, µs", "× cuBLAS, x turned", "blocks timed", "goal"]
    yield table(head, lines)
    yield table(
        ["a Llama-2-7B's shape, batch 1", "tokens a second", "× dense"],
        [
            [r["pattern"], f"{float(r['tokens_per_s']):.0f}", f"{float(r['ratio']):.2f}"]
            for r in newest(rows, "llama-7b") if r["tokens_per_s"]
        ],
    )  # fmt: skip
    lines = []
    for row in newest(rows, "steps"):
        low, high = re.findall(r"\d+\.\d+", row["failed"])
        lines.append([
            row["plan"], row["pattern"], f"{float(row['packed_us']) / 1e3:.1f}",
            f"{float(row['ratio']):.2f}", f"{float(low):.2f}–{float(high):.2f}",
        ])  # fmt: skip
    yield table(["training step", "pattern", "ms", "× dense", "quartiles"], lines)
    yield int8_table(rows)
    yield training_table(newest(rows, "three"))
    lines = [
        [*row["plan"].rsplit(", ", 1), f"{float(row['packed_us']) / 1e3:.1f}",
         f"{float(row['ratio']):.2f}", row["failed"].partition(" ")[0] or "–"]
        for row in newest(rows, "train")
    ]  # fmt: skip
    yield table(["network", "steps", "ms", "× dense", "layers on kept places"], lines)


def int8_table(rows: list[Row]) -> str:
    """Values of 8 bits beside those of two bytes and the best of cuBLAS, which another row has."""
    lines = []
    found = timed(rows, ["int8"])
    best = {(cut.shape, cut.tokens): cut for cut in chosen(found)}
    for one, some in decisive([r for r in rows if r["what"] == "int8" and right(r)]).items():
        (shape, tokens), run = one, some[0].get("run")
        dense = min(
            float(row["dense_us"])
            for row in rows
            if row["what"] in ("int8", "dense") and row.get("run") == run
            and (row["out"], row["inputs"]) == (str(shape.out), str(shape.inputs))
            and row["tokens"] == str(tokens)
        )  # fmt: skip
        us, _ = min(found[one][best[one]])
        two_bytes = float(some[0]["ready_us"])
        before = [float(r["packed_us"]) for r in some if r["taken"] == "True"]
        lines.append([
            f"({shape.out}, {shape.inputs})", str(tokens), str(shape.pattern), f"{dense:.1f}",
            f"{dense / two_bytes:.2f}", f"{dense / before[0]:.2f}" if before else "–",
            f"**{dense / us:.2f}**", f"{us:.1f}", f"{len(found[one])}",
        ])  # fmt: skip
    head = ["(out, in)", "tokens", "pattern", "cuBLAS, µs", "two bytes", "8 bits before", "8 bits"]
    return table([*head, "µs", "plans timed"], lines)


def training_table(rows: list[Row]) -> str:
    """The products of a training step on panels, × torch's dense ones."""
    layers: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("out", "inputs", "tokens", "pattern"))
        layers.setdefault(key, {})[row["plan"]] = row
    shown = ["forward", "input gradient", "weight gradient"]
    half = "input gradient, torch.bfloat16, 128 MB"
    lines = []
    for (out, inputs, tokens, pattern), ways in layers.items():
        if "all" not in ways:  # one of its products failed
            continue
        packing = float(ways["pack"]["packed_us"]), float(ways["pack"]["dense_us"])
        lines.append([
            f"({out}, {inputs})", tokens, pattern,
            *(f"{float(ways[name]['ratio']):.2f}" for name in shown),
            f"{packing[0]:.0f} / {packing[1]:.0f}", f"**{float(ways['all']['ratio']):.2f}**",
            f"{float(ways[half]['ratio']):.2f}",
        ])  # fmt: skip
    head = ["(out, in)", "tokens", "pattern", "forward", "gradient of x", "gradient of W"]
    head += ["packing / casting W, µs", "all together", "gradient of x, sums in bfloat16"]
    return table(head, lines)


def taken(rows: list[Row], one: Product) -> str:
    """The gain of the plan that was taken in the run: of a table, or else of a search."""
    kinds = ("decode", "search")
    some = [row for row in rows if row["what"] in kinds and row["ratio"] and product(row) == one]
    own = [row for row in decisive(some).get(one, []) if row["taken"] == "True"]
    own.sort(key=lambda row: kinds.index(row["what"]))
    return f"{float(own[0]['ratio']):.2f}" if own else "–"


def against(gain: float, goal: float | None) -> str:
    """What a gain is beside its goal."""
    if goal is None:
        return "–"
    return f"{goal} ({'met' if round(gain, 2) >= goal else 'missed'})"
