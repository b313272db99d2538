"""Copies of an optimizer that has a recipe: `copy.deepcopy` and pickle leave its hooks behind.

A copy without hooks would train the sparse weights as if they were dense. So its first step raises
and names `attach`, which continues from the copy's state: that state is complete.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from nmflow.errors import FlowError
from nmflow.flow import owners
from nmflow.flow.state import GROUP_KEYS


class Clones:
    """Watches an optimizer for copies of it, until `remove`.

    Args:
        optimizer: the optimizer.
        before: called before one is made.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._own = vars(optimizer).get("__reduce_ex__")  # of an optimizer that is a copy itself
        _watch(optimizer, before)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        vars(self._optimizer).pop("__reduce_ex__", None)
        if self._own is not None:
            vars(self._optimizer)["__reduce_ex__"] = self._own


def _watch(optimizer: Optimizer, before: Callable[[], None] | None = None) -> None:
    # `copy.deepcopy` and pickle both ask the object, before its class.
    vars(optimizer)["__reduce_ex__"] = functools.partial(_reduce, optimizer, before)


def _reduce(
    optimizer: Optimizer, before: Callable[[], None] | None, protocol: int
) -> tuple[Any, ...] | str:
    if before is not None:
        before()
    told = type(optimizer).__reduce_ex__(optimizer, protocol)
    if isinstance(told, str) or not (owners.owns(optimizer) or _without(optimizer)):
        return told
    make, args, *rest = told
    return _made, (make, args), *rest


def _made(make: Callable[..., Optimizer], args: tuple[Any, ...]) -> Optimizer:
    copied = make(*args)
    vars(copied)["step"] = types.MethodType(_step, copied)
    _watch(copied)
    return copied


def _step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    if _without(optimizer):
        raise FlowError(
            "optimizer is a copy of one with a recipe, and the copy has none: call "
            "nmflow.attach() with it and its model to continue from its state, or build a new "
            "optimizer"
        )
    return type(optimizer).step(optimizer, *args, **kwargs)


def _without(optimizer: Optimizer) -> bool:
    """Whether the state belongs to a recipe, and no recipe is attached."""
    groups = optimizer.param_groups
    return any(key in group for group in groups for key in GROUP_KEYS) and not owners.owns(
        optimizer
    )
