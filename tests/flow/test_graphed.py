"""Training steps that are captured and replayed: without a GPU, by a recorder of torch's calls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import Run, assert_near, assert_same, dense_of, parameters_of
from models import MLP, loss_of
from nmflow.errors import FlowError, StateError, WeightError
from nmflow.flow import edits, marks, plans
from nmflow.flow.graphs import CudaRecorder, GraphedStep
from settings import BY_ID, TOTAL

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1, no GPU)", allow_module_level=True)

from nmflow.masks import launches, triton_kernel
from recorded_graphs import KERNELS, Kernel, Recorder


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_waits", lambda w: w.dtype == torch.float32)
    monkeypatch.setattr(marks, "_together", lambda x: x.numel() > 0)
    monkeypatch.setattr(edits, "waits", lambda x: True)
    # In a capture tables are sent to another place.
    monkeypatch.setattr(launches, "_far", lambda device: bool(launches._captures))
    for name in KERNELS:
        monkeypatch.setattr(triton_kernel, name, Kernel(getattr(triton_kernel, name)))


def _fill() -> None:
    for there, t in launches._captures[0].late:
        there.copy_(t)


class Momentum(torch.optim.Optimizer):
    """Steps on the device alone, as a capturable optimizer does."""

    def __init__(self, params: Any, lr: float | Tensor, maximize: bool = False) -> None:
        super().__init__(params, {"lr": lr, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    moved = state.setdefault("moved", torch.zeros_like(p))
                    moved.mul_(0.9).add_(-p.grad if group["maximize"] else p.grad)
                    p.sub_(moved * group["lr"])


class Both:
    """A run that is graphed, and one that is not."""

    def __init__(
        self, case: str, lr: float | Tensor | None = None, make: Any = None, **more: Any
    ) -> None:
        def usual(params: Any) -> torch.optim.Optimizer:
            return Momentum(params, torch.tensor(0.05) if lr is None else lr)

        make = make or usual
        self.plain, self.run = (
            Run(MLP, BY_ID[case], make, dtype=torch.float32, **more) for _ in range(2)
        )
        self.x = torch.empty_like(MLP.batches(1, torch.float32)[0])
        parts = [s.graphs for s in self.run.flow._steppers]
        self.recorder = Recorder(self._state, _fill)
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


def _maximizes(params: Any) -> torch.optim.Optimizer:
    return Momentum(params, torch.tensor(0.05), maximize=True)


def _groups(params: Any) -> torch.optim.Optimizer:
    """A group, and a rate in a tensor of its own, for each."""
    return Momentum([{"params": [p], "lr": torch.tensor(0.05)} for p in params], 0.0)


@pytest.mark.parametrize(
    ("case", "make"),
    [
        ("mdgf-linear-masked", _maximizes),
        pytest.param("mdgf-exp-masked", _groups, marks=pytest.mark.slow),
        ("settling-interval", _groups),
    ],
)
def test_a_replay_takes_its_own_delta(case: str, make: Any) -> None:
    """Also where a rule is said uphill, and where weights are drawn one by one, by masks held."""
    both = Both(case, make=make)
    said = both.train(MLP.batches(TOTAL, torch.float32))
    assert said.count("") >= 2, said


def test_a_gradient_that_lies_in_another_order_is_refused_in_a_capture() -> None:
    """Its rule would have δ of the capture in every replay."""
    both = Both("mdgf-linear-masked")
    weight = both.run.model.get_parameter("0.weight")

    def turn(p: Tensor) -> None:
        assert p.grad is not None
        p.grad = p.grad.t().contiguous().t()

    weight.register_post_accumulate_grad_hook(turn)
    batches = MLP.batches(TOTAL, torch.float32)
    with pytest.raises(FlowError, match=r"'0\.weight' has a gradient whose memory is ordered"):
        both.train(batches)
    both.same()


def test_more_tables_than_there_is_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_ROOM", 64)
    both = Both("mdgf-exp-masked")
    with pytest.raises(FlowError, match="tables of a captured step take more than"):
        both.train(MLP.batches(5, torch.float32))
    both.same()


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


def test_a_recorder_is_of_the_device_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the current one; and others' threads may allocate while it captures."""
    waited: list[Any] = []
    captured: dict[str, Any] = {}

    def stream(device: Any) -> Any:
        return SimpleNamespace(device=device, wait_stream=lambda other: waited.append(other.device))

    @contextlib.contextmanager
    def graph(one: Any, **more: Any) -> Any:
        captured.update(more)
        yield

    fakes = {
        "Stream": stream, "current_stream": stream, "graph": graph,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(pool=lambda: (0, 1), replay=None),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    recorder = CudaRecorder(torch.device("cuda", 1))
    assert recorder.warm(lambda: 5) == 5
    assert recorder.capture(lambda: 6)[1] == 6
    assert waited == [torch.device("cuda", 1)] * 2
    assert captured["stream"].device == torch.device("cuda", 1)
    assert captured["capture_error_mode"] == "thread_local"


def test_numbers_on_another_device_are_refused() -> None:
    """torch puts a CPU's scalar into the graph, where no schedule that writes it is seen."""
    both, told = Both("mdgf-linear-masked"), r"lr of param group 0 is a tensor on meta.*on cpu"
    group, own = both.run.optimizer.param_groups[0], torch.tensor(0.05)
    group["lr"] = torch.tensor(0.05, device="meta")
    with pytest.raises(FlowError, match=told):
        GraphedStep(both.step._parts, both._train, both.recorder)
    group["lr"] = own
    both.train(MLP.batches(1, torch.float32))
    for part in both.step._parts:  # replaced where a capture follows
        group["lr"] = torch.tensor(0.05, device="meta")
        with pytest.raises(FlowError, match=told):
            part.begin()
        group["lr"] = own
    both.train(MLP.batches(1, torch.float32))


def test_what_cannot_be_captured_is_refused_or_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = Both("settling")
    with pytest.raises(FlowError, match="graphed\\(\\) needs CUDA"):
        both.run.flow.graphed(both._train)
    with monkeypatch.context() as there:
        there.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(FlowError, match="the weights are on cpu"):
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
