"""What is done to many weights at once: W̃, the gradient rule and the pull in a launch or two.

Every method does what it can, and returns the slots that are left to be done one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.flow.bundle import Bundle
from nmflow.flow.hosts import Groups
from nmflow.flow.plans import Plan, Plans, Share, addresses
from nmflow.flow.prepared import Prepared
from nmflow.flow.sharding import local, sharded
from nmflow.flow.slots import Slot
from nmflow.flow.state import Kind
from nmflow.recipes.schedules import Stage

_FOREACH: Any = torch  # whose functions for many tensors it does not type
Stages = Mapping[Kind, Stage]


class Together:
    """The slots of one optimizer that are stepped as one.

    Attributes:
        bundle: the slots; None if there are none.
        singles: the others.
        deltas: during the capture of a CUDA graph, where the δ of each kind is; else None.
    """

    def __init__(
        self, optimizer: Optimizer, slots: Sequence[Slot], groups: Groups, prepared: Prepared
    ) -> None:
        self._optimizer, self._slots, self._groups = optimizer, slots, groups
        self._prepared = prepared
        self.bundle: Bundle | None = None
        self.singles: Sequence[Slot] = slots
        self.deltas: Mapping[tuple[int, Kind], Tensor] | None = None
        self._plans: Plans | None = None

    def gather(self) -> Bundle | None:
        """The bundle if its lists still hold, else a new one of the slots that fit now."""
        if self.bundle is not None and self.bundle.holds():
            return self.bundle
        self.bundle, self.singles, self._plans = None, self._slots, None
        fit = [slot for slot in self._slots if Bundle.fits(slot)]
        fit = [slot for slot in fit if sharded(slot.param) == sharded(fit[0].param)]
        if fit:
            own = {id(slot) for slot in fit}
            self.bundle = Bundle(fit, self._optimizer)
            self.singles = [slot for slot in self._slots if id(slot) not in own]
            self._plans = Plans(self.bundle, self._slots)
        return self.bundle

    def plan(self, stages: Stages, held: bool, hold: bool) -> Plan | None:
        """The plan that does everything for all weights in launches; None if some are left."""
        bundle = self.gather()
        if bundle is None or self._plans is None or bundle.prints is None or self.singles:
            return None
        plan = self._plans.of(stages, held, hold)
        return None if plan.rest else plan

    def rule(
        self, k: int, stages: Stages, held: bool, lam: float, scale: Tensor | None
    ) -> Sequence[Slot]:
        """The gradient rule of step `k`, see `Weights.apply_gradient_rule`."""
        bundle = self.bundle
        if bundle is None or self._prepared.any_changed:
            return self._slots
        given: list[Any] = [param.grad for param in bundle.params]
        grads: list[Any] = given
        if bundle.sharded:
            grads = [None if g is None else local(g) for g in given]
        plan = self._of_grads(grads, stages, held)
        places = plan.places
        if not all(map(_like, [grads[i] for i in places], [bundle.dense[i] for i in places])):
            return self._slots
        for share in plan.shares:
            stage = stages[share.kind]
            if stage.pattern is None or not (lam or stage.delta != 1.0):
                continue
            at = addresses(share.parts, grads)
            if lam:
                pull = lam * (1.0 - stage.delta)
                share.launch(at, at, delta=1.0, pull=pull, scale=scale)
            else:
                share.launch(at, at, delta=self._delta(k, share, stages))
            for label, part in zip(share.labels, share.parts, strict=True):
                self._prepared.change(label, given[part.place])
        return [*plan.rest, *self.singles]

    def draw(
        self, k: int, stages: Stages, held: bool, pull: float, rates: Sequence[float | Tensor]
    ) -> Sequence[Slot]:
        """The pull of step `k`, see `Weights.draw`."""
        bundle = self.bundle
        if bundle is None or self._prepared.any_drawn:
            return self._slots
        plan = self._of_grads([param.grad for param in bundle.params], stages, held)
        rest = [*plan.rest, *self.singles]
        for share in plan.shares:
            stage = stages[share.kind]
            if stage.pattern is None or stage.delta == 1.0:
                continue
            groups = share.by(self._groups)
            some = [rates[slot] for slot, *_ in groups]
            if len(groups) > 1 and any(isinstance(lr, Tensor) for lr in some):
                rest += [bundle.slots[part.place] for part in share.parts]
                continue
            for lr, (_, w, shown) in zip(some, groups, strict=True):
                if isinstance(lr, Tensor):
                    amount = (lr.to(w[0].device, torch.float32) * pull * stage.rate).clamp(max=1.0)
                    amount = amount * (1.0 - self._delta(k, share, stages))
                    share.launch(delta=1.0, pull=-1.0, scale=amount)
                else:
                    _FOREACH._foreach_lerp_(w, shown, min(1.0, lr * pull * stage.rate))
            self._prepared.draw_all(share.labels)
        return rest

    def write(
        self, k: int, stages: Stages, reuse: bool, hold: bool, raised: list[Tensor]
    ) -> Sequence[Slot]:
        """W̃ of step `k`, see `Weights.write`; adds to `raised` whether W was finite."""
        bundle = self.gather()
        if bundle is None or self._plans is None or bundle.prints is None:
            return self._slots
        plan = self._plans.of(stages, reuse, hold)
        if plan.rest:
            return self._slots
        for share in plan.shares:
            delta = self._delta(k, share, stages)
            raised.append(share.launch(share.out, delta=delta))
        bundle.wrote()
        return self.singles

    def _of_grads(self, grads: Sequence[Tensor | None], stages: Stages, held: bool) -> Plan:
        """The plan for the weights that have a gradient."""
        assert self._plans is not None
        among = None
        if any(g is None for g in grads):
            among = frozenset(i for i, g in enumerate(grads) if g is not None)
        return self._plans.of(stages, held, False, among)

    def _delta(self, k: int, share: Share, stages: Stages) -> float | Tensor:
        """δ of a launch; during a capture, the tensor from which the CUDA graph reads it."""
        if self.deltas is None:
            return stages[share.kind].delta
        return self.deltas[k, share.kind]


def _like(g: Tensor, w: Tensor) -> bool:
    """Whether a gradient lies in memory as a contiguous weight does."""
    return g.dtype is w.dtype and g.device == w.device and not g.is_sparse and g.is_contiguous()
