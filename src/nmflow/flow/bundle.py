"""Parameters that trade places with their dense weights at once: lists that are built once.

A step reads the places of every weight several times. They rarely change, so they are kept in
lists, and one check for all weights says whether the lists still hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.flow.marks import prints_of
from nmflow.flow.sharding import bare, local, sharded
from nmflow.flow.slots import Slot
from nmflow.flow.state import DENSE_KEY

_FOREACH: Any = torch  # whose functions for many tensors it does not type


class Bundle:
    """Slots whose tensors and whose places in the optimizer's state stay where they are.

    It is built between two steps, from slots that `fits` accepts, all of them sharded or none.

    Attributes:
        slots: the slots.
        params: their parameters.
        dense: W of each, this rank's part.
        shown: W̃ of each, as a tensor that shares the parameter's memory between steps.
        sharded: whether they are DTensors.
        prints: takes the fingerprints of all W̃ in one launch; None if it cannot.
    """

    def __init__(self, slots: Sequence[Slot], optimizer: Optimizer) -> None:
        self.slots, self._optimizer = list(slots), optimizer
        self.params = [slot.param for slot in slots]
        self.sharded = sharded(self.params[0])
        self._kept = [slot.tensors[DENSE_KEY] for slot in slots]
        self._bare = [bare(param) for param in self.params]
        self.dense = [local(x) for x in self._kept]
        self.shown = [local(x).data for x in self.params]
        self._dense_at = [x.data_ptr() for x in self.dense]
        self._shown_at = [x.data_ptr() for x in self.shown]
        self._state = optimizer.state
        self._own: list[dict[str, Any]] = [self._state[param] for param in self.params]
        self._all = list(self._state.values())
        self._keys = tuple(slots[0].tensors)
        self._copied = False  # whether a shard has W in W̃'s memory, for the time of a step
        self.prints = prints_of(self.shown)
        # The fingerprints of the last write of W̃, where a CUDA graph finds them too.
        self._taken = None if self.prints is None else self.prints.blank()

    @staticmethod
    def fits(slot: Slot) -> bool:
        """Whether a slot may be in a bundle now: no part of it is new, empty or kept values."""
        own = slot.optimizer.state.get(slot.param)
        return (
            bare(slot.param).numel() > 0
            and slot.places is None
            and slot.settled
            and isinstance(own, dict)
            and own.get(DENSE_KEY) is slot.tensors[DENSE_KEY]
            and len(own) > len(slot.tensors)  # an optimizer without state has no dictionary
        )

    def holds(self) -> bool:
        """Whether the lists still hold for every weight."""
        now = list(map(local, self.params)) if self.sharded else self.params
        return (
            self._optimizer.state is self._state
            and len(self._state) == len(self._all)
            and all(map(is_, self._state.values(), self._all))
            and all(map(is_, [slot.tensors[DENSE_KEY] for slot in self.slots], self._kept))
            and all(map(is_, [own.get(DENSE_KEY) for own in self._own], self._kept))
            and all(map(is_, now, self._bare))
            and [x.data_ptr() for x in self._bare] == self._shown_at
            and [x.data_ptr() for x in self.dense] == self._dense_at
        )

    # -- the step ------------------------------------------------------------------------------

    def enter(self) -> None:
        """`Slot.enter` of each."""
        for slot in self.slots:
            slot.stepping = True
        for own in self._own:
            for key in self._keys:
                own.pop(key, None)
        if self.sharded:  # a DTensor cannot be swapped, so it is copied
            _FOREACH._foreach_copy_(self.shown, self.dense)
            self._copied = True
            return
        for param, dense in zip(self.params, self.dense, strict=True):
            param.data = dense

    def leave(self) -> list[Slot]:
        """`Slot.leave` of each; returns those that the optimizer moved, which need their own."""
        odd = []
        same = len(self._state) == len(self._all) and all(map(is_, self._state.values(), self._all))
        if self._copied:
            _FOREACH._foreach_copy_(self.dense, self.shown)
            self._copied = False
        members = zip(
            self.slots, self._bare, self._dense_at, self.shown, self._shown_at, self._own,
            strict=True,
        )  # fmt: skip
        for slot, param, dense_at, shown, shown_at, own in members:
            at = param.data_ptr()
            if at not in (dense_at, shown_at) or not same:
                # W̃ of a step that was broken off before it began is there already.
                if at != shown_at:
                    slot.lent(shown)
                odd.append(slot)
                continue
            if at != shown_at:
                param.data = shown
            own.update(slot.tensors)
            slot.stepping = False
        return odd

    # -- marks ---------------------------------------------------------------------------------

    def wrote(self) -> None:
        """`Slot.wrote` of each, where `prints` can take their fingerprints."""
        assert self.prints is not None
        torch.autograd.graph.increment_version(self._bare)
        taken = self.prints(self._taken)
        for slot, param, rows in zip(self.slots, self._bare, self.prints.rows, strict=True):
            slot.known(param._version, taken, rows)

    def moved(self) -> bool:
        """Whether torch's version of one of the parameters has changed since they were seen."""
        return [param._version for param in self._bare] != [slot.version for slot in self.slots]

    def gather_prints(self) -> None:
        """Put the fingerprints of all W̃ where `wrote` puts them, whoever took them."""
        assert self.prints is not None
        assert self._taken is not None
        if all(slot.seen_in(self._taken) for slot in self.slots):
            return
        self._taken.copy_(torch.cat([slot.prints for slot in self.slots]))
        for slot, rows in zip(self.slots, self.prints.rows, strict=True):
            assert slot.version is not None
            slot.known(slot.version, self._taken, rows)

    def agreeing(self) -> Tensor | None:
        """Which of the `prints` have not changed since W̃ was seen, on the device; or None."""
        if self.prints is None:
            return None
        self.gather_prints()
        return self.prints() == self._taken

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """How many of the `prints` each parameter has, by its name."""
        assert self.prints is not None
        rows = zip(self.slots, self.prints.rows, strict=True)
        return [(slot.name, some.stop - some.start) for slot, some in rows]
