"""Weights that were frozen when a recipe was attached, and are trained now, dense."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from nmflow.errors import NMFlowWarning
from nmflow.flow.state import Run
from nmflow.flow.stepper import Stepper
from nmflow.select.plan import FROZEN, Plan


class Thawed:
    """Warns of each such weight once: what `include` names would otherwise end dense in silence."""

    def __init__(self, optimizer: Optimizer, frozen: Mapping[str, Tensor]) -> None:
        self._optimizer, self._frozen = optimizer, dict(frozen)

    def look(self, run: Run, k: int) -> None:
        """Look, now that W̃ of step `k` was written."""
        thawed = {name: p for name, p in self._frozen.items() if p.requires_grad}
        if not thawed:
            return
        groups = self._optimizer.param_groups
        stepped = {id(p) for group in groups for p in group["params"]}
        for name in [name for name, p in thawed.items() if id(p) in stepped]:
            del self._frozen[name]
            warnings.warn(
                f"'{name}' was frozen when {run.recipe.name} was attached, and is trained dense "
                f"since step {k} or before: to prune it too, attach when it may be trained, and "
                "freeze it afterwards; or exclude it",
                NMFlowWarning,
                stacklevel=2,
            )


def watch_frozen(model: nn.Module, chosen: Plan, steppers: Sequence[Stepper]) -> None:
    """Have each stepper look after its steps at what the plan left out as frozen."""
    params = dict(model.named_parameters(remove_duplicate=False))
    frozen = {x.name: params[x.name] for x in chosen.others if x.reason == FROZEN}
    for stepper in steppers if frozen else ():
        stepper.tell(Thawed(stepper.optimizer, frozen).look)
