"""Whole training steps as CUDA graphs: captured when a step repeats the last one, then replayed.

A graph replays kernels, and nothing that Python does. So the host's part of a step (checks, count,
numbers of the schedule) runs around each replay. If a schedule changes which kernels run, the step
is captured again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from nmflow.errors import FlowError
from nmflow.flow.graph_steps import GraphSteps, Held
from nmflow.masks import begin_capture, end_capture

T = TypeVar("T")
_KEPT = 4
"""Graphs that are kept: steps with new masks and steps with held ones may take turns."""


class Recorder(Protocol):
    """What captures steps and replays them: `CudaRecorder`, or a test's own."""

    def warm(self, step: Callable[[], T]) -> T:
        """Run a step once before its capture, as torch asks for."""
        ...

    def capture(self, step: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Capture a step without running it; return what replays it, and what the step returned."""
        ...


class CudaRecorder:
    """CUDA graphs of work on one device; they share memory, since no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def warm(self, step: Callable[[], T]) -> T:
        """On the stream of the captures, as torch asks for."""
        around = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            out = step()
        around.wait_stream(self._stream)
        return out

    def capture(self, step: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """A graph in the memory of those before it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream,
            # A loader's thread may pin memory meanwhile, which "global" would not allow it.
            capture_error_mode="thread_local",
        ):  # fmt: skip
            out = step()
        self._pool = self._pool or graph.pool()
        return graph.replay, out


class GraphedStep(Generic[T]):
    """A training step that runs as a CUDA graph, see `Flow.graphed`.

    Attributes:
        why: why the last call ran the step without a graph; "" if it replayed one.
        captures: how often a step was captured.
    """

    def __init__(
        self, parts: Sequence[GraphSteps], step: Callable[[], T], recorder: Recorder
    ) -> None:
        self._parts, self._step, self._recorder = parts, step, recorder
        self._graphs: dict[Any, _Graph[T]] = {}
        self._last: Any = None
        self._rates: Any = None
        self._shown: _Graph[T] | None = None
        self.why, self.captures = "", 0
        for part in parts:
            part.check()

    def __call__(self) -> T:
        """Do one training step; return its result, which the next call may overwrite."""
        self.why = next(filter(None, (part.why_not() for part in self._parts)), "")
        key = None if self.why else tuple(part.key() for part in self._parts)
        if key is not None and key not in self._graphs and key != self._last:
            self._check_rates()
            self.why = "it differs from the step before, and its next repetition is captured"
        # A capture must not follow a step that raised.
        self._last, self._rates = None, self._held_rates()
        if self.why:
            self._shown = None
            with contextlib.ExitStack() as stack:
                for part in self._parts if key is not None else ():
                    stack.enter_context(part.as_captured())
                out = self._recorder.warm(self._step)
            self._last = key
            return out
        graph = self._graphs.pop(key, None) or self._capture()
        self._graphs[key] = graph  # the most recently used graph is the last
        while len(self._graphs) > _KEPT:
            del self._graphs[next(iter(self._graphs))]
        if self._shown is not graph:
            graph.show_gradients()
            self._shown = graph
        for part, held in graph.held:
            part.before(held)
        graph.replay()
        for part, held in graph.held:
            part.after(held)
        self._last = key
        return graph.out

    def _held_rates(self) -> list[tuple[object, ...]]:
        return [part.rates() for part in self._parts]

    def _check_rates(self) -> None:
        """Raise if every step would have to be captured, since a number changes with each step."""
        if self._last is None or not self._graphs or self._held_rates() == self._rates:
            return
        raise FlowError(
            f"lr changed from {self._rates} to {self._held_rates()}, but a CUDA graph keeps the "
            "number, or the tensor, of its capture: give the optimizer its lr in a tensor on the "
            "device, such as AdamW(..., lr=torch.tensor(1e-3, device='cuda'), capturable=True), "
            "and have schedules write into that tensor"
        )

    def _capture(self) -> _Graph[T]:
        begin_capture(self._parts[0].device)
        try:
            for part in self._parts:
                part.begin()
            replay, out = self._recorder.capture(self._step)
        except BaseException:
            end_capture()
            for part in self._parts:
                part.abandon()
            raise
        tables = end_capture()
        self.captures += 1
        found = [(part, part.end()) for part in self._parts]
        held = [(part, one) for part, one in found if one is not None]
        if not held:
            raise FlowError(
                "step called no optimizer.step() of the flow: give flow.graphed() the whole "
                "training step, from zero_grad() to step()"
            )
        return _Graph(replay, out, held, tables)


def on_cuda(parts: Sequence[GraphSteps], step: Callable[[], T]) -> GraphedStep[T]:
    """A training step as a graph; a `FlowError` where the weights are not on a CUDA device."""
    if not torch.cuda.is_available():
        raise FlowError(
            "graphed() needs CUDA, which torch does not find here: call the training step itself"
        )
    device = parts[0].device
    if device.type != "cuda":
        raise FlowError(
            f"graphed() needs CUDA, and the weights are on {device}: move the model there before "
            "attach(), or call the training step itself"
        )
    return GraphedStep(parts, step, CudaRecorder(device))


class _Graph(Generic[T]):
    """A captured step, what it returned, and the gradients that it leaves."""

    def __init__(
        self,
        replay: Callable[[], object],
        out: T,
        held: list[tuple[GraphSteps, Held]],
        tables: list[Tensor],
    ) -> None:
        self.replay, self.out, self.held = replay, out, held
        self._tables = tables  # whose memory the kernels read
        params = [p for part, _ in held for g in part.optimizer.param_groups for p in g["params"]]
        self._grads: list[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in params]

    def show_gradients(self) -> None:
        """Point `.grad` at the memory that the replays write."""
        for param, grad in self._grads:
            param.grad = grad
