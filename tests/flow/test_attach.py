"""`attach` is all or nothing, and says what was probably meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
from harness import Run
from models import MLP, loss_of
from nmflow.errors import FlowError, RecipeError, WeightError
from nmflow.flow import guard, owners, resume, slots
from settings import BY_ID, OPTIMIZERS
from unchanged import Snapshot, refused


def _attach(model: nn.Module, optimizer: Any, **more: Any) -> nmflow.Flow:
    return nmflow.attach(
        model, optimizer, **{"pattern": "1:4", "include": MLP.include, "total_steps": 9, **more}
    )


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("at", range(12))
def test_attach_is_all_or_nothing(at: int, resumed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something raises at the n-th thing that `attach` does to the second of two optimizers."""
    source = Run(MLP, BY_ID["ste-at-once"], attached=False)

    def split(model: nn.Module) -> list[torch.optim.Optimizer]:
        halves = [model.get_submodule(name).parameters() for name in ("0", "2")]
        return [torch.optim.AdamW(half, lr=0.1) for half in halves]

    model = source.model
    optimizers = split(model)
    flow = None
    if resumed:
        flow = _attach(model, optimizers)
    for x in MLP.batches(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model(x)).backward()
        for optimizer in optimizers:
            optimizer.step()
    if flow is not None:  # a new process: the state without the hooks
        model, optimizers = copy.deepcopy((model, optimizers))
        with torch.no_grad():
            model.get_parameter("0.weight").fill_(0.5)
    before = [Snapshot.of(model, optimizer) for optimizer in optimizers]
    done = [0]

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            done[0] += 1
            if done[0] == at + 4:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return wrapper

    for name in [n for n in dir(torch.optim.Optimizer) if n.startswith("register_")]:
        monkeypatch.setattr(
            torch.optim.Optimizer, name, counted(getattr(torch.optim.Optimizer, name))
        )
    for home, name in (
        (owners, "add"),
        (guard.Guard, "__init__"),
        (slots.Slot, "start"),
        (slots.Slot, "adopt"),
        (slots.Slot, "write"),
        (resume, "adopt"),
    ):
        monkeypatch.setattr(home, name, counted(getattr(home, name)))
    with pytest.raises(KeyboardInterrupt):
        _attach(model, optimizers)
    monkeypatch.undo()
    for snapshot, optimizer in zip(before, optimizers, strict=True):
        now = Snapshot.of(model, optimizer)
        for name, weight in snapshot.weights.items():
            assert torch.equal(weight, now.weights[name])
        assert (now.hooks, now.modules, now.ids) == (snapshot.hooks, snapshot.modules, snapshot.ids)
        assert str(now.state) == str(snapshot.state)
        assert now.attributes == snapshot.attributes
    assert _attach(model, optimizers).steps_done == (2 if resumed else 0)


def test_a_rate_that_a_recipe_needs() -> None:
    model = MLP.build()

    class NoRate(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.data.sub_(p.grad * 0.1)

    optimizer = NoRate(model.parameters())
    with refused(model, optimizer, FlowError, "0.weight", "lr=None", "settling", "mdgf-linear"):
        _attach(model, optimizer)
    flow = _attach(model, optimizer, recipe="mdgf-linear")
    for x in MLP.batches(9):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    flow.finalize()
    assert nmflow.holds(model.get_parameter("0.weight"), "1:4")


def test_weights_on_meta_are_named() -> None:
    model = MLP.build().to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(WeightError, match=r"'0\.weight' is on the meta device.*to_empty"):
        _attach(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_second_flow_on_one_optimizer_is_told_of_mappings() -> None:
    model = MLP.build()
    optimizer = OPTIMIZERS["adamw-foreach"](model.parameters())
    flow = _attach(model, optimizer, include="0.*")
    with pytest.raises(FlowError, match=r"attach once, with a mapping.*ModuleList"):
        _attach(model, optimizer, include="2.*")
    flow.finalize()
    _attach(model, optimizer, include="2.*")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("setling", "did you mean 'settling'"),
        ("mdfg-linear", "did you mean 'mdgf-linear'"),
        ("SR-STE", "did you mean 'sr-ste'"),
        ("1:16", "did you mean pattern='1:16'"),
        ("1:16@64", "did you mean pattern='1:16@64'"),
        (nmflow.Pattern("2:4"), "did you mean pattern='2:4'"),
        ({"ff": "1:16"}, "did you mean pattern="),
        (nmflow.STE, r"did you mean STE\(\)"),
        ("nonsense", "choose one of dense"),
    ],
)
def test_a_recipe_that_is_none(recipe: Any, words: str) -> None:
    model = MLP.build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(RecipeError, match=words):
        nmflow.attach(model, optimizer, recipe, total_steps=9)


@pytest.mark.parametrize(
    ("include", "exclude", "when", "warned"),
    [
        ("*", (), "in the optimizer", True),
        ("*", (), "given later", True),
        ("*", (), "in no optimizer", False),
        ("*", (), "never", False),
        ("*", "0", "in the optimizer", False),
        ("2", (), "in the optimizer", False),
    ],
)
def test_a_weight_that_is_thawed_in_mid_run_is_told_of_once(
    include: str, exclude: Any, when: str, warned: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """What the caller meant to prune, and what is trained dense, is no silence."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    first = model[0].requires_grad_(False)
    given = model if when == "in the optimizer" else model[2]
    optimizer = torch.optim.SGD(given.parameters(), 0.1)
    flow = _attach(model, optimizer, include=include, exclude=exclude)
    for k in range(6):
        if k == 2 and when != "never":
            first.requires_grad_(True)
        if k == 3 and when == "given later":
            optimizer.add_param_group({"params": list(first.parameters())})
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    flow.finalize()
    told = [str(w.message) for w in recwarn if issubclass(w.category, nmflow.NMFlowWarning)]
    assert len(told) == warned
    if warned:
        assert "'0.weight' was frozen" in told[0]
        assert f"since step {4 if when == 'given later' else 3} or" in told[0]


@pytest.mark.parametrize("norms", [3, [torch.ones(16)], torch.ones(16), "norms"])
def test_norms_are_a_mapping(norms: Any) -> None:
    model = nn.Linear(16, 4)
    with pytest.raises(WeightError, match=r"norms is a \w+: give"):
        _attach(model, torch.optim.SGD(model.parameters(), 0.1), include="*", norms=norms)
