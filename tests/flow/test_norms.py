"""Masks that know the activations: norms that do not fit, and runs that are resumed with others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nmflow
from harness import Run, parameters_of, through_file
from models import MLP
from nmflow.errors import NMFlowError, PlanError, StateError, WeightError
from settings import BY_ID, NORMS, Case

CASE = BY_ID["ste-norms"]


@pytest.mark.parametrize(
    ("norms", "error", "said"),
    [
        ({"0.weight": NORMS["0.weight"]}, PlanError, ("norms", "2.weight", "32")),
        ({**NORMS, "1.weight": torch.ones(3)}, PlanError, ("norms", "1.weight")),
        ({**NORMS, "0.weight": torch.ones(15)}, WeightError, ("0.weight", "15", "16")),
        ({**NORMS, "0.weight": -torch.ones(16)}, WeightError, ("0.weight", "negative")),
        ({**NORMS, "0.weight": torch.full((16,), torch.nan)}, WeightError, ("0.weight", "NaN")),
        ({**NORMS, "0.weight": [1.0] * 16}, WeightError, ("0.weight", "list")),
        ({}, PlanError, ("norms", "0.weight")),
    ],
)
def test_norms_that_do_not_fit(
    norms: dict[str, torch.Tensor], error: type[NMFlowError], said: tuple[str, ...]
) -> None:
    run = Run(MLP, Case("", "STE"), attached=False)
    before = parameters_of(run.model)
    with pytest.raises(error) as caught:
        nmflow.attach(
            run.model, run.optimizer, "ste", "1:4", MLP.include, total_steps=4, norms=norms
        )
    assert all(word in str(caught.value) for word in said)
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())


def test_a_run_is_resumed_with_the_same_norms_alone() -> None:
    run = Run(MLP, CASE)
    run.train(MLP.batches(3))
    state = through_file(run.optimizer.state_dict())
    other = {**NORMS, "0.weight": NORMS["0.weight"] + 1}
    plain = Case("", "STE", {"dense": 2})
    for case in (plain, Case("", "STE", {"dense": 2}, {"norms": other})):
        again = Run(MLP, case, attached=False)
        again.optimizer.load_state_dict(state)
        with pytest.raises(StateError, match="norms"):
            again.attach()
    bare = Run(MLP, plain)
    bare.train(MLP.batches(3))
    again = Run(MLP, CASE, attached=False)
    again.optimizer.load_state_dict(through_file(bare.optimizer.state_dict()))
    with pytest.raises(StateError, match="norms"):
        again.attach()


def test_a_copy_is_pruned_by_the_norms_too() -> None:
    run = Run(MLP, CASE)
    run.train(MLP.batches(2))
    average = torch.optim.swa_utils.AveragedModel(run.model)
    weight = average.module.get_parameter("0.weight").clone()
    run.flow.finalize_copy(average)
    kept = nmflow.mask(nmflow.masks.wanda_score(weight, NORMS["0.weight"]), MLP.pattern)
    assert torch.equal(average.module.get_parameter("0.weight") != 0, kept)


def test_an_input_that_is_always_zero_is_dropped_first() -> None:
    """However large its weights are."""
    model = nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[9.0, 1.0, 2.0, 3.0], [1.0, 9.0, 3.0, 2.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = {"weight": torch.tensor([0.0, 1.0, 1.0, 1.0])}
    nmflow.attach(model, optimizer, "ste", "2:4", "*", total_steps=3, norms=norms)
    assert model.weight.tolist() == [[0.0, 0.0, 2.0, 3.0], [0.0, 9.0, 3.0, 0.0]]
