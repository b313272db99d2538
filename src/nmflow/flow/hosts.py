"""Which models and optimizers a flow can be attached to, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from nmflow.errors import FlowError
from nmflow.flow.sharding import local
from nmflow.flow.slots import Slot
from nmflow.numbers import is_finite
from nmflow.recipes import Recipe
from nmflow.select import modules

_HOOKS = (
    "register_step_pre_hook",
    "register_step_post_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)
# Where an optimizer keeps them.
_HOOKED = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# Wrappers that pass `step` to the optimizer inside: Accelerate's and Lightning's.
_WRAPPERS = {"AcceleratedOptimizer", "LightningOptimizer"}
_REFUSED = {
    "ZeroRedundancyOptimizer": "FSDP2 (torch.distributed.fsdp.fully_shard) with a plain optimizer",
    "DeepSpeedZeroOptimizer": "FSDP2 (torch.distributed.fsdp.fully_shard) with a plain optimizer",
    "DeepSpeedZeroOptimizer_Stage3": "FSDP2 (torch.distributed.fsdp.fully_shard)",
}


def optimizers_of(optimizer: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers themselves, out of one or several, wrapped or not.

    Raises:
        FlowError: one of them cannot be hooked, or there is none.
    """
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    if not given:
        raise FlowError("optimizer is an empty list: give the optimizer that steps the weights")
    found: list[Optimizer] = []
    for one in map(_unwrap, given):
        kind = type(one).__name__
        names = {c.__name__ for c in type(one).__mro__}
        for name, instead in _REFUSED.items():
            if name in names:
                raise FlowError(
                    f"optimizer is a {kind}, which steps parts of the weights where no hook sees "
                    f"them whole: use {instead} instead"
                )
        if not isinstance(one, Optimizer) or not all(hasattr(one, h) for h in _HOOKS):
            raise FlowError(
                f"optimizer is a {kind}, which has no step hooks: give a torch.optim.Optimizer, or "
                "the one that this wraps"
            )
        inner = _inner(one)
        if inner is not None:
            raise FlowError(
                f"optimizer is a {kind}, which passes the same weights to the {inner[1]} in its "
                f"'{inner[0]}', where its own hooks do not reach: attach to that {inner[1]}, and "
                "leave the wrapper out if it moves weights between steps and does not put them "
                "back"
            )
        if not all(hasattr(one, name) for name in _HOOKED):
            raise FlowError(
                f"optimizer is a {kind} that never called Optimizer.__init__, so it does not have "
                "the hooks of an optimizer: give the torch.optim.Optimizer that it wraps"
            )
        if isinstance(one, LBFGS):
            raise FlowError(
                "optimizer is LBFGS, which evaluates the network several times inside a step, on "
                "weights that no recipe has masked: use a first-order optimizer, such as AdamW"
            )
        found.append(one)
    return found


