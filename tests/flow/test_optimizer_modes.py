"""Optimizers of a kind of their own: schedule-free ones, STEP's Adam, sparse gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nmflow
from harness import Run, all_hold, assert_near, assert_same, parameters_of, reference_step, twin
from models import MLP
from nmflow.errors import NMFlowError
from settings import BY_ID, TOTAL


class Older(torch.optim.AdamW):
    """AdamW of torch before 2.7, whose groups do not say that their decay is decoupled."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
        out = super().step(closure)
        for group in self.param_groups:
            del group["decoupled_weight_decay"]
        return out


def test_step_decays_adamw_whose_groups_do_not_say_so() -> None:
    """The class decides."""
    runs = [
        Run(MLP, BY_ID["step"], lambda p, kind=kind: kind(p, lr=0.02, weight_decay=0.5))
        for kind in (torch.optim.AdamW, Older)
    ]
    for run in runs:
        run.train(MLP.batches(TOTAL))
    assert_same(parameters_of(runs[0].model), parameters_of(runs[1].model))


class ScheduleFree(torch.optim.Optimizer):
    """SGD without a schedule: y in training, their average x in evaluation, z in the state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "training": True})

    def _all(self) -> list[Any]:
        return self.param_groups[0]["params"]

    @torch.no_grad()
    def eval(self) -> None:
        if self.param_groups[0]["training"]:
            for p in self._all():
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - 1 / 0.9)
        self.param_groups[0]["training"] = False

    @torch.no_grad()
    def train(self) -> None:
        if not self.param_groups[0]["training"]:
            for p in self._all():
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - 0.9)
        self.param_groups[0]["training"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        if not group["training"]:
            raise RuntimeError("not in train mode")
        group["k"] += 1
        for p in self._all():
            if "z" not in self.state[p]:
                self.state[p]["z"] = p.clone()
            z = self.state[p]["z"]
            p.lerp_(z, 1 / group["k"])
            p.add_(p.grad, alpha=group["lr"] * (0.9 * (1 - 1 / group["k"]) - 1))
            z.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("case", ["settling", "mdgf-linear-masked", "ste-interval", "one-shot"])
def test_a_mode_of_evaluation_shows_its_own_weights_sparse(case: str) -> None:
    """`eval()` and `train()` move the dense weights, and the network shows the sparse ones."""
    run = Run(MLP, BY_ID[case], ScheduleFree, attached=False)
    ref = twin(run, ScheduleFree)
    run.attach()
    for k, x in enumerate(MLP.batches(TOTAL)):
        run.step(x)
        reference_step(ref, x)
        if k % 3 == 2:
            held = dict(ref.held), dict(ref.frozen)
            for one in (run, ref):
                one.optimizer.eval()  # type: ignore[attr-defined]
            if case not in ("ste-interval", "one-shot"):
                assert_near(parameters_of(run.model), ref.weights(), f"evaluated after {k + 1}")
            with run.flow.final_masks():
                assert all_hold(run.model, MLP.targets, MLP.pattern)
            if case != "settling":  # which has drawn its weights when it is refused
                with pytest.raises(RuntimeError, match="train mode"):
                    run.optimizer.step()
            for one in (run, ref):
                one.optimizer.train()  # type: ignore[attr-defined]
            ref.held, ref.frozen = held
            assert_near(parameters_of(run.model), ref.weights(), f"back after {k + 1}")
    run.optimizer.eval()  # type: ignore[attr-defined]
    ref.optimizer.eval()  # type: ignore[attr-defined]
    run.flow.finalize()
    assert all_hold(run.model, MLP.targets, MLP.pattern)
    if case not in ("ste-interval", "one-shot"):
        assert_near(parameters_of(run.model), ref.weights())


def test_a_sparse_gradient_is_taken_or_named() -> None:
    """SparseAdam, on an embedding: right where the recipe leaves gradients alone."""
    for recipe, fine in (("ste", True), ("settling", True), ("sr-ste", False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(8, 16, sparse=True))
        optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.1)
        flow = nmflow.attach(model, optimizer, recipe, "1:4", include="0.*", total_steps=4)
        if not fine:
            model(torch.arange(3)).square().sum().backward()
            with pytest.raises(NMFlowError, match=r"'0\.weight' has a sparse gradient"):
                optimizer.step()
            continue
        for k in range(4):
            optimizer.zero_grad()
            model(torch.arange(k, k + 3)).square().sum().backward()
            optimizer.step()
        flow.finalize()
        assert nmflow.holds(model.get_parameter("0.weight"), "1:4")
