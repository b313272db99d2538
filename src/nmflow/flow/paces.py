"""How far a step goes if the recipe has a factor for the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nmflow.flow.sharding import local
from nmflow.flow.slots import Slot
from nmflow.recipes.schedules import Stage


class Paces:
    """The optimizer steps as usual; W then moves `lr_scale` times as far as the step did.

    Args:
        slots: the parameters.
        lr_scale: the recipe's factor; with 1 nothing happens.
        stages: the stage of each target after k steps, by label.
    """

    def __init__(
        self, slots: Sequence[Slot], lr_scale: float, stages: Callable[[int], Mapping[str, Stage]]
    ) -> None:
        self._slots, self._stages = slots if lr_scale != 1.0 else (), stages
        self._before: dict[int, Tensor] = {}

    def remember(self, k: int) -> None:
        """Before the optimizer's step: copy W if its learning rate has a factor."""
        stages = self._stages(k) if self._slots else {}
        for slot in self._slots:
            rated = any(stages[r.target.label].rate != 1.0 for r in slot.regions)
            if rated and slot.param.grad is not None:
                self._before[id(slot)] = local(slot.dense).clone()

    def rescale(self, k: int) -> None:
        """After the step: move W from its old value by the factor times the step."""
        stages = self._stages(k) if self._before else {}
        for slot in self._slots if self._before else ():
            before = self._before.get(id(slot))
            if before is None:
                continue
            for region in slot.regions:
                w, rate = region.of(local(slot.dense)), stages[region.target.label].rate
                if rate != 1.0 and region.count:
                    w.copy_(torch.lerp(region.of(before), w, rate))
        self._before.clear()

    def forget(self) -> None:
        """Forget what was kept for a step that was interrupted."""
        self._before.clear()
