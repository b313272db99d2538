"""Which optimizer owns each target's parameter, and where it lives in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from nmflow.errors import FlowError
from nmflow.flow.homes import Home
from nmflow.flow.sharding import region
from nmflow.flow.slots import Slot
from nmflow.recipes import Recipe
from nmflow.select.target import Plan, by_name


def slots_of(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    recipe: Recipe,
    chosen: Plan,
    norms: Mapping[str, Tensor],
) -> list[Slot]:
    """One slot for each parameter, with the optimizer that owns it."""
    params = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, p in params.items():
        names.setdefault(id(p), []).append(name)
    owners: dict[int, Optimizer] = {}
    for one in optimizers:
        for group in one.param_groups:
            for p in group["params"]:
                if owners.setdefault(id(p), one) is not one:
                    first = names.get(id(p), ["a parameter"])[0]
                    raise FlowError(
                        f"'{first}' is in two of the optimizers, which would both step it: leave "
                        "it to one of them"
                    )
    slots = []
    for name, targets in by_name(chosen).items():
        param = params[name]
        if id(param) not in owners:
            raise FlowError(
                f"'{name}' is not in the optimizer, so nothing would train its dense weights: add "
                "it to the optimizer's parameters, or exclude it"
            )
        regions = []
        for target in targets:
            used = recipe.patterns(target.pattern, target.length)
            regions.append(region(param, target, max(p.m for p in used)))
        home = Home(model, names[id(param)])
        slots.append(Slot(name, param, owners[id(param)], regions, home, norms))
    return slots
