"""The inputs of a weight while a network runs, caught in torch's matrix products.

It needs no knowledge of modules. A dispatch mode sees every `mm`, `addmm`, `bmm` and `baddbmm`, and
every grouped product of experts. The storage of an operand tells the parameter, the matrix of a
stack, and the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nmflow.errors import WeightError
from nmflow.select.target import Target

_aten = torch.ops.aten
# The place of the first factor among the arguments.
_PRODUCTS: dict[Any, int] = {
    _aten.mm.default: 0,
    _aten.addmm.default: 1,
    _aten.bmm.default: 0,
    _aten.baddbmm.default: 1,
}
# Products of `(tokens, in)`, sorted by expert, with a stack; the third argument is where each
# expert's tokens end. transformers has an op of its own for what torch's cannot do.
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


class Seen(NamedTuple):
    """A product with a watched weight.

    Attributes:
        name: the parameter.
        matrix: the number of the matrix in a stack; 0 for a plain weight.
        start, stop: its output rows.
        inputs: `(tokens, in)`.
    """

    name: str
    matrix: int
    start: int
    stop: int
    inputs: Tensor


class Done(Exception):
    """A receiver raises this to end a forward pass."""


class Watch(TorchDispatchMode):
    """Call `receive` before each product with a target's weight."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        targets: Iterable[Target],
        receive: Callable[[Seen], None],
    ) -> None:
        super().__init__()
        self.receive = receive
        self.targets = {target.name: target for target in targets}
        self.params = {name: params[name] for name in self.targets}
        self._by_storage = {p.untyped_storage().data_ptr(): n for n, p in self.params.items()}
        self._casts: dict[int, tuple[Tensor, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        grouped = func._schema.name in _GROUPED
        at = 0 if grouped else _PRODUCTS.get(func)
        if at is not None:
            left, right = args[at], args[at + 1]
            ends = (*args[2:3], kwargs.get("offs"))[0] if grouped else None
            # Inputs are on the left, as in nn.Linear, or on the right, as columns.
            for factor, inputs in ((right, left), (left, right.mT)):
                name = self._by_storage.get(factor.untyped_storage().data_ptr())
                if name is not None:
                    stack = factor if factor is right else factor.mT
                    self._tell(name, stack, inputs if ends is None else _groups(inputs, ends))
        out = func(*args, **kwargs)
        if func is _aten._to_copy.default:
            self._follow(args[0], out)
        return out

    def _follow(self, x: Tensor, cast: Tensor) -> None:
        """Know a cast of a weight as the weight, as autocast makes it."""
        name = self._by_storage.get(x.untyped_storage().data_ptr())
        if name is None or cast.stride() != x.stride():
            return
        # The cast is held, so that nothing else gets its memory.
        place = cast.untyped_storage().data_ptr()
        self._by_storage[place] = name
        self._casts[place] = cast, self._offset(x) - int(cast.storage_offset())

    def _offset(self, x: Tensor) -> int:
        """Where a weight's view or cast begins in the storage of the weight."""
        _, moved = self._casts.get(x.untyped_storage().data_ptr(), (x, 0))
        return int(x.storage_offset()) + moved

    def _tell(self, name: str, factor: Tensor, inputs: Any) -> None:
        """Pass a product on; `factor` is `(in, out)`, with a leading axis for several `inputs`."""
        target, param = self.targets[name], self.params[name]
        if factor.ndim == 3:
            for one, x in zip(factor, inputs, strict=True):
                self._tell(name, one, x)
            return
        offset = self._offset(factor) - int(param.storage_offset())
        size = param.stride(0) if target.stacked else offset + 1
        matrix, inside = offset // size, offset % size
        row = param.stride(target.out_dim)
        if factor.stride(0) != param.stride(target.dim) or (row and inside % row):
            raise WeightError(
                f"'{name}' is multiplied along another axis than its groups, or from the middle of "
                "one: exclude it, or prune it by magnitude"
            )
        start = inside // row
        self.receive(Seen(name, matrix, start, start + factor.shape[1], inputs.detach()))


def _groups(inputs: Tensor, ends: Tensor) -> Sequence[Tensor]:
    """The rows of each group; a group's rows stop at its entry of `ends`."""
    if ends.is_meta:  # nobody knows how many, and the receiver refuses inputs without values
        return [inputs] * len(ends)
    return [inputs[start:stop] for start, stop in itertools.pairwise([0, *ends.tolist()])]
