"""A weight whose kept values alone the optimizer steps, while its mask is frozen.

Then W, its gradient during a step, and the optimizer's moments are one row of kept values, and the
mask is bits. Whoever reads W, or saves, loads or copies the optimizer, gets whole tensors: reading
expands them, and the next step compresses them again. Pruned values are dropped: they are 0 from
then on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.flow.marks import blank
from nmflow.flow.sharding import local
from nmflow.flow.slot_masks import SlotMasks
from nmflow.flow.state import DENSE_KEY, KEPT_KEY, SLOT_KEYS
from nmflow.masks.kept_values import Places, serves, to_bits


class SlotKept(SlotMasks):
    """The part of a slot that does that.

    Attributes:
        shrinks: whether the next step will be on kept values.
        places: the kept places, while W and the moments hold only their values; else None.
    """

    param: Tensor
    optimizer: Optimizer
    shrinks = False
    places: Places | None = None
    _aside: tuple[Tensor, Tensor] | None = None  # W̃ and its gradient, during a step
    _bits: tuple[Places | Tensor, int, Tensor] | None = None  # of a mask, and of its version

    @property
    def dense(self) -> Tensor:
        """The dense weights W, shaped and sharded like the parameter."""
        self.expand()
        return self.tensors[DENSE_KEY]

    @property
    def held_mask(self) -> Tensor:
        """The held mask, shaped and sharded like the parameter."""
        self.expand()
        return self.tensors[KEPT_KEY]

    def bits(self, transposed: bool) -> Tensor:
        """The held mask as bits, or its transpose; made once for each mask."""
        places = self.places
        if places is not None and not transposed:
            return places.bits
        source = self.tensors[KEPT_KEY] if places is None else places
        version = source._version if isinstance(source, Tensor) else 0
        if self._bits is None or self._bits[0] is not source or self._bits[1] != version:
            kept = source if isinstance(source, Tensor) else source.kept
            self._bits = source, version, to_bits(kept.t() if transposed else kept)
        return self._bits[2]

    def shrink(self) -> bool:
        """Compress W and the optimizer's moments to their kept values; returns whether it did."""
        grad = self.param.grad
        if self.places is not None or not self.shrinks or (grad is not None and grad.is_sparse):
            return False
        places = Places(self.tensors.pop(KEPT_KEY))
        self._turn(places.together, self.param.shape)
        self.places, self._bits = places, None
        return True

    def expand(self) -> None:
        """Expand to whole tensors again, as every other optimizer has them."""
        places, self.places = self.places, None
        if places is not None:
            self.tensors[KEPT_KEY] = places.kept
            self._turn(lambda values: self._apart(places, values), torch.Size([places.count]))

    def _turn(self, make: Callable[[Tensor], Tensor], shape: torch.Size) -> None:
        """Replace W, and the optimizer's tensors of a shape, by others made from them."""
        state, dense = self.optimizer.state.get(self.param), self.tensors[DENSE_KEY]
        self.tensors[DENSE_KEY] = make(dense)
        if state is None or state.get(DENSE_KEY, dense) is not dense:
            return  # nothing, or a state that somebody loaded, which is whole
        made = {
            key: make(x) if isinstance(x, Tensor) and x.shape == shape else x
            for key, x in state.items()
            if key not in SLOT_KEYS
        }
        if DENSE_KEY in state:
            made.update(self.tensors)
        # In a dictionary of its own: a saved state has the old one, whose tensors are whole.
        self.optimizer.state[self.param] = made

    def _apart(self, places: Places, values: Tensor) -> Tensor:
        out = torch.empty_like(self.param, dtype=values.dtype, requires_grad=False)
        places.apart(values, out)
        return out

    # -- the step ------------------------------------------------------------------------------

    def enter_kept(self, places: Places) -> None:
        """Put kept values into the parameter and its gradient; none where it has no gradient."""
        param, grad = self.param, self.param.grad
        if grad is None:
            return
        values = places.together(grad)
        self._aside = param.data, grad
        param.grad = None
        param.data = self.tensors[DENSE_KEY]
        param.grad = values

    def leave_kept(self) -> None:
        """Take them out again."""
        if self._aside is None:
            return
        (shown, grad), self._aside = self._aside, None
        param = self.param
        values = param.data
        param.grad = None
        param.data = shown
        param.grad = grad
        if values is not shown:
            self.tensors[DENSE_KEY] = values

    def write_kept(self, places: Places) -> tuple[Tensor, Tensor | None]:
        """Write W̃ from them; whether they are finite, and the fingerprint where it is at hand."""
        values, shown = self.tensors[DENSE_KEY], local(self.param)
        prints = blank(shown) if serves(shown) else None
        return places.apart(values, shown, prints), None if prints is None else prints[1]
