"""A network's class built again from its config: its names, and what its constructor makes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nmflow.packed.files.companions import is_pretrained


def built_again(module: nn.Module) -> nn.Module | None:
    """A module of the same class and config, its parameters on `meta`; None if there is no way."""
    config = getattr(module, "config", None)
    try:
        wanted = list(inspect.signature(type(module)).parameters.values())
    except (TypeError, ValueError):
        return None
    needed = [p for p in wanted if p.default is p.empty and p.kind not in (2, 4)]
    if config is None or not wanted or len(needed) > 1:
        return None
    if wanted[0].name != "config" and not is_pretrained(module):
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), parameters_on_meta():
            return type(module)(copy.deepcopy(config))
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return None


def built_names(model: nn.Module) -> set[str] | None:
    """The state's names of the network that its config builds; None if unknown."""
    twin = built_again(model)
    return None if twin is None else set(twin.state_dict())


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that this thread builds get parameters on `meta`, and buffers on their own device."""
    here = threading.get_ident()

    def away(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
        if threading.get_ident() != here or type(parameter) is not nn.Parameter:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(away)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        handle.remove()
