"""An optimizer and its weights as they were before `attach`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from nmflow.flow.resume import is_there
from nmflow.flow.sharding import local
from nmflow.flow.slots import Slot
from nmflow.flow.state import GROUP_KEYS


class Before:
    """What `attach` may change, to restore it if `attach` fails half-way.

    The weights are copied only if a saved state is adopted, which brings other weights; otherwise
    the slots have them.
    """

    def __init__(self, optimizer: Optimizer, slots: Sequence[Slot]) -> None:
        self._optimizer, self._slots = optimizer, slots
        self._state = {p: dict(s) if isinstance(s, dict) else s for p, s in optimizer.state.items()}
        self._groups = [
            {key: group[key] for key in GROUP_KEYS if key in group}
            for group in optimizer.param_groups
        ]
        resumed = is_there(optimizer)
        self._weights = [local(s.param).clone() for s in slots] if resumed else None

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for i, slot in enumerate(self._slots):
            held = self._weights[i] if self._weights else None
            if held is None and slot.tensors:
                held = local(slot.dense)
            if held is not None and not torch.equal(held, local(slot.param)):
                local(slot.param).copy_(held)
            slot.tensors = {}
        state = self._optimizer.state
        for param in [p for p in state if p not in self._state]:
            del state[param]
        for param, entry in self._state.items():
            if isinstance(entry, dict) and param in state:
                state[param].clear()
                state[param].update(entry)
            else:
                state[param] = entry
        for group, keys in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key in GROUP_KEYS:
                group.pop(key, None)
            group.update(keys)
