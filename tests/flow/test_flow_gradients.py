"""Gradients that are missing or computed twice, and tied weights."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from harness import (
    Run,
    all_hold,
    assert_near,
    assert_same,
    dense_of,
    parameters_of,
    reference_step,
    twin,
)
from models import BY_ID as FAMILY
from models import MLP, Family, Spec, loss_of
from settings import BY_ID, CASES, OPTIMIZERS, TOTAL, Case


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [
        *itertools.product(
            ["sr-ste-at-once", "mdgf-linear-masked", "one-shot", "settling"], OPTIMIZERS
        ),
        ("step", "adamw-foreach"),
    ],
)
def test_gradients_that_are_missing(case: str, optimizer: str) -> None:
    """A parameter without a gradient is not stepped and has late state; it decays all the same."""
    make = OPTIMIZERS[optimizer]
    run = Run(MLP, BY_ID[case], make, attached=False)
    ref = twin(run, make)
    run.attach()
    for k, x in enumerate(MLP.batches(TOTAL)):
        for one, forward in ((run, run.model), (ref, ref)):
            one.optimizer.zero_grad()
            loss_of(forward(x)).backward()
            if k < 4:
                one.model.get_parameter("0.weight").grad = None
            if k in (5, 6, 9):
                one.model.get_parameter("2.weight").grad = None
        run.optimizer.step()
        ref.step()
        assert_near(parameters_of(run.model), ref.weights(), f"step {k}")
    assert all_hold(run.model, MLP.targets, MLP.pattern)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.kind != "STEP"], ids=lambda case: case.id
)
def test_a_parameter_that_is_never_stepped_still_ends_in_the_pattern(
    case: Case, optimizer: str
) -> None:
    run = Run(MLP, case, OPTIMIZERS[optimizer])
    first = run.model.get_parameter("0.weight")
    dense = dense_of(run)["0.weight"]
    for x in MLP.batches(TOTAL):
        run.optimizer.zero_grad()
        loss_of(run.model(x)).backward()
        first.grad = None
        run.optimizer.step()
    assert torch.equal(dense_of(run)["0.weight"], dense)
    assert case.kind == "Dense" or all_hold(run.model, MLP.targets, MLP.pattern)
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    again = Run(MLP, case, OPTIMIZERS[optimizer], seed=9, attached=False)
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.attach()
    again.train(MLP.batches(1))  # state that is built now, after all
    run.train(MLP.batches(1))
    assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_step_without_any_gradient_counts() -> None:
    """The schedule is in optimizer steps: `step()` was called, so k moves."""
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(4))
    run.optimizer.zero_grad()
    run.optimizer.step()
    assert run.flow.steps_done == 5


@pytest.mark.parametrize("case", ["mdgf-exp", "sr-ste"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
def test_activation_checkpointing(case: str, reentrant: bool) -> None:
    """A block whose forward runs again in backward sees the same weights."""
    family = FAMILY["encoder-layer"]
    run, free = Run(family, BY_ID[case]), Run(family, BY_ID[case])
    for x in family.batches(TOTAL):
        run.optimizer.zero_grad()
        x = x.requires_grad_(reentrant)
        loss_of(checkpoint(run.model, x, use_reentrant=reentrant)).backward()  # type: ignore[arg-type]
        run.optimizer.step()
        free.step(x.detach())
    assert_same(parameters_of(run.model), parameters_of(free.model))


def test_a_parameter_on_two_modules_is_one_target() -> None:
    """Tied weights are masked once, and stay tied."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = nn.Linear(8, 8)
            self.two.weight = self.one.weight
            self.last = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.two(torch.tanh(self.one(x)))))

    family = Family("tied", Tied, (8,), {"one.weight": Spec()}, include=["one.*"])
    run = Run(family, BY_ID["mdgf-linear-masked"], attached=False)
    ref = twin(run)
    run.attach()
    for x in family.batches(TOTAL):
        run.step(x)
        reference_step(ref, x)
    assert_near(parameters_of(run.model), ref.weights())
    assert run.model.get_submodule("two").weight is run.model.get_submodule("one").weight
