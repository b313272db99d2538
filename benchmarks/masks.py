"""Time of a magnitude mask and projection: the compiled kernel, torch's ways and a plain copy.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/masks.py [--shape 3072 768] [--threads 1]
        [--patterns 1:4 2:4 ...] [--dtypes float32 ...] [--isas avx512 ...] [--csv FILE]

`out` writes W̃ = W ⊙ (m + (1 - m) δ) in one pass, `mask` the bool mask, `all` a dense copy, the mask
and W̃. `topk` and `argsort` are torch's ways to the mask alone; they break ties as they like. The
ways take turns, round by round, so that a drift of the machine hits all of them. `x copy` is the
median over the rounds of a way's time over the copy's in the same round.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import nmflow
from nmflow import native
from nmflow.masks import native as native_masks

PATTERNS = [
    *("1:4", "2:4", "3:4", "1:2", "1:8", "1:16", "1:32", "1:64", "1:128", "7:8", "15:16", "31:32"),
    *("2:8", "4:8", "4:16", "8:16", "8:32", "16:32", "4:32", "16:256"),
    *("8:64", "8:128", "8:256", "8:1024", "32:64", "64:128"),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DELTA = 0.5


def goal(n: int, m: int) -> float:
    """Milliseconds for one output of (3072, 768) on one thread; 1.5 copies are enough as well."""
    return 0.5 if m == 4 or n == 1 else 2.0


def topk(w: Tensor, n: int, m: int) -> Tensor:
    """Mask by `torch.topk`."""
    groups = w.abs().view(-1, m)
    kept = torch.zeros(groups.shape, dtype=torch.bool)
    return kept.scatter_(1, groups.topk(n, dim=1, sorted=False).indices, True)


def argsort(w: Tensor, n: int, m: int) -> Tensor:
    """Mask by `torch.argsort`."""
    groups = w.abs().view(-1, m)
    kept = torch.zeros(groups.shape, dtype=torch.bool)
    return kept.scatter_(1, groups.argsort(dim=1, descending=True)[:, :n], True)


def ways(w: Tensor, n: int, m: int, isas: list[str]) -> dict[str, Callable[[], object]]:
    """Each way by name; all write into the same buffers."""
    w = w.view(-1, m)
    dense, out, kept = torch.empty_like(w), torch.empty_like(w), torch.empty(w.shape).bool()
    found: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(w)}

    def compiled(isa: str, **outputs: Tensor) -> Callable[[], object]:
        def run() -> None:
            native.set_isa(isa)
            native_masks.project(w, n, m, DELTA, **outputs)  # pyright: ignore[reportArgumentType]

        return run

    for isa in isas:
        found[f"{isa} out"] = compiled(isa, out=out)
        if isa == isas[0]:
            found[f"{isa} mask"] = compiled(isa, mask=kept)
            found[f"{isa} all"] = compiled(isa, dense=dense, mask=kept, out=out)
    found["topk"] = lambda: topk(w, n, m)
    found["argsort"] = lambda: argsort(w, n, m)
    return found


def measure(run: Callable[[], object], calls: int) -> float:
    """Milliseconds of the fastest call of a burst.

    On one thread it is the process's own time on the core, so that a core that is shared with other
    processes tells the same.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(calls):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times) * 1e3


def quantile(times: list[float], at: float) -> float:
    """Return the time that a share `at` of the times lies below."""
    times = sorted(times)
    return times[min(len(times) - 1, round(at * (len(times) - 1)))]


def compare(w: Tensor, n: int, m: int, isas: list[str], rounds: int) -> list[dict[str, object]]:
    """A row a way; slow ways run one call a round."""
    todo = ways(w, n, m, isas)
    calls = {name: max(1, min(8, int(8 / measure(run, 2)))) for name, run in todo.items()}
    times: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(rounds):
        for name, run in todo.items():
            times[name].append(measure(run, calls[name]))
    return [
        {
            "way": name,
            "median": statistics.median(found),
            "low": quantile(found, 0.1),
            "high": quantile(found, 0.9),
            "copies": statistics.median(a / b for a, b in zip(found, times["copy"], strict=True)),
        }
        for name, found in times.items()
    ]


def cpu() -> str:
    """Name the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[3072, 768])
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--isas", nargs="+", default=list(reversed(native.ISAS[:3])))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, help="write every row there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    isas = [isa for isa in options.isas if native.set_isa(isa) == isa]
    print(
        f"{cpu()}; {options.threads} thread(s); torch {torch.__version__}, nmflow "
        f"{nmflow.__version__}, {native.library().nmflow_compiler().decode()}\n"
        f"W {tuple(options.shape)}, delta {DELTA}; milliseconds of the fastest call of a burst, "
        f"median of {options.rounds} rounds (10 % to 90 %); 1.5 copies meet a goal too\n"
    )
    rows = []
    for name in options.dtypes:
        w = torch.randn(options.shape).to(DTYPES[name])
        for pattern in options.patterns:
            n, m = (int(part) for part in pattern.split(":"))
            if w.numel() % m:
                print(f"{name:9} {pattern:7} does not divide {tuple(options.shape)}")
                continue
            for row in compare(w, n, m, isas, options.rounds):
                row = {"dtype": name, "pattern": pattern, "goal": goal(n, m), **row}
                rows.append(row)
                print(
                    f"{name:9} {pattern:7} {row['way']:13} {row['median']:8.2f} "
                    f"({row['low']:.2f} to {row['high']:.2f})  {row['copies']:6.2f} x copy   "
                    f"goal {row['goal']} ms",
                    flush=True,
                )
    if options.csv and rows:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
