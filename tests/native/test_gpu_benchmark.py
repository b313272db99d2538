"""`benchmarks/gpu.py` on an emulated GPU: a part that fails on a card is time that is lost."""

from __future__ import annotations

import argparse
import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import emulated_gpu
from emulated_gpu import Emulated
from nmflow.kernels import gpu_driver
from nmflow.kernels.gpu_plan import Card
from nmflow.kernels.layout import Shape
from nmflow.packed import measure
from nmflow.packed.measure import Timing

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(emulated_gpu.COMPILER is None, reason="no g++ to emulate with")


class Bench:
    """The modules of the benchmark, on an emulated device, with a clock that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for folder in ("benchmarks", "scripts"):
            monkeypatch.syspath_prepend(str(ROOT / folder))
        self._patch, emulated = monkeypatch, Emulated()
        emulated.architecture = 90  # type: ignore[attr-defined]
        self.harness = self.module("_gpu")
        monkeypatch.setattr(gpu_driver, "driver", lambda index: emulated)
        monkeypatch.setattr(self.harness, "DEVICE", "cpu")
        monkeypatch.setattr(self.harness, "time_on_gpu", once)
        for place in (measure, self.harness):
            monkeypatch.setattr(place, "copies_past_cache", lambda nbytes, device: 2)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def module(self, name: str) -> Any:
        return importlib.import_module(name)

    def small(self, name: str, **values: Any) -> None:
        for key, value in values.items():
            self._patch.setattr(self.module(name), key, value)

    def run(self, file: Path, *parts: str) -> list[dict[str, str]]:
        """The rows that are read from the file of a run, in which no part raised."""
        with torch.no_grad():
            assert self.module("gpu").measure([*parts], False, 1e6, file) == 0
        return list(csv.DictReader(file.open(newline="")))


def once(ways: Any, rounds: int = 20) -> dict[str, Timing]:
    for calls in ways.values():
        calls[0]()
    return {name: Timing(2.0, 1.0, 3.0, rounds) for name in ways}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_every_part_is_there_and_its_files_are_short(bench: Bench) -> None:
    gpu = bench.module("gpu")
    assert set(gpu.TABLES) == set(gpu.PARTS) - {"check"}
    assert gpu.order(["steps", "decode", "panels"], True) == [
        ("decode", False), ("panels", False), ("panels", True), ("decode", True), ("steps", False),
    ]  # fmt: skip
    for file in (ROOT / "benchmarks").glob("*gpu*.py"):
        assert len(file.read_text().splitlines()) < 300, file


def test_what_is_wrong_or_does_not_fit_is_a_row(bench: Bench) -> None:
    tried = bench.harness.tried
    for error in (0.02, float("nan"), float("inf")):
        assert tried({}, lambda error=error: {"error": error, "ratio": 9.0})["failed"] == "wrong"
    assert "failed" not in tried({}, lambda: {"error": None, "ratio": 9.0})

    def too_large() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert "out of memory" in tried({"plan": "a"}, too_large)["failed"]


def test_kernels_that_two_processes_compile_at_once(bench: Bench, tmp_path: Path) -> None:
    """Each takes what it made itself: the other's may be half written."""
    harness, plan = bench.harness, bench.module("_gpu_decode")
    kernel = plan.in_order(Shape.of(28672, 8192, "1:8"), 64, harness.card())[0].kernel
    before = gpu_driver.compile_kernel

    def made(kernel: Any, architecture: int) -> bytes:
        (tmp_path / f"{harness._place(kernel, architecture).name}.other").write_bytes(b"ha")
        return b"whole"

    gpu_driver.compile_kernel = made
    try:
        harness.keep_kernels(tmp_path)
        for _ in range(2):
            assert gpu_driver.compile_kernel(kernel, 90) == b"whole"
    finally:
        gpu_driver.compile_kernel, harness._FOLDER[:] = before, []


