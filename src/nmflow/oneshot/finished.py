"""Blocks that are pruned give what they gave before, so that calibration computes each one twice.

Without it, a pass over the batches for each of L blocks would compute L² / 2 of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

MOST = 1 << 30
"""Bytes of outputs that are kept, beside those of the block that was finished last."""

Outputs = list[list[Any]]
"""By batch, and by call within it."""


class Unlike(Exception):
    """What a block gave before cannot stand for it: another batch, other calls, or no data."""


class Finished:
    """What finished blocks gave to each batch.

    Outputs of early blocks, for which there is no room, become tensors without data (`meta`).
    Nothing with data can be computed from them. So where a network reads an early block again (a
    decoder its encoder, a U-net its other side), what reaches the weights has no data either, which
    is seen.

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
        """Have finished blocks give one batch what they gave, and those that are new be watched."""
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
        """What new blocks gave to all batches is known now, and early ones may lose their data."""
        self._given |= self._new
        self._new = {}
        sizes = {name: _bytes(outputs) for name, outputs in self._given.items()}
        for name in list(sizes)[:-1]:
            if sum(sizes.values()) <= self.most:
                return
            if sizes.pop(name):
                self._given[name] = _without_data(self._given[name])

    def forget_pass(self) -> None:
        """As if the pass had not been."""
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
    """What a network may write into without harm."""
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
