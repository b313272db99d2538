"""`load_state_dict` on a model in training: which weights it wrote whole."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nmflow.flow.slots import Slot


class Loading:
    """A pre-hook of one module's `load_state_dict` that tells a slot what is coming.

    A loaded 0.0 where W̃ is 0 has the same value as a place that nobody wrote, but the state dict
    shows that the whole weight was given. A copy or a pickle of the module has no such hook, or one
    that does nothing if others had hooked the module before.
    """

    def __init__(self, module: nn.Module, own: str, slot: Slot) -> None:
        if not module._load_state_dict_pre_hooks:
            module._load_state_dict_pre_hooks = _Hooks()
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


class _Hooks(OrderedDict):
    """Hooks of a module whose copies and pickles keep only the hooks of others.

    So a file of a whole module, as `torch.save(model)` writes it, is the same as without nmflow:
    `torch.load` refuses classes that it does not know.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        others = [(k, h) for k, h in self.items() if not isinstance(h.hook, Loading)]
        return OrderedDict, (), None, None, iter(others)


def watch(slots: list[Slot]) -> list[Loading]:
    """Tell slots of every `load_state_dict` that writes them whole, until it is removed."""
    return [Loading(m, own, slot) for slot in slots for m, own in slot.home.modules()]
