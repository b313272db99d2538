"""Timing that several benchmarks share: turns, rotated weights, and rows that name their facts.

How it times. The candidates of a row take turns, so that a slow moment of the machine meets them
all. A sample is one turn: as many calls as use every copy of the weight and last 200 microseconds
or more, divided by their number. A row has the median and the 10 % and 90 % quantiles of its
samples.

Caches. With `rotate` (the default) each call uses the next of several copies of its weight, 256 MB
in all (32 MB from 64 tokens on), and by a candidate's next turn the others have used several times
as much: weights come from memory, dense and packed alike, as in a network of many layers. With
`hot` there is one copy, which comes from whatever cache holds it. Inputs and results are as warm as
the call before left them, for both.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nmflow import native

# Few tokens: the weight is what takes time, and the third-level caches of servers are large.
ROTATED_BYTES = {"few tokens": 256 << 20, "many tokens": 32 << 20}
MOST_COPIES = 1024
SAMPLE_SECONDS = 200e-6


def copies_of(nbytes: int, cache: str, tokens: int = 1) -> int:
    """How many copies of a weight of `nbytes` a row rotates through."""
    total = ROTATED_BYTES["few tokens" if tokens < 64 else "many tokens"]
    return 1 if cache == "hot" else max(2, min(MOST_COPIES, -(-total // nbytes)))


class rotate:
    """One call that runs the next of `calls` each time."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.calls, self.at = calls, 0
        # Whatever a first call prepares (checking a weight, binding it) is not what is timed.
        for call in calls:
            call()

    def __call__(self) -> object:
        at = self.at
        self.at = at + 1 if at + 1 < len(self.calls) else 0
        return self.calls[at]()


class Quantiles:
    """Median and quantiles of samples, in seconds."""

    def __init__(self, samples: list[float]) -> None:
        ordered = sorted(samples)
        self.median = statistics.median(ordered)
        self.low = ordered[int(0.1 * (len(ordered) - 1))]
        self.high = ordered[int(0.9 * (len(ordered) - 1))]
        self.samples = len(ordered)


def interleaved(
    calls: dict[str, Callable[[], object]], seconds: float = 0.3, least: int = 11
) -> dict[str, Quantiles]:
    """Time the calls in turns, about `seconds` each and at least `least` samples each."""
    clock = time.perf_counter
    inner = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = clock()
        call()
        turn = int(SAMPLE_SECONDS / max(clock() - start, 1e-7))
        inner[name] = max(1, turn, len(call.calls) if isinstance(call, rotate) else 1)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = clock()
    while len(samples[next(iter(calls))]) < least or clock() - begin < seconds * len(calls):
        for name, call in calls.items():
            count = inner[name]
            start = clock()
            for _ in range(count):
                call()
            samples[name].append((clock() - start) / count)
    return {name: Quantiles(values) for name, values in samples.items()}


def cpu_name() -> str:
    """The CPU's name and, where the system tells, its family and model."""
    facts: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", platform.processor() or platform.machine())
    more = ", ".join(f"{k} {facts[k]}" for k in ("cpu family", "model") if k in facts)
    return f"{name} ({more})" if more else name


def facts() -> dict[str, str | int]:
    """What every row says of where it was measured."""
    there = native.available()
    return {
        "cpu": cpu_name(),
        "features": " ".join(native.features()) if there else "",
        "isa": native.isa() if there else "none: plain torch",
        "dense_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "all"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiler": native.library().nmflow_compiler().decode() if there else "none",
        "python": platform.python_version(),
    }


def write_csv(path: str, rows: list[dict[str, object]]) -> None:
    """Write rows with their facts; the columns are those of the first row."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
