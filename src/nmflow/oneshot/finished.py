"""Pruned blocks repeat their recorded outputs, so that calibration computes each one twice.

Otherwise, a pass over the batches for each of L blocks would compute L² / 2 of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

MOST = 1 << 30
"""Bytes of outputs to keep, beside those of the last finished block."""

Outputs = list[list[Any]]
"""By batch, and by call within the batch."""


class Unlike(Exception):
    """The recorded outputs of a block do not fit: another batch, other calls, or no data."""


class Finished:
    """The outputs of finished blocks for each batch.

    Outputs of early blocks, for which there is no room, become tensors without data (`meta`). If a
    network reads an early block again (a decoder its encoder, a U-net its other side), the inputs
    of its weights have no data either, so this is noticed.

    Args:
        model: the network.
        most: bytes of outputs to keep.
    """

    def __init__(self, model: nn.Module, most: int = MOST) -> None:
        self.modules = dict(model.named_modules())
        self.most = most
        self._batches: list[Any] = []
        self._given: dict[str, Outputs] = {}
        self._new: dict[str, Outputs] = {}

    @contextlib.contextmanager
    def around(self, blocks: Sequence[str], index: int, batch: Any) -> Iterator[None]:
        """For one batch, repeat the outputs of finished blocks and record those of new ones."""
        self._check(index, batch)
        with contextlib.ExitStack() as stack:
            for name in blocks:
                module = self.modules.get(name)
                if module is None:
                    continue
                if name in self._given:
                    forward = _replayed(iter(self._given[name][index]))
                else:
                    calls: list[Any] = []
                    self._new.setdefault(name, []).append(calls)
                    forward = _recorded(module.forward, calls)
                stack.enter_context(_stands_in(module, forward))
            yield

    def end_pass(self) -> None:
        """End a pass: new blocks are recorded now, and early ones may lose their data."""
        self._given |= self._new
        self._new = {}
        sizes = {name: _bytes(outputs) for name, outputs in self._given.items()}
        for name in list(sizes)[:-1]:
            if sum(sizes.values()) <= self.most:
                return
            if sizes.pop(name):
                self._given[name] = _without_data(self._given[name])

    def forget_pass(self) -> None:
        """Forget what the pass recorded."""
        self._new = {}

    def _check(self, index: int, batch: Any) -> None:
        if index == len(self._batches) and not self._given:
            self._batches.append(batch)
        if index >= len(self._batches) or not _equal(self._batches[index], batch):
            raise Unlike


def _replayed(calls: Iterator[Any]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        for out in calls:
            return _copied(out)
        raise Unlike

    return forward


def _recorded(forward: Any, calls: list[Any]) -> Any:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if any(t.is_meta for t in _tensors(out)):
            raise Unlike
        calls.append(_copied(out))
        return out

    return recorded


@contextlib.contextmanager
def _stands_in(module: nn.Module, forward: Any) -> Iterator[None]:
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _copied(tree: Any) -> Any:
    """A copy that a network may write into."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)


def _bytes(outputs: Outputs) -> int:
    return sum(t.nbytes for t in _tensors(outputs) if not t.is_meta)


def _without_data(outputs: Outputs) -> Outputs:
    made: Outputs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, outputs)
    return made


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    mappings = isinstance(a, Mapping) and isinstance(b, Mapping)
    if mappings and list(a) != list(b):
        return False
    left, right = (tree_leaves(dict(x) if mappings else x) for x in (a, b))
    return len(left) == len(right) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
        for x, y in zip(left, right, strict=True)
    )
