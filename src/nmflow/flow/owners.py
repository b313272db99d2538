"""Which live optimizer has a recipe on which parameter, so that none is attached to twice."""

from __future__ import annotations

import gc
import weakref

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""A weak reference to the optimizer for every parameter under a recipe."""


def add(param: Tensor, optimizer: Optimizer) -> None:
    """Say that an optimizer has a recipe on a parameter."""
    _owners[param] = weakref.ref(optimizer)


def remove(param: Tensor) -> None:
    """Say that none has any longer."""
    _owners.pop(param, None)


def is_owned(param: Tensor) -> bool:
    """Whether a live optimizer has a recipe on the parameter."""

    def owner() -> Optimizer | None:
        found = _owners.get(param)
        return None if found is None else found()

    if owner() is not None:
        # An optimizer that was dropped and its hooks refer to each other until they are collected.
        gc.collect()
    return owner() is not None


def owns(optimizer: Optimizer) -> bool:
    """Whether an optimizer has a recipe on any parameter."""
    return any(found() is optimizer for found in _owners.values())
