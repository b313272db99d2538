"""Training steps that are captured and replayed: without a GPU, by a recorder of torch's calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from harness import Run, assert_near, assert_same, dense_of, parameters_of
from models import MLP, loss_of
from nmflow.errors import FlowError, StateError, WeightError
from nmflow.flow import edits, marks, plans
from nmflow.flow.graphs import GraphedStep
from settings import BY_ID, TOTAL

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1, no GPU)", allow_module_level=True)

from nmflow.masks import triton_kernel

KERNELS = ("project_all", "hold_all", "fingerprints")


class Recorder(TorchDispatchMode):
    """Captures what torch and Triton are asked for, as a CUDA graph does: by address, once for all.

    A capture runs nothing. Here it does, and what it wrote is put back.
    """

    def __init__(self, state: Callable[[], list[Tensor]]) -> None:
        super().__init__()
        self._state, self._calls = state, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func not in (torch.ops.aten._local_scalar_dense.default,), "read on the host"
        # Where memory lies now: parameters trade theirs in the course of a step.
        here = tree_map_only(Tensor, lambda x: x.data, (args, kwargs))
        out = func(*args, **kwargs)
        self._calls.append((func, *here, tree_map_only(Tensor, lambda x: x.data, out)))
        return out

    def launched(self, kernel: Any, grid: Any, kwargs: dict[str, Any]) -> None:
        """A launch of Triton's, among torch's calls."""
        self._calls.append((lambda: kernel[grid](**kwargs), (), {}, None))

    def warm(self, step: Callable[[], Any]) -> Any:
        return step()

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        self._calls = calls = []
        before = [(x, x.clone()) for x in self._state()]
        _ACTIVE.append(self)
        try:
            with self:
                out = step()
        finally:
            _ACTIVE.clear()
            with torch.no_grad():
                for x, was in before:
                    x.copy_(was)
        return lambda: _replay(calls), out


_ACTIVE: list[Recorder] = []


@torch.no_grad()
def _replay(calls: list[Any]) -> None:
    for func, args, kwargs, out in calls:
        found = func(*args, **kwargs)
        known = [out] if isinstance(out, Tensor) else out
        again = [found] if isinstance(found, Tensor) else found
        if not isinstance(known, list | tuple):
            continue
        for a, b in zip(known, again, strict=True):
            if isinstance(a, Tensor) and a.data_ptr() != b.data_ptr():
                a.copy_(b)


class Kernel:
    """A Triton kernel whose launches a recorder sees: only of what was compiled before."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self._compiled = kernel, set()

    def _variant(self, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What Triton compiles once for."""

        def kind(name: str, x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.dtype, x.data_ptr() % 16 == 0
            special = (x == 1, x % 16 == 0) if isinstance(x, int) else None
            return x if name.isupper() or x is None else (type(x), special)

        return tuple((name, kind(name, x)) for name, x in kwargs.items())

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(**kwargs: Any) -> None:
            active = _ACTIVE[:]
            _ACTIVE.clear()
            variant = self._variant(kwargs)
            assert not active or variant in self._compiled, "compiled in a capture"
            self._compiled.add(variant)
            with _disable_current_modes():
                self._kernel[grid](**kwargs)
            if active:
                active[0].launched(self._kernel, grid, kwargs)
                _ACTIVE[:] = active

        return run


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_waits", lambda w: w.dtype == torch.float32)
    monkeypatch.setattr(marks, "_together", lambda x: x.numel() > 0)
    monkeypatch.setattr(edits, "waits", lambda x: True)
    for name in KERNELS:
        monkeypatch.setattr(triton_kernel, name, Kernel(getattr(triton_kernel, name)))


class Momentum(torch.optim.Optimizer):
    """Steps on the device alone, as a capturable optimizer does."""

    def __init__(self, params: Any, lr: float | Tensor) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    moved = state.setdefault("moved", torch.zeros_like(p))
                    moved.mul_(0.9).add_(p.grad)
                    p.sub_(moved * group["lr"])


class Both:
    """A run that is graphed, and one that is not."""

    def __init__(self, case: str, lr: float | Tensor | None = None, **more: Any) -> None:
        def make(params: Any) -> torch.optim.Optimizer:
            return Momentum(params, torch.tensor(0.05) if lr is None else lr)

        self.plain, self.run = (
            Run(MLP, BY_ID[case], make, dtype=torch.float32, **more) for _ in range(2)
        )
        self.x = torch.empty_like(MLP.batches(1, torch.float32)[0])
        parts = [s.graphs for s in self.run.flow._steppers]
        self.recorder = Recorder(self._state)
        self.step = GraphedStep(parts, self._train, self.recorder)

    def _train(self) -> Tensor:
        self.run.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.run.model(self.x))
        loss.backward()
        self.run.optimizer.step()
        return loss.detach()

    def _state(self) -> list[Tensor]:
        own = [p.data for p in self.run.model.parameters()]
        state = [x for s in self.run.optimizer.state.values() for x in s.values()]
        bundle = self.run.flow._steppers[0]._weights.together.bundle
        return [*own, *filter(lambda x: isinstance(x, Tensor), state), bundle._taken]

    def train(self, batches: list[Tensor], check: bool = True) -> list[str]:
        """Why each step was no replay."""
        said = []
        for batch in batches:
            self.x.copy_(batch)
            self.step()
            self.plain.step(batch)
            said.append(self.step.why)
            if check:
                self.same()
        return said

    def same(self) -> None:
        assert self.run.flow.steps_done == self.plain.flow.steps_done
        assert_near(parameters_of(self.run.model), parameters_of(self.plain.model))
        assert_near(dense_of(self.run), dense_of(self.plain))


_SLOW = ["mdgf-exp-masked", "sr-ste", "one-shot", "mdgf-frozen", "ste-interval"]
CASES = ["settling", *(pytest.param(case, marks=pytest.mark.slow) for case in _SLOW)]


@pytest.mark.parametrize("case", CASES)
def test_replays_are_steps(case: str) -> None:
    both = Both(case)
    said = both.train(MLP.batches(TOTAL, torch.float32))
    assert said.count("") >= TOTAL // 3, said
    both.run.flow.finalize()


@pytest.mark.slow
def test_what_a_graph_holds_is_captured_anew() -> None:
    """A phase that begins, and a state that is loaded; an observer's step is no replay."""
    both = Both("settling")
    seen: list[int] = []
    both.run.flow.observe(lambda k, views: seen.append(k), every=5)
    said = both.train(MLP.batches(TOTAL, torch.float32))
    assert seen == list(range(0, TOTAL, 5))
    assert [k for k, why in enumerate(said) if "observer" in why] == seen[1:]
    assert "first step" in said[0]
    assert both.step.captures


@pytest.mark.parametrize("moved", [False, True])
def test_a_learning_rate_that_moves(moved: bool) -> None:
    """In a tensor it is read by each replay; a number that moves is refused."""
    both = Both("settling", 0.05 if moved else torch.tensor(0.05))
    both.train(MLP.batches(6, torch.float32), check=False)
    captures = both.step.captures
    for run in (both.plain, both.run):
        for group in run.optimizer.param_groups:
            if moved:
                group["lr"] = 0.01
            else:
                group["lr"].fill_(0.01)
    batches = MLP.batches(10, torch.float32)[6:]
    if moved:
        with pytest.raises(FlowError, match="lr in a tensor"):
            both.step()
    else:
        both.train(batches)
        assert both.step.captures == captures


def test_writes_by_others_are_told_at_once_or_a_step_late() -> None:
    both = Both("mdgf-exp-masked")
    batches = MLP.batches(TOTAL, torch.float32)
    assert both.train(batches[:5])[-1] == ""
    with torch.no_grad():
        both.run.model.get_parameter("0.weight")[0, 0] = 9.0
    with pytest.raises(StateError, match=r"0\.weight"):
        both.step()
    both.run.flow.sync()
    both.train(batches[5:7], check=False)
    both.run.model.get_parameter("2.weight").data[0, 0] = 9.0
    both.step()
    with pytest.raises(StateError, match=r"2\.weight.*dense\(\)"):
        both.step()
    both.step()


def test_a_write_before_a_capture_is_told() -> None:
    """By whichever call meets it; what is told leaves nothing half-begun."""
    both = Both("mdgf-exp-masked")
    batches = MLP.batches(6, torch.float32)
    both.train(batches[:1])
    for x in batches[1:4]:
        both.x.copy_(x)
        with torch.no_grad():
            both.run.model.get_parameter("0.weight")[0, 0] = 9.0
        with pytest.raises(StateError, match=r"0\.weight"):
            both.step()
        both.run.flow.sync()
        both.step()
    assert both.run.flow.steps_done == 4
    for x in batches[4:]:
        both.x.copy_(x)
        both.step()
    assert both.step.captures


def test_weights_that_are_not_finite_are_named_a_step_later() -> None:
    both = Both("mdgf-exp-masked")
    both.train(MLP.batches(5, torch.float32))
    both.x.fill_(float("inf"))
    both.step()
    with pytest.raises(WeightError, match="holds a NaN or an infinity"):
        both.step()


def test_a_capture_that_fails_leaves_everything() -> None:
    both = Both("settling")
    batches = MLP.batches(TOTAL, torch.float32)
    both.train(batches[:2])
    both.step._recorder = Broken(both)
    for _ in range(3):
        k, dense = both.run.flow.steps_done, dense_of(both.run)
        if both.step._last is None:
            both.train(batches[k : k + 1])
            continue
        both.x.copy_(batches[k])
        key = both.step._last
        if tuple(part.key() for part in both.step._parts) != key:
            both.train(batches[k : k + 1])
            continue
        with pytest.raises(RuntimeError, match="broken"):
            both.step()
        assert both.run.flow.steps_done == k
        assert_same(dense_of(both.run), dense)
        both.same()
    both.step._recorder = both.recorder
    both.train(batches[both.run.flow.steps_done :])
    assert both.step.captures


class Broken:
    """Captures that end in the middle of the optimizer's step."""

    def __init__(self, both: Both) -> None:
        self._both, self.warm = both, both.recorder.warm

    def capture(self, step: Callable[[], Any]) -> Any:
        def broken(optimizer: Any, *_: Any) -> None:
            raise RuntimeError("broken")

        handle = self._both.run.optimizer.register_step_pre_hook(broken)
        try:
            return self._both.recorder.capture(step)
        finally:
            handle.remove()


def test_what_cannot_be_captured_is_refused_or_runs_as_it_is() -> None:
    both = Both("settling")
    with pytest.raises(FlowError, match="graphed\\(\\) needs CUDA"):
        both.run.flow.graphed(both._train)
    both.run.optimizer.param_groups[0]["capturable"] = False
    with pytest.raises(FlowError, match="capturable=True"):
        GraphedStep(both.step._parts, both._train, both.step._recorder)
    panels = Run(MLP, BY_ID["settling"], dtype=torch.float64, make=lambda p: Momentum(p, 0.1))
    step = GraphedStep(
        [s.graphs for s in panels.flow._steppers],
        lambda: panels.step(MLP.batches(1)[0]),
        both.step._recorder,
    )
    for _ in range(4):
        step()
    assert "share launches" in step.why
    assert (step.captures, panels.flow.steps_done) == (0, 4)
