"""A recipe's weights written together, as on a GPU: on a CPU by Triton's interpreter."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import nmflow
from harness import Run, assert_near, parameters_of
from models import BY_ID as FAMILY
from models import MLP
from nmflow.errors import FlowError, StateError, WeightError
from nmflow.flow import edits, marks, plans, slots
from nmflow.masks import Launch
from settings import BY_ID, OPTIMIZERS, TOTAL

pytest.importorskip("triton", reason="Triton is not installed")

from nmflow.masks import triton_kernel

if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1, no GPU)", allow_module_level=True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each launch of masks took."""
    counts: list[int] = []
    call = Launch.__call__

    def told(self: Launch, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts.append(len(self.members))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(plans, "_waits", lambda w: w.dtype == torch.float32)
    monkeypatch.setattr(marks, "_together", lambda x: x.numel() > 0)
    monkeypatch.setattr(edits, "waits", lambda x: True)
    monkeypatch.setattr(Launch, "__call__", told)
    return counts


_CASES = ["sr-ste", "one-shot"]
_SLOW = [
    "mdgf-exp-masked",
    "settling",
    "mdgf-frozen",
    "hybrid-masked",
    "ste-interval",
    "sdgf-geometric",
    "sr-ste-interval",
    "gradual",
]
_SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in _SLOW if case in BY_ID]


@pytest.mark.parametrize("case", [*_CASES, *_SLOW])
def test_runs_equal_those_that_write_one_by_one(
    case: str, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks that are taken anew and masks that are held, gradients and the pull."""
    family = MLP
    together = Run(family, BY_ID[case], dtype=torch.float32)
    batches = family.batches(TOTAL, torch.float32)
    together.train(batches)
    assert max(launched) > 1
    monkeypatch.setattr(plans, "_waits", lambda w: False)
    alone = Run(family, BY_ID[case], dtype=torch.float32)
    alone.train(batches)
    assert_near(parameters_of(together.model), parameters_of(alone.model))
    assert together.flow.steps_done == alone.flow.steps_done == TOTAL


def test_a_weight_that_is_not_finite_is_still_named(launched: list[int]) -> None:
    family = FAMILY["encoder-layer"]
    run = Run(family, BY_ID["mdgf-linear"], dtype=torch.float32)
    x = family.batches(1, torch.float32)[0]
    run.step(x)
    for p in run.model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    run.optimizer.step()
    with pytest.raises(WeightError, match="holds a NaN or an infinity"):
        run.step(x)


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
    "case",
    ["ste", "sr-ste", "mdgf-exp", "mdgf-exp-masked", "sdgf-geometric", "settling", "one-shot"],
)
def test_launches_of_a_step_are_as_many_for_any_number_of_weights(
    case: str, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch from Python costs more than most weights do; so does a call of torch."""
    given = BY_ID[case]
    found: list[Counter[str]] = []
    for name in ("project_all", "hold_all", "fingerprints"):
        monkeypatch.setattr(triton_kernel, name, Nothing())  # whose own work is not counted
    for module in (marks, edits):
        monkeypatch.setattr(module, "fingerprint", lambda x: torch.zeros(len(x), dtype=torch.int64))
    monkeypatch.setattr(slots, "blank", lambda x: None)
    for depth in (2, 9):
        model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(depth)))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        nmflow.attach(model, optimizer, given.build(), "1:4", include="*", total_steps=12)
        for _ in range(9):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            with Launches() as counted:
                optimizer.step()
        found.append(counted.counts)
    assert found[0] == found[1]
    assert sum(found[0].values()) < 40


class Nothing:
    """A kernel that does nothing, but for fingerprints, which are all 0."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda prints_ptr=None, **_: prints_ptr is None or prints_ptr.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_fingerprints_are_those_of_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of words of eight bytes down to one, in several steps, of several lengths."""
    monkeypatch.setattr(marks, "_together", lambda x: x.numel() > 0)
    groups = [[(3, 8), (5, 8), (2, 3000), (2, 5, 8)], [(4, 7), (1, 1)], [(3, 2)]]
    for sizes in groups:
        xs = [(100 * torch.randn(size)).to(dtype) for size in sizes]
        xs += [torch.tensor(3).to(dtype)] if sizes[0] == (4, 7) else []
        prints = marks.prints_of(xs)
        assert prints is not None
        taken = prints()
        for x, rows in zip(xs, prints.rows, strict=True):
            assert torch.equal(taken[rows], marks.fingerprint(x))
    plain = torch.zeros(8, 8)
    assert marks.prints_of([plain, torch.zeros(9, 7)]) is None  # words of other sizes
    assert marks.prints_of([plain, plain.t()]) is None
    assert marks.prints_of([torch.zeros(0, 8)]) is None


@pytest.mark.parametrize("case", ["sr-ste", pytest.param("settling", marks=pytest.mark.slow)])
def test_shards_are_written_together(case: str, launched: list[int], tmp_path: Path) -> None:
    """FSDP2 of one process, beside a run that is not sharded."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = Run(MLP, BY_ID[case], dtype=torch.float32)
        run = Run(MLP, BY_ID[case], dtype=torch.float32, attached=False)
        fully_shard(run.model, mesh=init_device_mesh("cpu", (1,)))
        run.optimizer = OPTIMIZERS["adamw-foreach"](run.model.parameters())
        run.attach()
        launched.clear()
        for x in MLP.batches(5, torch.float32):
            run.step(x)
            plain.step(x)
        bundle = run.flow._steppers[0]._weights.together.bundle
        assert bundle is not None
        assert bundle.sharded
        whole = {n: p.full_tensor().detach() for n, p in run.model.named_parameters()}  # type: ignore[attr-defined]
        assert_near(whole, parameters_of(plain.model))
        dense = {n: w.full_tensor().detach() for n, w in run.flow.dense_weights().items()}  # type: ignore[attr-defined]
        assert_near(dense, {n: w.detach() for n, w in plain.flow.dense_weights().items()})
        param: Any = run.model.get_parameter("2.weight")
        param.to_local().data[0, 0] = 9.0
        run.step(MLP.batches(1, torch.float32)[0])
        with pytest.raises(StateError, match=r"2\.weight"):
            run.step(MLP.batches(1, torch.float32)[0])
    finally:
        dist.destroy_process_group()
