"""Checks of arguments: is a model a network, and does its `forward` take a batch?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nmflow.errors import NMFlowError


def check_model(model: object, error: type[NMFlowError], name: str = "model") -> None:
    """Raise `error` unless `model` is a network.

    Example:
        >>> from nmflow.errors import PlanError
        >>> check_model({}, PlanError)
        Traceback (most recent call last):
        nmflow.errors.PlanError: model is a dict: give a torch.nn.Module
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        found = f"the class {model.__name__}" if isinstance(model, type) else f"a {kind}"
        raise error(f"{name} is {found}: give a torch.nn.Module")


def inside(model: nn.Module) -> nn.Module:
    """The network inside of `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def check_batch(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: type[NMFlowError],
    mend: str,
) -> None:
    """Raise `error` where a network's `forward` does not take the arguments of a batch, by name.

    Args:
        model: the network.
        args: the positional ones.
        kwargs: those with a name.
        error: what to raise.
        mend: what the caller can do.
    """
    try:  # a decorator may take more than what it decorates
        inspect.signature(model.forward, follow_wrapped=False).bind(*args, **kwargs)
    except TypeError as told:
        raise error(
            f"a batch does not fit the forward of {type(model).__name__} ({told}): {mend}"
        ) from None
    except ValueError:  # a builtin without a signature
        return
