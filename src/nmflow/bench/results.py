"""What `bench` gives back: rows, shares, a table, CSV; and the machine they are of."""

from __future__ import annotations

import csv
import os
import platform
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from nmflow import native
from nmflow.errors import CompressError
from nmflow.packed.measure import Timing
from nmflow.text_table import table

DENSE = {"F.linear", "oneDNN", "oneDNN packed", "dense", "dense, best"}


@dataclass(frozen=True)
class Measured:
    """One way of one computation.

    Attributes:
        level: `"layer"`, `"network"`, or `"decoding"` (a token of a text, batch 1).
        name: the layer's first name, or the network's.
        shape: `(out, in)` as text; of a network empty.
        pattern: the pattern, or patterns.
        dtype: the dtype of weights and inputs.
        tokens: rows of the input; of a network the most that a layer meets.
        way: how it was computed.
        kernel: for packed, the kernels that served it.
        median_us: microseconds, the median of `runs`.
        q10_us: the first decile; of decoding the fastest round.
        q90_us: the ninth decile; of decoding the slowest round.
        runs: how many.
        speedup: median of the best dense way of the same dtype in the same run, over this one's
            (for rivals of a float32 network: of its best dense way in torch).
        threads: torch's number of threads.
        cpu: the processor and the instruction set of the kernels.
        versions: nmflow, torch and Python.
    """

    level: str
    name: str
    shape: str
    pattern: str
    dtype: str
    tokens: int
    way: str
    kernel: str
    median_us: float
    q10_us: float
    q90_us: float
    runs: int
    speedup: float
    threads: int
    cpu: str
    versions: str


@dataclass
class Bench:
    """What `bench` measured: rows, and where the time of a network goes.

    Attributes:
        rows: one per way.
        shares: (way, dtype) of a network to parts and their share of its time.
        skipped: rivals that did not run, and why.
    """

    rows: list[Measured] = field(default_factory=list)
    shares: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = ["what", "pattern", "dtype", "T", "way", "median µs", "10 %", "90 %", "speedup"]
        body = [
            [
                row.name + (f" ({row.shape})" if row.shape else ""),
                row.pattern,
                row.dtype,
                str(row.tokens),
                row.way + _more(row),
                f"{row.median_us:,.1f}",
                f"{row.q10_us:,.1f}",
                f"{row.q90_us:,.1f}",
                f"{row.speedup:.2f}x",
            ]
            for row in self.rows
        ]
        lines = [table([head, *body], right=[3, 5, 6, 7, 8])]
        for (way, dtype), parts in self.shares.items():
            said = ", ".join(f"{part} {share:.0%}" for part, share in parts.items())
            lines.append(f"time of the network, {way}, {dtype}: {said}")
        lines += [f"not measured, {rival}: {why}" for rival, why in self.skipped.items()]
        if self.rows:
            one = self.rows[0]
            lines.append(f"{one.threads} threads, {one.cpu}, {one.versions}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The rows, the shares and what was skipped, as plain types for JSON."""
        shares = [{"way": w, "dtype": d, "shares": parts} for (w, d), parts in self.shares.items()]
        return {
            "rows": [asdict(row) for row in self.rows],
            "shares": shares,
            "skipped": self.skipped,
        }

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a row per way; raises `CompressError` where the file cannot be written."""
        names = [f.name for f in fields(Measured)]
        try:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(asdict(row) for row in self.rows)
        except OSError as error:
            raise CompressError(f"path '{path}' cannot be written: {error.strerror}") from error


def _more(row: Measured) -> str:
    """What the table says behind a way."""
    if row.level == "decoding":
        return f": {1e6 / row.median_us:.1f} tokens/s"
    return f": {row.kernel}" if row.kernel else ""


def rows_of(
    took: dict[str, Timing], level: str, name: str, shape: str, pattern: str, dtype: str,
    tokens: int, kernels: dict[str, str],
) -> list[Measured]:  # fmt: skip
    """A row per way of one computation, with the speedup over the best dense one."""
    best = min(time.median for way, time in took.items() if way in DENSE)
    threads, cpu, versions = torch.get_num_threads(), cpu_name(), version_text()
    return [
        Measured(
            level, name, shape, pattern, dtype, tokens, way, kernels.get(way, ""), time.median,
            time.q10, time.q90, time.runs, best / time.median, threads, cpu, versions,
        )
        for way, time in took.items()
    ]  # fmt: skip


def cpu_name() -> str:
    """The processor, and the instruction set that the compiled kernels use on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    isa = f"{native.isa()} kernels" if native.available() else "no compiled kernels"
    return f"{name}, {isa}"


def version_text() -> str:
    """Versions of nmflow, torch and Python."""
    from nmflow.version import __version__

    return f"nmflow {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
