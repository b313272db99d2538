"""Whole networks at batch 1: dense, best dense, packed, int8; and what the rest of the time is.

    python benchmarks/end_to_end.py --write docs/benchmarks/end_to_end.md

ViT-Base and T5-Base's encoder by their configurations, with random weights (speed does not depend
on their values), pruned by magnitude to 1:16. Ratios are against the best dense way in the same
run: every linear layer on whichever of F.linear and packed oneDNN is faster for its token count.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nmflow.bench import networks
from nmflow.bench.bench import pruned, where_the_time_goes
from nmflow.bench.results import cpu_name, version_text
from nmflow.bench.rivals import INT8
from nmflow.bench.ways import best_dense, int8_dynamic, tokens_of
from nmflow.packed import compress
from nmflow.packed.measure import time_ways

Clock = Callable[[], float]
CLOCKS: dict[str, tuple[Clock, str]] = {
    "wall": (time.perf_counter, "wall time"),
    "cpu": (time.thread_time, "the calling thread's CPU time, as others used the machine too"),
}
PATTERN = "1:16"
PLACES = {"FF": ("ff",), "FF, QKV and projection": ("ff", "attn")}
GOALS = {"FF": 2.0, "FF, QKV and projection": 3.5}
NETWORKS = {"ViT-Base": ("vit-base", 197), "T5-Base's encoder": ("t5-base", 128)}


def measure(title: str, source: str, length: int, seconds: float, clock: Clock) -> list[str]:
    """The lines of Markdown of one network."""
    torch.manual_seed(0)
    dense = networks.network(source)
    example = networks.example(dense, 1, length)
    tokens = max(tokens_of(dense, example).values())
    best = best_dense(dense, example)
    held = {"dense, as it is": dense, "dense, best": best}
    for place, include in PLACES.items():
        held[f"{PATTERN} on {place}"] = compress(
            pruned(dense, PATTERN, include), tokens=(tokens,), onednn=True, inplace=True
        )
    eight = int8_dynamic(dense)
    if eight is not None:
        held[INT8] = eight
    with torch.inference_mode():
        race = {name: lambda one=one: one(**example) for name, one in held.items()}
        took = time_ways(race, seconds, least=9, clock=clock)
        shares = {name: where_the_time_goes(run) for name, run in race.items() if name != INT8}
    base = took["dense, best"].median
    lines = [
        f"## {title}, {tokens} tokens",
        "",
        "| way | median ms | 10 % | 90 % | × best dense | goal | met |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    missed: list[str] = []
    for name, one in took.items():
        ratio = base / one.median
        goal = next((g for p, g in GOALS.items() if name == f"{PATTERN} on {p}"), None)
        met = "" if goal is None else "yes" if ratio >= goal else "no"
        lines.append(
            f"| {name} | {one.median / 1e3:.1f} | {one.q10 / 1e3:.1f} | {one.q90 / 1e3:.1f} | "
            f"{ratio:.2f} | {goal or ''} | {met} |"
        )
        if met == "no" and goal is not None:
            excess = one.median - base / goal
            missed.append(
                f"{name} misses its goal by {excess / 1e3:.1f} ms, {excess / one.median:.0%} of "
                "its time."
            )
    lines += ["", *missed] if missed else []
    parts = list(dict.fromkeys(part for share in shares.values() for part in share))
    lines += ["", "Share of the time, by torch's profiler:", ""]
    lines += ["| way | " + " | ".join(parts) + " |", "| --- |" + " ---: |" * len(parts)]
    for name, share in shares.items():
        cells = " | ".join(f"{share.get(part, 0):.0%}" for part in parts)
        lines.append(f"| {name} | {cells} |")
    last = f"{PATTERN} on {list(PLACES)[-1]}"
    rest = 1 - shares[last].get("matrix products", 0)
    ceiling = base / (took[last].median * rest)
    lines += [
        "",
        f"With {last}, {rest:.0%} of the time goes to attention, norms, activations and the "
        f"like. So even free matrix products would give "
        f"{ceiling:.1f} × here.",
        "",
    ]
    return lines


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each way")
    parser.add_argument("--only", default="", help="a part of a network's name")
    parser.add_argument("--write", type=Path, help="a Markdown file")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads > 1:
        parser.error("--clock cpu counts the calling thread only: use it with --threads 1")
    torch.set_num_threads(args.threads)
    lines = [
        "# Whole networks, packed against the best dense way",
        "",
        f"`python benchmarks/end_to_end.py {' '.join(sys.argv[1:])}`, "
        f"{datetime.date.today().isoformat()}.",
        f"{cpu_name()}; {args.threads} thread{'s' if args.threads > 1 else ''}; "
        f"{version_text()}. Batch 1, float32, random weights.",
        "",
        "`dense, best` runs every linear layer on the faster of `F.linear` and packed oneDNN, as "
        "measured for its token count. The 1:16 rows are `nmflow.compress(model, tokens=…, "
        "onednn=True)`, whose dense layers get the same choice. The ways take turns in one "
        f"process. Figures are medians of {CLOCKS[args.clock][1]}.",
        "",
    ]
    for title, (source, length) in NETWORKS.items():
        if args.only.lower() in title.lower():
            lines += measure(title, source, length, args.seconds, CLOCKS[args.clock][0])
    text = "\n".join(lines)
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
