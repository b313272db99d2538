"""Optimizers of every make: right under a recipe, or refused before anything is lost.

What is tried are mechanisms, whatever the optimizer is called: who writes the weights, where, when,
and what becomes of the state.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import optimizer_zoo as zoo
from harness import Run, all_hold, assert_near, assert_same, dense_of, parameters_of
from models import MLP, loss_of
from nmflow.errors import FlowError
from pairs import pairwise
from settings import BY_ID, CASES, TOTAL, Case

REFUSED = {"LBFGS"}
NOT_TRIED = {"SparseAdam"}  # it takes sparse gradients only, see below


@pytest.mark.parametrize("name", zoo.of_torch())
def test_every_optimizer_of_torch(name: str) -> None:
    said, _ = zoo.verdict(zoo.of_torch()[name])
    assert said == ("refused" if name in REFUSED else "not tried" if name in NOT_TRIED else "works")


@pytest.mark.slow
@pytest.mark.parametrize("source", [name for name in zoo.SOURCES if name != "torch.optim"])
def test_every_optimizer_of_a_package(source: str) -> None:
    if importlib.util.find_spec(source) is None:
        pytest.skip(f"{source} is not installed")
    makes = zoo.SOURCES[source]()
    found = {name: zoo.verdict(make) for name, make in makes.items()}
    assert any(said == "works" for said, _ in found.values())


VARIANTS: dict[str, Any] = {
    "adamw-maximize": lambda p: torch.optim.AdamW(p, lr=0.02, maximize=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "adam-decoupled": lambda p: torch.optim.Adam(p, lr=0.02, decoupled_weight_decay=True),
    "sgd-nesterov-single": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, foreach=False
    ),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "sgd-differentiable": lambda p: torch.optim.SGD(p, lr=0.1, differentiable=False),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "sgd-tensor-rate": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), foreach=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_an_optimizer(name: str) -> None:
    assert zoo.verdict(lambda m: VARIANTS[name](m.parameters())) == ("works", "")


# --- optimizers that go uphill ----------------------------------------------------------------

UPHILL: dict[str, Any] = {
    "foreach": lambda p, up: torch.optim.AdamW(p, lr=0.02, foreach=True, maximize=up),
    "fused": lambda p, up: torch.optim.AdamW(p, lr=0.02, fused=True, maximize=up),
    "single": lambda p, up: torch.optim.AdamW(p, lr=0.02, foreach=False, maximize=up),
    "sgd": lambda p, up: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=up),
}


@pytest.mark.parametrize(
    ("case", "how", "dtype"),
    [
        row
        for row in pairwise(CASES, list(UPHILL), [torch.float32, torch.float64])
        if row.values[0].kind != "STEP" or row.values[1] != "sgd"  # which has no second moment
    ],
)
def test_maximizing_is_minimizing_the_negative(case: Case, how: str, dtype: torch.dtype) -> None:
    ends = []
    for up in (False, True):
        run = Run(MLP, case, lambda p, up=up: UPHILL[how](p, up), dtype=dtype)
        for x in MLP.batches(TOTAL, dtype):
            run.optimizer.zero_grad()
            loss = loss_of(run.model(x))
            (-loss if up else loss).backward()
            run.optimizer.step()
        ends.append(parameters_of(run.model))
    assert_near(*ends)


# --- who writes the weights -------------------------------------------------------------------


class _Written(torch.optim.Optimizer):
    """Gradient descent, in one of the ways to write it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def params(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


class InPlace(_Written):
    def step(self, closure: Any = None) -> None:
        for p in self.params():
            p.data.sub_(p.grad * 0.1)


class Rebinds(_Written):
    """Twelve lines of a paper's code: a new tensor at every step."""

    def step(self, closure: Any = None) -> None:
        for p in self.params():
            p.data = p.data - p.grad * 0.1


class SetsData(_Written):
    """`torch.Tensor.set_`, with which memory changes and the tensor does not."""

    def step(self, closure: Any = None) -> None:
        for p in self.params():
            with torch.no_grad():
                p.set_((p - p.grad * 0.1).detach())


class Flat(_Written):
    """One flat buffer, of which every parameter becomes a view at the first step."""

    flat: torch.Tensor | None = None

    def step(self, closure: Any = None) -> None:
        params = self.params()
        if self.flat is None:
            self.flat = torch.cat([p.data.flatten() for p in params])
            parts = self.flat.split([p.numel() for p in params])
            for p, part in zip(params, parts, strict=True):
                p.data = part.view_as(p)
        for p in params:
            p.data.sub_(p.grad * 0.1)


class ClearsGradients(_Written):
    def step(self, closure: Any = None) -> None:
        for p in self.params():
            p.data.sub_(p.grad * 0.1)
        self.zero_grad(set_to_none=True)


class RepeatsClosure(_Written):
    def step(self, closure: Any = None) -> None:
        closure()
        closure()


class Perturbs(_Written):
    """Sharpness-aware: up the gradient, a second pass, and back by `p.data = old`."""

    def step(self, closure: Any = None) -> None:
        old = [p.data.clone() for p in self.params()]
        for p in self.params():
            p.data.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p, before in zip(self.params(), old, strict=True):
            p.data = before
            p.data.sub_(p.grad * 0.1)


class KeepsMemory(_Written):
    """It steps the memory that the parameters had when it was built."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.kept = [(p, p.data) for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        for p, memory in self.kept:
            memory.sub_(p.grad * 0.1)


class Halves(_Written):
    """It gives the parameters another dtype."""

    def step(self, closure: Any = None) -> None:
        for p in self.params():
            p.data = (p.data - p.grad * 0.1).to(torch.bfloat16)


@pytest.mark.parametrize("kind", [Rebinds, SetsData, Flat, ClearsGradients])
@pytest.mark.parametrize("case", ["settling", "mdgf-linear-masked", "sr-ste", "ste-interval"])
def test_however_the_weights_are_written(case: str, kind: type) -> None:
    runs = [Run(MLP, BY_ID[case], make) for make in (InPlace, kind)]
    for run in runs:
        run.train(MLP.batches(TOTAL))
        assert run.flow.steps_done == TOTAL
    assert_same(parameters_of(runs[0].model), parameters_of(runs[1].model))
    assert_same(dense_of(runs[0]), dense_of(runs[1]))
    for run in runs:
        run.flow.finalize()
        assert all_hold(run.model, MLP.targets, MLP.pattern)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Perturbs, "moved the weights before it called its closure"),
        (RepeatsClosure, "called its closure twice"),
        (KeepsMemory, "stepped memory of its own"),
        (Halves, "bfloat16"),
    ],
)
@pytest.mark.parametrize("case", ["settling", "mdgf-linear-masked", "ste-at-once"])
def test_what_cannot_be_right_is_refused_at_the_first_step(
    case: str, kind: type, words: str
) -> None:
    run = Run(MLP, BY_ID[case], kind)
    shown, dense = parameters_of(run.model), dense_of(run)
    x = MLP.batches(1)[0]

    def closure() -> torch.Tensor:
        run.optimizer.zero_grad()
        loss = loss_of(run.model(x))
        loss.backward()
        return loss

    closure()
    given: Any = (closure,) if kind in (Perturbs, RepeatsClosure) else ()
    with pytest.raises(FlowError, match=words):
        run.optimizer.step(*given)
    assert_same({n: parameters_of(run.model)[n] for n in dense}, {n: shown[n] for n in dense})
    if case != "settling" or kind in (Perturbs, RepeatsClosure):
        assert_same(dense_of(run), dense)
    assert run.flow.steps_done == 0


class Masters(_Written):
    """Half-precision weights, written at every step from a copy of float32 in the state."""

    def step(self, closure: Any = None) -> None:
        for p in self.params():
            state = self.state[p]
            if "master" not in state:
                state["master"] = p.data.float()
            state["master"].sub_(p.grad.float() * 0.1)
            p.data.copy_(state["master"])


def test_finer_weights_in_the_state_cannot_be_drawn() -> None:
    """A pull of the half-precision weights would be overwritten; other recipes are right."""
    for case, fine in (("settling", False), ("mdgf-exp-masked", True)):
        run = Run(MLP, BY_ID[case], Masters, dtype=torch.bfloat16)
        batches = MLP.batches(TOTAL, torch.bfloat16)
        if fine:
            run.train(batches)
            assert all_hold(run.model, MLP.targets, MLP.pattern)
            continue
        run.train(batches[:1])
        dense = dense_of(run)
        with pytest.raises(FlowError, match=r"'0\.weight' is overwritten.*'master'.*mdgf-linear"):
            run.train(batches[1:])
        assert_same(dense_of(run), dense)


def test_the_page_of_optimizers_is_current() -> None:
    """`python scripts/optimizer_table.py` writes it; of torch's own it can always be checked."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "optimizers.md").read_text(encoding="utf-8")
    part = text.split("\n## torch.optim\n")[1].split("\n## ")[0]
    works, _, rest = part.partition("| optimizer |")
    for name in zoo.of_torch():
        line = next((row for row in rest.splitlines() if row.startswith(f"| `{name}` |")), "")
        said = "refused" if name in REFUSED else "not tried" if name in NOT_TRIED else ""
        assert (f"`{name}`" in works) == (not said), name
        assert said in line, name
