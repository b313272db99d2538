"""The steps of one optimizer in CUDA graphs: what a graph holds, and what the host still does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.errors import FlowError
from nmflow.flow.edits import Edits, Late
from nmflow.flow.observing import Observation
from nmflow.flow.record import Record
from nmflow.flow.sharding import local
from nmflow.flow.state import GROUP_KEYS, Kind
from nmflow.flow.steps import Steps
from nmflow.flow.weights import Weights

Deltas = dict[tuple[int, Kind], Tensor]


@dataclass(frozen=True)
class Held:
    """What a graph has of the steps of one optimizer.

    Attributes:
        deltas: where δ of each kind of target is, before the step (0) and after it (1).
        late: what the next check of the weights reads.
        flags: what each replay says of the weights.
    """

    deltas: Deltas
    late: Late
    flags: list[Tensor]


class GraphSteps:
    """Describes the part of one optimizer's step that a graph holds, and does the rest."""

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Weights,
        edits: Edits,
        record: Record,
        steps: Steps,
        observations: list[Observation],
    ) -> None:
        self.optimizer, self._observations = optimizer, observations
        self._weights, self._edits, self._record, self._steps = weights, edits, record, steps
        self._deltas: Deltas = {}
        self._begun: int | None = None  # k, while a capture runs

    def check(self) -> None:
        """Raise a `FlowError` unless a graph of the optimizer's steps reads what it steps by."""
        kind, device = type(self.optimizer).__name__, self.device
        for i, group in enumerate(self.optimizer.param_groups):
            if group.get("capturable") is False:
                raise FlowError(
                    f"param group {i} of the {kind} has capturable=False, so its step cannot be in "
                    f"a CUDA graph: give {kind}(..., capturable=True)"
                )
            for name, value in group.items():
                if isinstance(value, Tensor) and value.device != device:
                    raise FlowError(
                        f"{name} of param group {i} is a tensor on {value.device}, of which a CUDA "
                        f"graph keeps the number of its capture: give {kind} a tensor on {device}"
                    )

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return local(self._weights.slots[0].param).device

    def rates(self) -> tuple[object, ...]:
        """The learning rates as a graph holds them: numbers, and which tensors the others are."""
        rates = [group.get("lr") for group in self.optimizer.param_groups]
        return tuple(f"a tensor, {id(lr)}" if isinstance(lr, Tensor) else lr for lr in rates)

    def why_not(self) -> str:
        """Why the next step cannot be in a graph, in one clause; or ""."""
        weights, k = self._weights, self._record.k
        run = weights.run
        if not self.optimizer.state:
            return "the first step makes the optimizer's state"
        if not weights.prepared.is_clear:
            return "it repeats a step that raised"
        if any(k % o.every == 0 for o in self._observations):
            return "an observer looks at this step"
        if run.recipe.freezes_second_moment and k >= run.dense_steps:
            return f"{run.recipe.name} takes the optimizer's count of steps to the host"
        if run.recipe.lam and any(g.get("maximize") for g in self.optimizer.param_groups):
            return "the optimizer maximizes"
        if weights.together.bundle is not None and weights.together.bundle.sharded:
            return "its weights are sharded"
        if weights.pruned and weights.plans(k) is None:
            return (
                "not all weights share launches: panels, two masks, forms, float64 and masks "
                "that are taken now to be held are written one by one"
            )
        return ""

    def key(self) -> tuple[Any, ...]:
        """Everything about the next step that a graph keeps as it is."""
        weights, k = self._weights, self._record.k
        stages = weights.kinds(k), weights.run.kinds(weights.known, k + 1)
        lam = weights.run.recipe.lam
        groups = [
            (name, value if isinstance(value, int | float | str | tuple) else id(value))
            for group in self.optimizer.param_groups
            for name, value in group.items()
            if name not in ("params", *GROUP_KEYS)
        ]
        numbers = [
            (stage.pattern, stage.delta == 1.0, stage.delta if lam else 0.0, stage.rate)
            for some in stages
            for stage in some.values()
        ]
        return (
            weights.run,
            weights.together.bundle,
            weights.groups.changes,
            weights.plans(k),
            *numbers,
            *groups,
        )

    @contextlib.contextmanager
    def as_captured(self) -> Iterator[None]:
        """Make a step without a graph launch the kernels of its capture.

        A kernel that is not loaded yet cannot be captured.
        """
        together = self._weights.together
        together.deltas = self._on_device()
        try:
            yield
        finally:
            together.deltas = None

    def _on_device(self) -> Deltas | None:
        """δ of each kind before and after the next step, where kernels read it."""
        bundle, k, run = self._weights.together.bundle, self._record.k, self._weights.run
        if bundle is None:
            return None
        device = bundle.dense[0].device
        return {
            (at, kind): torch.full((), stage.delta, dtype=torch.float32, device=device)
            for at in (k, k + 1)
            for kind, stage in run.kinds(self._weights.known, at).items()
        }

    # -- the capture ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Before a capture: what a step reads, and where its graph will find δ."""
        self.check()  # what a group has may have been replaced
        self._steps.before_replay([])
        self._begun = self._record.k
        self._weights.together.deltas = self._on_device()
        self._weights.flags.kept = []

    def end(self) -> Held | None:
        """After a capture, which has not run: the weights and k are what they were.

        Returns:
            What the graph has of the step; None if it has nothing of this optimizer.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        weights, late = self._weights, self._edits.taken_late()
        deltas, flags = weights.together.deltas or {}, weights.flags.kept or []
        weights.together.deltas = weights.flags.kept = None
        stepped = self._record.k > begun
        self._record.k = begun
        self._record.write()
        if not stepped:
            return None
        moved = {(k - begun, kind): delta for (k, kind), delta in deltas.items()}
        return Held(moved, late, flags)

    @torch.no_grad()
    def abandon(self) -> None:
        """After a capture that failed: write W̃ again, which may be marked as another."""
        if self._begun is not None:
            self.end()
            self._weights.prepared.clear()
            self._weights.write(self._record.k)

    # -- a replay ------------------------------------------------------------------------------

    @torch.no_grad()
    def before(self, held: Held) -> None:
        """Before a replay: check, and say what δ is."""
        self._steps.before_replay(list(held.late))
        weights, k = self._weights, self._record.k
        stages = weights.kinds(k), weights.run.kinds(weights.known, k + 1)
        for (later, kind), delta in held.deltas.items():
            delta.fill_(stages[later][kind].delta)

    def after(self, held: Held) -> None:
        """After a replay: count."""
        self._steps.after_replay(held.flags)
