"""Plans on a GPU are those that were the fastest where they were timed; the page is of the same."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from nmflow.kernels import Call, gpu, gpu_cuts, gpu_panels
from nmflow.kernels.gpu_panels import Block
from nmflow.kernels.gpu_plan import Card
from nmflow.kernels.layout import Shape

ROOT = Path(__file__).resolve().parents[2]
MEASURED = [ROOT / f"docs/benchmarks/data/{name}.csv" for name in ("gpu-h200", "gpu-h200-2")]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_rows")


@pytest.mark.parametrize(("kinds", "count"), [(["decode", "search"], 66), (["int8"], 27)])
def test_the_plan_that_is_taken_is_the_best_that_was_timed(
    runs: Any, kinds: list[str], count: int
) -> None:
    """Within 5 %, for every product."""
    found = runs.timed(runs.read(*MEASURED), kinds)
    assert len(found) == count
    for (shape, tokens), cuts in found.items():
        plan = gpu_cuts.plan(shape, False, tokens, Card(), kinds == ["int8"])
        took = [us for cut, times in cuts.items() if runs.made(cut) == plan for us, _ in times]
        assert took, (shape, tokens)
        assert min(took) <= 1.05 * runs.best(cuts), (shape, tokens)


def test_a_run_without_a_choice_changes_no_plan(runs: Any) -> None:
    """Its card may be slower: the plan that it timed alone is judged in the run that had others."""
    rows = [row for row in runs.read(MEASURED[0]) if row["what"] in ("decode", "search")]
    again = [{**row, "run": "1", "packed_us": str(2 * float(row["packed_us"] or 0))}
             for row in rows if row["what"] == "decode" and row["taken"] == "True"]  # fmt: skip
    assert again
    assert runs.timed(rows) == runs.timed([*rows, *again])


def test_the_page_and_the_cuts_are_of_the_runs(runs: Any) -> None:
    page = importlib.import_module("gpu_page")
    assert page.main([*map(str, MEASURED), "--check"]) == 0


def test_plans_of_products_that_were_not_timed() -> None:
    """More blocks where a layer has fewer rows; another cut where a card has less memory."""
    half, whole = (
        gpu_cuts.plan(Shape.of(out, 8192, "1:4"), False, 16, Card()) for out in (14336, 28672)
    )
    assert half is not None
    assert whole is not None
    assert half.grid[0] * half.grid[1] == whole.grid[0] * whole.grid[1]
    small = gpu_cuts.plan(Shape.of(28672, 8192, "1:4"), False, 16, Card(84, 101_376))
    assert small is not None
    assert small.shared <= 101_376
    assert small.grid[1] > whole.grid[1]


def test_the_block_of_many_tokens_is_the_best_that_was_timed(runs: Any) -> None:
    """Of warp groups and of Triton, within 6 %, for every product of either run."""
    for run in MEASURED:
        rows = [row for row in runs.read(run) if row["what"] == "panels-search"]
        found = runs.decisive(rows)
        assert len(found) == 7
        for key, some in found.items():
            took = {row["plan"]: float(row["packed_us"]) for row in some}
            assert took[str(gpu_panels.group(*key))] <= 1.06 * min(took.values())
            triton = [us for plan, us in took.items() if plan.startswith("Block")]
            assert took[str(gpu_panels.block(*key))] <= 1.06 * min(triton)
    assert gpu_panels.block(Shape.of(768, 3072, "1:16@64"), 256) == Block(64, 32, 128, 4, 4)


def test_panels_of_many_rows_leave_fragments_where_those_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 256 tokens fragments took twice the time of cuBLAS."""
    monkeypatch.setattr(gpu_panels, "serves", lambda shape: shape.panel % 64 == 0)
    for spec, tokens, name in [
        ("1:16@64", 64, "panel fragments"),
        ("1:16@64", 65, "panels on gathered"),
        ("1:16@16", 256, "panel fragments"),
        ("1:16@16", 257, "rebuild"),
    ]:
        call = Call(Shape.of(64, 64, spec), torch.bfloat16, "cuda", tokens)
        assert gpu.kernel(call).startswith(name)