def check_model(model: nn.Module) -> None:
    """Raise a `FlowError` for a model whose weights are not its own parameters."""
    modules.check_model(model, FlowError)
    for name, module in model.named_modules():
        kinds = {c.__name__ for c in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds:
            raise FlowError(
                f"'{name or type(model).__name__}' is wrapped by FSDP1, whose flat parameters have "
                "no groups: use FSDP2 (torch.distributed.fsdp.fully_shard) instead"
            )
        if "DeepSpeedEngine" in kinds:
            raise FlowError(
                "model is a DeepSpeedEngine, whose partitioned parameters have no groups: use "
                "FSDP2 (torch.distributed.fsdp.fully_shard) instead"
            )
    for name, param in model.named_parameters():
        if hasattr(param, "ds_id"):
            raise FlowError(
                f"'{name}' is partitioned by DeepSpeed's ZeRO-3, so it has no groups: use FSDP2 "
                "(torch.distributed.fsdp.fully_shard) instead"
            )


class Groups:
    """The param groups of an optimizer, with the place of each weight in them remembered.

    Attributes:
        of: the place of each slot's group.
        changes: how often the groups were found to be different.
    """

    def __init__(self, optimizer: Optimizer, slots: Sequence[Slot]) -> None:
        self._optimizer, self._slots = optimizer, slots
        self._known: list[list[Tensor]] = []
        self.of: list[int] = []
        self.changes = 0

    def check(self, recipe: Recipe) -> None:
        """Raise a `FlowError` unless they have the weights, at rates that the recipe can use."""
        groups = self._optimizer.param_groups
        if len(groups) != len(self._known) or not all(
            len(group["params"]) == len(known) and all(map(is_, group["params"], known))
            for group, known in zip(groups, self._known, strict=True)
        ):
            self._find(groups)
        if not recipe.pull:
            return
        for i in dict.fromkeys(self.of):
            lr = groups[i].get("lr")
            if not (isinstance(lr, Tensor) or is_finite(lr)):
                slot = self._slots[self.of.index(i)]
                raise FlowError(
                    f"'{slot.name}' is in a param group with lr={lr!r}, but {recipe.name} draws "
                    "weights at the learning rate: give the group a number (an Adafactor takes one "
                    "with relative_step=False), or use a recipe without a pull, such as "
                    "'mdgf-linear'"
                )

    def _find(self, groups: Sequence[dict[str, Any]]) -> None:
        places = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        for slot in self._slots:
            if id(slot.param) not in places:
                self._known = []
                raise FlowError(
                    f"'{slot.name}' is no longer in the optimizer's param groups, so nothing would "
                    "train its dense weights: put the parameter back, or finalize() and attach "
                    "again"
                )
        self.of = [places[id(slot.param)] for slot in self._slots]
        self._known = [list(group["params"]) for group in groups]
        self.changes += 1

    def rates(self) -> list[Any]:
        """The learning rate of each slot."""
        groups = self._optimizer.param_groups
        return [groups[i].get("lr") for i in self.of]


def check_masters(optimizer: Optimizer, slots: Iterable[Slot], recipe: Recipe) -> None:
    """Raise a `FlowError` if the state holds finer weights, from which a step overwrites W."""
    for slot in slots:
        part, state = local(slot.dense), optimizer.state.get(slot.param, {})
        for key, value in state.items():
            if (
                not isinstance(value, Tensor)
                or value is slot.dense
                or value.shape != slot.param.shape
            ):
                continue
            held = local(value)
            finer = held.is_floating_point() and held.dtype.itemsize > part.dtype.itemsize
            if finer and torch.equal(held.to(part.dtype), part):
                raise FlowError(
                    f"'{slot.name}' is overwritten at every step from a copy of {held.dtype} in "
                    f"the optimizer's state ({key!r}), so the pull and the scale of {recipe.name} "
                    "would be lost: keep the model itself in that dtype under autocast, or use a "
                    "recipe without a pull and lr_scale, such as 'mdgf-linear'"
                )


def rates(optimizer: Optimizer) -> dict[int, Any]:
    """The learning rate of each parameter, by its id; None if its group has none."""
    found: dict[int, Any] = {}
    for group in optimizer.param_groups:
        found.update(dict.fromkeys(map(id, group["params"]), group.get("lr")))
    return found


def uphill(optimizer: Optimizer) -> set[int]:
    """The ids of the parameters whose gradient the optimizer negates, since it maximizes."""
    usual = getattr(optimizer, "maximize", False)
    groups = [g for g in optimizer.param_groups if g.get("maximize", usual)]
    if not groups:
        return set()
    return {id(p) for group in groups for p in group["params"]}


def _inner(optimizer: Optimizer) -> tuple[str, str] | None:
    """The attribute in which an optimizer holds another one of the same weights, and its kind."""
    own = set(rates(optimizer))
    for name, value in vars(optimizer).items():
        held = value.values() if isinstance(value, dict) else value
        for one in held if isinstance(value, dict | list | tuple) else [value]:
            groups = getattr(one, "param_groups", None)
            if one is optimizer or not callable(getattr(one, "step", None)) or not groups:
                continue
            if own & {id(p) for group in groups for p in group["params"]}:
                return name, type(one).__name__
    return None


def _unwrap(optimizer: Any) -> Any:
    while type(optimizer).__name__ in _WRAPPERS and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
