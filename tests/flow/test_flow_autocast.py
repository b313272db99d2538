"""Inside one autocast context, a network computes with the weights that nmflow has shown last."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmflow

X = torch.linspace(-2, 2, 32).view(4, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def run() -> tuple[nn.Sequential, Any, nmflow.Flow]:
    """A network two steps into a run."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    flow = nmflow.attach(model, optimizer, "mdgf-linear", "1:4", include="*", total_steps=9)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer, flow


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", enabled=False):
        model(X).square().mean().backward()
    optimizer.step()


def within(block: contextlib.AbstractContextManager[None], look: Callable[[], None]) -> None:
    with block:
        look()
    look()


def overwritten(model: nn.Module, flow: nmflow.Flow) -> None:
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(2.0)
    flow.sync()


def reloaded(optimizer: Any) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for one in state["state"].values():
        for key, value in one.items():
            if isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point():
                one[key] = value * 3.0
    optimizer.load_state_dict(state)


WAYS: dict[str, Callable[..., Any]] = {
    "final_masks": lambda model, optimizer, flow, look: within(flow.final_masks(), look),
    "dense": lambda model, optimizer, flow, look: within(flow.dense(), look),
    "a step": lambda model, optimizer, flow, look: (step(model, optimizer), look()),
    "sync": lambda model, optimizer, flow, look: (overwritten(model, flow), look()),
    "a loaded state": lambda model, optimizer, flow, look: (reloaded(optimizer), look()),
    "finalize": lambda model, optimizer, flow, look: (flow.finalize(), look()),
    "detach": lambda model, optimizer, flow, look: (flow.detach(), look()),
}


def fresh(model: nn.Module) -> Tensor:
    """What a network computes in a context of its own, with nothing kept."""
    copied = copy.deepcopy(model)
    return copied(X)


@contextlib.contextmanager
def one_context() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        yield


@pytest.mark.parametrize("name", WAYS)
def test_what_is_shown_is_what_autocast_computes_with(name: str) -> None:
    model, optimizer, flow = run()
    seen = []
    with one_context():
        seen.append(model(X))

        def look() -> None:
            seen.append(model(X))
            assert torch.equal(seen[-1], fresh(model))

        with torch.enable_grad():
            WAYS[name](model, optimizer, flow, look)
    assert len(seen) > 1
    assert not torch.equal(seen[0], seen[1])


COPIES: dict[str, Callable[..., Any]] = {
    "finalize_copy": lambda flow, other, look: (flow.finalize_copy(other), look()),
    "final_masks of a copy": lambda flow, other, look: within(flow.final_masks(other), look),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_computed_with_as_it_is_shown(name: str) -> None:
    _, _, flow = run()
    other = network()
    with one_context():
        before = other(X)
        seen = []

        def look() -> None:
            seen.append(other(X))
            assert torch.equal(seen[-1], fresh(other))

        COPIES[name](flow, other, look)
    assert not torch.equal(before, seen[0])


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pruned_network_is_computed_with(method: str) -> None:
    model = network()
    more: dict[str, Any] = {} if method == "magnitude" else {"calibration": [X, X + 1]}
    with one_context():
        before = model(X)
        nmflow.prune(model, "1:4", include="*", method=method, **more)
        after = model(X)
        assert torch.equal(after, fresh(model))
    assert not torch.equal(before, after)
