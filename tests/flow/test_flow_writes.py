"""Weights that somebody writes between two steps, and sync()."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import reference
from harness import (
    Run,
    all_hold,
    assert_same,
    dense_of,
    parameters_of,
    use,
)
from models import MLP, loss_of
from nmflow.errors import StateError, WeightError
from settings import BY_ID, TOTAL


@torch.no_grad()
def _write(model: nn.Module, how: str, x: float = 0.25) -> None:
    weight = model.get_parameter("0.weight")
    if how == "add":
        weight.add_(x)
    elif how == "copy":
        weight.copy_(torch.full_like(weight, x))
    elif how == "item":
        weight[0, 0] = 123.0
    elif how == "data":
        weight.data = torch.full_like(weight, x)
    else:
        state = {name: torch.full_like(p, x) for name, p in model.state_dict().items()}
        model.load_state_dict(state)


@pytest.mark.parametrize("how", ["add", "copy", "item", "data", "load_state_dict"])
@pytest.mark.parametrize("case", ["ste-at-once", "mdgf-linear", "one-shot"])
@pytest.mark.parametrize("then", ["step", "final_masks", "finalize"])
def test_a_write_between_steps_is_refused_by_name(then: str, case: str, how: str) -> None:
    run = Run(MLP, BY_ID[case])
    batches = MLP.batches(6)
    run.train(batches[:3])
    run.optimizer.zero_grad()
    loss_of(run.model(batches[3])).backward()
    dense = dense_of(run)
    _write(run.model, how)
    written = parameters_of(run.model)
    exp_avg = run.optimizer.state[run.model.get_parameter("0.weight")]["exp_avg"].clone()
    for _ in range(2):  # it stays an error until it is mended
        with pytest.raises(StateError) as caught:
            use(run, then)
    assert "0.weight" in str(caught.value)
    assert "sync" in str(caught.value)
    assert run.flow.steps_done == 3
    assert_same(parameters_of(run.model), written)
    assert_same(dense_of(run), dense)
    now = run.optimizer.state[run.model.get_parameter("0.weight")]["exp_avg"]
    assert torch.equal(now, exp_avg)


@pytest.mark.parametrize("case", ["ste-at-once", "mdgf-linear"])
def test_sync_takes_what_was_written_as_dense(case: str) -> None:
    run = Run(MLP, BY_ID[case])
    batches = MLP.batches(TOTAL)
    run.train(batches[:3])
    other = dense_of(run)["2.weight"]
    with torch.no_grad():
        new = torch.randn_like(run.model.get_parameter("0.weight"))
        run.model.get_parameter("0.weight").copy_(new)
    run.flow.sync()
    assert run.flow.steps_done == 3
    assert torch.equal(dense_of(run)["0.weight"], new)
    assert torch.equal(dense_of(run)["2.weight"], other)  # which nobody wrote
    kept = reference.keep(new, 1, 4)
    delta = run.flow.stage.delta
    assert torch.equal(run.model.get_parameter("0.weight"), torch.where(kept, new, new * delta))
    run.train(batches[3:])
    assert run.flow.steps_done == TOTAL
    assert all_hold(run.model, MLP.targets, MLP.pattern)


def test_equal_writes_are_no_writes() -> None:
    """`load_state_dict` of the model's own values, an EMA swap and back, a broadcast."""
    run, free = Run(MLP, BY_ID["ste-at-once"]), Run(MLP, BY_ID["ste-at-once"])
    batches = MLP.batches(TOTAL)
    for x in batches:
        own = copy.deepcopy(run.model.state_dict())
        _write(run.model, "copy")
        run.model.load_state_dict(own)
        run.step(x)
        free.step(x)
    assert_same(parameters_of(run.model), parameters_of(free.model))


def test_sync_where_nothing_was_written_changes_nothing() -> None:
    run, free = Run(MLP, BY_ID["sr-ste"]), Run(MLP, BY_ID["sr-ste"])
    for x in MLP.batches(TOTAL):
        run.flow.sync()
        run.step(x)
        free.step(x)
    assert_same(parameters_of(run.model), parameters_of(free.model))
    assert_same(dense_of(run), dense_of(free))


def test_other_parameters_may_be_written() -> None:
    run = Run(MLP, BY_ID["ste-at-once"])
    batches = MLP.batches(4)
    run.train(batches[:2])
    with torch.no_grad():
        run.model.get_parameter("0.bias").fill_(3.0)
    run.train(batches[2:])
    assert float(run.model.get_parameter("0.bias").detach().mean()) > 2.5


def test_weights_that_turn_nan_are_named() -> None:
    run = Run(MLP, BY_ID["ste-at-once"])
    run.train(MLP.batches(3))
    with pytest.raises(WeightError, match=r"0\.weight"):
        run.train([MLP.batches(1)[0] * float("nan"), MLP.batches(1)[0]])
