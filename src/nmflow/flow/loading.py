"""`load_state_dict` on a model in training: which weights it wrote whole."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nmflow.flow.slots import Slot


class Loading:
    """A pre-hook of one module's `load_state_dict` that tells a slot what is coming.

    A loaded 0.0 where W̃ is 0 cannot be told by its value from a place that nobody wrote, but the
    state dict says that all of the weight was given. A copy of the module gets a hook that does
    nothing, and a pickle one that knows nothing of nmflow.
    """

    def __init__(self, module: nn.Module, own: str, slot: Slot) -> None:
        handle = module.register_load_state_dict_pre_hook(self)
        self._own, self._handle = own, handle
        # An optimizer that is dropped takes its slots with it, and these their hooks.
        self._slot = weakref.ref(slot, lambda _: handle.remove())

    def __call__(
        self, module: nn.Module, state: Mapping[str, Any], prefix: str, *more: Any
    ) -> None:
        """Tell the slot, if the state has the whole of its parameter."""
        slot, value = self._slot(), state.get(prefix + self._own)
        if slot is not None and isinstance(value, Tensor) and value.shape == slot.param.shape:
            slot.expect_load()

    def remove(self) -> None:
        """End it."""
        self._handle.remove()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # Takes any arguments and does nothing until it is asked for more.
        return functools.partial, (itertools.chain,)


def watch(slots: list[Slot]) -> list[Loading]:
    """Tell slots of every `load_state_dict` that writes them whole, until it is removed."""
    return [Loading(m, own, slot) for slot in slots for m, own in slot.home.modules()]
