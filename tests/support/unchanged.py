"""What an error must leave as it was: a model and its optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from nmflow.errors import NMFlowError

HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
)
HOOKS += ("_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_pre_hooks")
HOOKS += ("_optimizer_load_state_dict_post_hooks",)


@dataclass
class Snapshot:
    """Everything of a model and its optimizer that an error must leave alone."""

    weights: dict[str, torch.Tensor]
    versions: dict[str, int]
    ids: dict[str, int]
    modules: list[tuple[str, type, int]]
    state: Any
    hooks: list[int] = field(default_factory=list)
    attributes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any) -> Snapshot:
        named = dict(model.named_parameters())
        state = copy.deepcopy(getattr(optimizer, "state", None) and dict(optimizer.state))
        groups = copy.deepcopy(
            [
                {k: v for k, v in group.items() if k != "params"}
                for group in getattr(optimizer, "param_groups", [])
            ]
        )
        return cls(
            {name: p.detach().clone() for name, p in named.items()},
            {name: p._version for name, p in named.items()},
            {name: id(p) for name, p in named.items()},
            [
                (name, type(module), len(module._forward_hooks) + len(module._forward_pre_hooks))
                for name, module in model.named_modules()
            ],
            (None if state is None else list(state.values()), groups),
            [len(getattr(optimizer, name, ())) for name in HOOKS],
            frozenset(getattr(optimizer, "__dict__", ())),
        )

    def assert_unchanged(self, model: nn.Module, optimizer: Any) -> None:
        now = Snapshot.of(model, optimizer)
        for name, weight in self.weights.items():
            same = torch.equal(weight.nan_to_num(), now.weights[name].nan_to_num())
            assert same, f"{name} changed"
        assert now.versions == self.versions
        assert now.ids == self.ids
        assert now.modules == self.modules
        assert now.hooks == self.hooks
        assert str(now.state) == str(self.state)


def says(error: BaseException, *words: str) -> None:
    """One sentence, with these words in it."""
    message = str(error)
    assert isinstance(error, NMFlowError)
    assert isinstance(error, ValueError)
    assert "\n\n" not in message
    assert len(message) > 20
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


@contextmanager
def refused(
    model: nn.Module, optimizer: Any, kind: type[NMFlowError], *words: str
) -> Iterator[None]:
    before = [Snapshot.of(model, one) for one in _list(optimizer)]
    with pytest.raises(kind) as caught:
        yield
    says(caught.value, *words)
    for snapshot, one in zip(before, _list(optimizer), strict=True):
        snapshot.assert_unchanged(model, one)
    for one in _list(optimizer):  # and nothing stands in the way of a right call
        if isinstance(one, torch.optim.Optimizer):
            assert not [key for group in one.param_groups for key in group if "nmflow" in str(key)]


def _list(optimizer: Any) -> list[Any]:
    return list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