def test_a_page_of_a_product_that_was_only_searched(bench: Bench) -> None:
    """Of which no table has what was taken: `ready` times products that `decode` does not."""
    shape, tokens = Shape.of(28672, 8192, "1:4"), 32
    plans = bench.module("_gpu_decode").in_order(shape, tokens, Card())[:2]
    row = {"what": "search", "out": "28672", "inputs": "8192", "tokens": "32", "pattern": "1:4",
           "dense_us": "9.0", "error": "0.001", "failed": ""}  # fmt: skip
    took = ("True", "6.0", "1.5"), ("False", "3.0", "3.0")
    rows = [
        {**row, "plan": str(plan.told()), "taken": taken, "packed_us": us, "ratio": ratio}
        for plan, (taken, us, ratio) in zip(plans, took, strict=True)
    ]
    page = bench.module("gpu_tables")
    (line,) = lines_of(next(page.tables([*measured(), *rows])), "| (28672, 8192) | 32 | 1:4 |")
    assert "warp groups, x in order | 1.50 | **3.00** | 3.0 |" in line
    (line,) = lines_of(next(page.tables([*measured(), rows[1]])), "| (28672, 8192) | 32 | 1:4 |")
    assert "| – | **3.00** |" in line


def lines_of(table: str, start: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith(start)]


@needs_compiler
@pytest.mark.slow
def test_few_tokens(bench: Bench, tmp_path: Path) -> None:
    bench.small("_gpu_decode", READY=[(8, 1, 1, 1, 3)],
                points_in_order=lambda: iter([((128, 512), 20, ["1:8"])]))  # fmt: skip
    bench.small("_gpu_int8", LAYERS=[(64, 256)], TOKENS=[1], PATTERNS=["1:8"],
                LOOKUPS=[(4, 1, 1, 1, 4)])  # fmt: skip
    rows = bench.run(tmp_path / "rows.csv", "ready", "int8")
    assert not [row for row in rows if row["failed"]]
    kinds = [(row["what"], row["taken"]) for row in rows]
    assert kinds[:3] == [("dense", ""), ("search", "True"), ("search", "False")]
    assert kinds[3] == ("int8", "True")
    (line,) = lines_of(next(bench.module("gpu_page").tables([*rows, *measured()])), "| (128, 512)")
    assert " | 1.00 | **1.00** | 2.0 | " in line


def measured() -> list[dict[str, str]]:
    """The rows of the first run that the page is of."""
    file = ROOT / "docs/benchmarks/data/gpu-h200.csv"
    return list(csv.DictReader(file.open(newline="")))


@needs_compiler
@pytest.mark.slow
def test_the_other_parts(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But a network of 7 billion weights, and a copy of 1 GiB."""
    pytest.importorskip("triton", reason="Triton is not installed")
    bench.small("_gpu_decode", DECODE=[([(128, 512)], ["1:16", "1:16@16"], [1, 9])])
    bench.small("_gpu_panels", MANY=[((128, 256), 130, "1:16@64"), ((128, 256), 130, "1:8")])
    bench.small("_gpu_steps", LAYERS=[((128, 256), 130, "1:16@128")],
                NETWORKS={"tiny": (128, 256, 2, 2, 16)})  # fmt: skip
    overhead = bench.module("overhead")
    whole = overhead.measure

    def smaller(tokens: int, args: argparse.Namespace) -> Any:
        few = {"layers": 1, "rounds": 2, "graphed": False}
        return whole(16, argparse.Namespace(**{**vars(args), **few}))

    monkeypatch.setattr(overhead, "measure", smaller)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    rows = bench.run(tmp_path / "rows.csv", "decode", "panels", "check", "train", "steps")
    # The interpreter multiplies bfloat16 wrongly.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.half)
    rows += bench.run(tmp_path / "three.csv", "three")
    found = {row["what"] for row in rows}
    assert found == {"dense", "decode", "panels", "check", "check int8", "train", "steps", "three"}
    told = {"train", "steps"}  # whose last column says more
    assert not [row for row in rows if row["failed"] and row["what"] not in told]
    plans = [row["plan"] for row in rows if row["what"] == "three"]
    assert plans[:5] == ["pack", "forward", "input gradient", "weight gradient", "all"]
    ways = 2 + len(overhead.RECIPES)  # without a graph, as here, one that cannot be in one too
    assert len([row for row in rows if "CUDA graph" in row["plan"]]) == ways


class Event:
    """Of a device that takes no time."""

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1.0
