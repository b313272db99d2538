"""A recipe's weights written together, as on a GPU: on a CPU by Triton's interpreter."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nmflow
from harness import Run, assert_near, parameters_of
from models import BY_ID as FAMILY
from nmflow import masks
from nmflow.errors import FlowError, WeightError
from nmflow.flow import edits, marks, slot_masks, weights
from nmflow.masks import triton as gpu
from settings import BY_ID

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1, no GPU)", allow_module_level=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each call of `project_all` took."""
    counts: list[int] = []

    def project_all(jobs: Any) -> list[torch.Tensor]:
        counts.append(len(jobs))
        return gpu.project_all(jobs)

    monkeypatch.setattr(slot_masks, "_waits", lambda w: w.dtype == torch.float32)
    monkeypatch.setattr(marks, "_together", lambda x: x.numel() > 0)
    monkeypatch.setattr(weights, "project_all", project_all)
    return counts


_SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("settling", "hybrid-masked")]


@pytest.mark.parametrize("case", ["sr-ste", "mdgf-exp-masked", "one-shot", *_SLOW])
def test_runs_equal_those_that_write_one_by_one(
    case: str, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILY["encoder-layer"]
    together = Run(family, BY_ID[case], dtype=torch.float32)
    batches = family.batches(4, torch.float32)
    together.train(batches)
    assert max(launches) > 1
    monkeypatch.setattr(slot_masks, "_waits", lambda w: False)
    alone = Run(family, BY_ID[case], dtype=torch.float32)
    alone.train(batches)
    assert_near(parameters_of(together.model), parameters_of(alone.model))
    assert together.flow.steps_done == alone.flow.steps_done == 4


def test_a_weight_that_is_not_finite_is_still_named(launches: list[int]) -> None:
    family = FAMILY["encoder-layer"]
    run = Run(family, BY_ID["mdgf-linear"], dtype=torch.float32)
    x = family.batches(1, torch.float32)[0]
    run.step(x)
    for p in run.model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    run.optimizer.step()
    with pytest.raises(WeightError, match="holds a NaN or an infinity"):
        run.step(x)
    assert masks.Job is gpu.Job


def test_a_step_in_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays would run without the hooks."""
    run = Run(FAMILY["encoder-layer"], BY_ID["settling"], dtype=torch.float32)
    before = parameters_of(run.model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(FlowError, match="captured in a CUDA graph"):
        run.optimizer.step()
    monkeypatch.undo()
    assert run.flow.steps_done == 0
    assert_near(parameters_of(run.model), before)
    run.step(run.family.batches(1, torch.float32)[0])
    assert run.flow.steps_done == 1


class Launches(TorchDispatchMode):
    """Counts what torch is asked for, without what only looks at a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func is torch.ops.aten.detach.default):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case", ["ste", "sr-ste", "mdgf-exp", "mdgf-exp-masked", "sdgf-geometric", "settling"]
)
def test_launches_of_a_step_are_as_many_for_any_number_of_weights(
    case: str, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch from Python costs more than most weights do; so does a call of torch."""

    def prints(xs: Any, odd: torch.Tensor, words: torch.dtype) -> Any:
        counts = [len(x) for x in xs]
        return torch.zeros(sum(counts), dtype=torch.int64), counts

    def project_all(jobs: Any) -> list[torch.Tensor]:
        return [torch.ones((), dtype=torch.bool)] if jobs else []

    monkeypatch.setattr(gpu, "fingerprints", prints)  # the kernels' own work is not counted
    monkeypatch.setattr(weights, "project_all", project_all)
    monkeypatch.setattr(edits, "waits", lambda x: True)
    given = BY_ID[case]
    found: list[Counter[str]] = []
    for depth in (2, 9):
        model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(depth)))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        nmflow.attach(model, optimizer, given.build(), "1:4", include="*", total_steps=100)
        for _ in range(8):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            with Launches() as counted:
                optimizer.step()
        found.append(counted.counts)
    assert found[0] == found[1]
    assert sum(found[0].values()) < 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_fingerprints_are_those_of_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of words of eight bytes down to one, in several steps, not in order, and none."""
    monkeypatch.setattr(marks, "_together", lambda x: x.numel() > 0)
    sizes = [(3, 8), (5, 8), (2, 3000), (4, 7), (1, 1), (0, 4), (3, 8), (2, 5, 3)]
    xs = [(100 * torch.randn(size)).to(dtype) for size in sizes]
    xs += [xs[2].t(), torch.tensor(3).to(dtype)]
    for known, x in zip(marks.fingerprints(xs), xs, strict=True):
        assert torch.equal(known, marks.fingerprint(x))
