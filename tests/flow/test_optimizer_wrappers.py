"""Optimizers that wrap another: refused for the inner one, which works."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch

import nmflow
from harness import Run, assert_near, parameters_of, twin
from models import MLP, loss_of
from nmflow.errors import FlowError
from settings import BY_ID, TOTAL
from unchanged import refused


class Sam(torch.optim.Optimizer):
    """The usual form: a base optimizer over the same groups."""

    def __init__(self, params: Any, base: Any, **kwargs: Any) -> None:
        super().__init__(params, {"rho": 0.05, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old"]
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """It never calls `Optimizer.__init__`, and has two of its six dictionaries of hooks."""

    def __init__(self, base: Any) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self.param_groups, self.defaults = base.param_groups, base.defaults
        self.state = defaultdict(dict)
        self.wrapped = [base]

    def step(self, closure: Any = None) -> Any:
        return self.wrapped[0].step(closure)


class Hookless(Lookahead):
    """The same without an inner optimizer that could be found."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.wrapped = []


WRAPPERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sam": (lambda m: Sam(m.parameters(), torch.optim.AdamW, lr=0.1), ("base_optimizer", "AdamW")),
    "lookahead": (
        lambda m: Lookahead(torch.optim.AdamW(m.parameters(), lr=0.1)),
        ("wrapped", "AdamW"),
    ),
    "hookless": (
        lambda m: Hookless(torch.optim.AdamW(m.parameters(), lr=0.1)),
        ("Optimizer.__init__",),
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_refused_for_what_it_wraps(name: str) -> None:
    build, words = WRAPPERS[name]
    model = MLP.build()
    optimizer = build(model)
    with refused(model, optimizer, FlowError, *words):
        nmflow.attach(model, optimizer, pattern="1:4", include="0.*", total_steps=9)
    base = torch.optim.AdamW(model.parameters())
    nmflow.attach(model, base, pattern="1:4", include="0.*", total_steps=9)


def test_sam_on_the_base_optimizer() -> None:
    """The weights are perturbed between two steps of the base and put back: right, as it says."""
    run, ref = Run(MLP, BY_ID["settling"], attached=False), None
    sams = []
    ref = twin(run)
    for one in (run, ref):
        sams.append(Sam(one.model.parameters(), torch.optim.SGD, lr=0.1))
        one.optimizer = sams[-1].base_optimizer
    run.attach()
    for x in MLP.batches(TOTAL):
        loss_of(run.model(x)).backward()
        sams[0].first_step()
        loss_of(run.model(x)).backward()
        sams[0].second_step()
        sams[0].zero_grad()
        # The reference by hand: the gradient at W̃ + 0.05 g.
        shown = {n: w.requires_grad_() for n, w in ref.weights().items()}
        out = torch.func.functional_call(ref.model, shown, (x,))
        grads = torch.autograd.grad(loss_of(out), list(shown.values()))
        moved = {
            n: (w.detach() + 0.05 * g).requires_grad_()
            for (n, w), g in zip(shown.items(), grads, strict=True)
        }
        out = torch.func.functional_call(ref.model, moved, (x,))
        for p, g in zip(
            ref.model.parameters(),
            torch.autograd.grad(loss_of(out), list(moved.values())),
            strict=True,
        ):
            p.grad = g
        ref.step()
    assert_near(parameters_of(run.model), ref.weights())
