"""Optimizers of every make: right under a recipe, or refused before anything is lost.

What is tried are mechanisms, whatever the optimizer is called: who writes the weights, where, when,
and what becomes of the state.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
import optimizer_zoo as zoo
from harness import Run, all_hold, assert_near, assert_same, dense_of, parameters_of, twin
from models import MLP, loss_of
from nmflow.errors import FlowError, NMFlowError, RecipeError, StateError, WeightError
from settings import BY_ID, CASES, OPTIMIZERS, TOTAL, Case
from unchanged import Snapshot, refused

REFUSED = {"LBFGS"}
NOT_TRIED = {"SparseAdam"}  # it takes sparse gradients only, see below


@pytest.mark.parametrize("name", zoo.of_torch())
def test_every_optimizer_of_torch(name: str) -> None:
    said, _ = zoo.verdict(zoo.of_torch()[name])
    assert said == ("refused" if name in REFUSED else "not tried" if name in NOT_TRIED else "works")


@pytest.mark.slow
@pytest.mark.parametrize("source", [name for name in zoo.SOURCES if name != "torch.optim"])
def test_every_optimizer_of_a_package(source: str) -> None:
    pytest.importorskip(source, exc_type=ImportError) if source != "timm" else None
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", UPHILL)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_maximizing_is_minimizing_the_negative(case: Case, how: str, dtype: torch.dtype) -> None:
    if case.kind == "STEP" and how == "sgd":
        pytest.skip("STEP needs Adam")
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
        (KeepsMemory, "stepped memory that it keeps"),
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


# --- wrappers ---------------------------------------------------------------------------------


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


# --- the state --------------------------------------------------------------------------------


class Silent(torch.optim.AdamW):
    """Its `state_dict` and `load_state_dict` are its own, and call no hooks."""

    def state_dict(self) -> Any:
        index = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        groups = [{**g, "params": [index[id(p)] for p in g["params"]]} for g in self.param_groups]
        state = {index[id(p)]: dict(s) for p, s in self.state.items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Any) -> None:
        state_dict = copy.deepcopy(state_dict)
        params = [p for g in self.param_groups for p in g["params"]]
        state = defaultdict(dict)
        for key, value in state_dict["state"].items():
            state[params[key] if isinstance(key, int) else key] = value
        for group, old in zip(state_dict["param_groups"], self.param_groups, strict=True):
            group["params"] = old["params"]
        self.__setstate__({"state": state, "param_groups": state_dict["param_groups"]})


class Forgetful(torch.optim.AdamW):
    """What it saves is what it knows."""

    def state_dict(self) -> Any:
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.pop("nmflow_step", None)
        return saved


def silent(params: Any) -> Silent:
    return Silent(params, lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize("order", ["amo", "aom", "moa", "oma"])
@pytest.mark.parametrize("k", [0, 1, 7, TOTAL])
@pytest.mark.parametrize("case", ["settling", "one-shot", "hybrid-interval"])
def test_a_state_dict_without_hooks(case: str, k: int, order: str) -> None:
    batches = MLP.batches(TOTAL + 1)
    run = Run(MLP, BY_ID[case], silent)
    run.train(batches[:k])
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.train(batches[k:])
    again = Run(MLP, BY_ID[case], silent, seed=9, attached=False)
    for what in order:
        if what == "m":
            again.model.load_state_dict(saved[0])
        elif what == "o":
            again.optimizer.load_state_dict(saved[1])
        else:
            again.attach()
    assert again.flow.steps_done == k
    again.train(batches[k:])
    assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_state_that_nobody_saw_is_noticed_at_the_next_step() -> None:
    """Put in by `__setstate__`: taken over, and gradients of other weights are not stepped with."""
    batches = MLP.batches(TOTAL)
    run = Run(MLP, BY_ID["settling"], silent)
    run.train(batches[:7])
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.train(batches[7:])
    for loaded in (True, False):
        again = Run(MLP, BY_ID["settling"], silent, seed=9)
        again.train(batches[:1])
        if loaded:
            again.model.load_state_dict(saved[0])
        Silent.load_state_dict(again.optimizer, saved[1])  # past what is on the instance
        again.optimizer.zero_grad()
        loss_of(again.model(batches[7])).backward()
        if not loaded:
            with pytest.raises(StateError, match="backward again"):
                again.optimizer.step()
            assert again.flow.steps_done == 7
            again.model.load_state_dict(saved[0])
            again.train(batches[7:8])
        else:
            again.optimizer.step()
        again.train(batches[8:])
        assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_state_of_another_run_that_nobody_saw_is_refused() -> None:
    run, other = Run(MLP, BY_ID["settling"], silent), Run(MLP, BY_ID["sr-ste"], silent)
    plain = Run(MLP, BY_ID["settling"], silent, attached=False)
    for one in (run, other, plain):
        one.train(MLP.batches(3))
    dense = dense_of(run)
    for state in (other.optimizer.state_dict(), plain.optimizer.state_dict()):
        with pytest.raises(StateError):
            run.optimizer.load_state_dict(copy.deepcopy(state))
        assert run.flow.steps_done == 3
        assert_same(dense_of(run), dense)
    run.train(MLP.batches(1))
    dense = dense_of(run)
    Silent.load_state_dict(run.optimizer, copy.deepcopy(plain.optimizer.state_dict()))
    for _ in range(2):
        with pytest.raises(StateError, match="without a recipe"):
            run.train(MLP.batches(1))
    assert_same(dense_of(run), dense)


def test_an_optimizer_that_saves_too_little_is_refused() -> None:
    model = MLP.build()
    optimizer = Forgetful(model.parameters())
    with refused(model, optimizer, FlowError, "Forgetful", "state_dict"):
        nmflow.attach(model, optimizer, pattern="1:4", include="0.*", total_steps=9)


def _lose(optimizer: Any, how: str) -> None:
    if how == "del":
        for p in list(optimizer.state):
            del optimizer.state[p]
    elif how == "clear":
        optimizer.state.clear()
    elif how == "replace":
        optimizer.state = defaultdict(dict)
    else:
        for p in optimizer.state:
            optimizer.state[p] = {}


@pytest.mark.parametrize("how", ["del", "clear", "replace", "empty"])
@pytest.mark.parametrize("case", ["settling", "one-shot", "settling-interval"])
def test_an_optimizer_whose_state_is_thrown_away_forgets_its_moments_alone(
    case: str, how: str
) -> None:
    batches = MLP.batches(TOTAL)
    run = Run(MLP, BY_ID[case], attached=False)
    ref = twin(run)
    run.attach()
    from harness import reference_step

    for k, x in enumerate(batches):
        if k == 6:
            _lose(run.optimizer, how)
            ref.optimizer.state.clear()
            saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
        run.step(x)
        reference_step(ref, x)
    assert_near(parameters_of(run.model), ref.weights())
    again = Run(MLP, BY_ID[case], seed=9)
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.train(batches[6:])
    assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_state_saved_after_a_group_was_added_is_resumed() -> None:
    batches = MLP.batches(TOTAL)
    runs = []
    for seed in (0, 9):
        run = Run(MLP, BY_ID["settling"], seed=seed, attached=False)
        run.optimizer = torch.optim.AdamW([run.model.get_parameter(n) for n in MLP.targets], lr=0.1)
        run.attach()
        runs.append(run)
    run, again = runs
    run.train(batches[:5])
    for one in runs:
        biases = [one.model.get_parameter(name) for name in ("0.bias", "2.bias")]
        one.optimizer.add_param_group({"params": biases, "lr": 0.01})
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    older = copy.deepcopy(saved[1])
    for key in ("nmflow_step", "nmflow_recipe"):
        older["param_groups"][1].pop(key)
    run.train(batches[5:])
    for state in (saved[1], older):  # as it is saved now, and as it was
        again.model.load_state_dict(saved[0])
        again.optimizer.load_state_dict(copy.deepcopy(state))
        assert again.flow.steps_done == 5
        again.train(batches[5:])
        assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_weight_that_left_the_optimizer_is_named() -> None:
    run = Run(MLP, BY_ID["settling"])
    run.train(MLP.batches(3))
    dense = dense_of(run)
    kept = run.optimizer.param_groups[0]["params"]
    run.optimizer.param_groups[0]["params"] = [p for p in kept if p.dim() == 1]
    with pytest.raises(FlowError, match=r"0\.weight.*no longer in the optimizer"):
        run.train(MLP.batches(1))
    assert_same(dense_of(run), dense)
    run.optimizer.param_groups[0]["params"] = list(kept)
    run.train(MLP.batches(3))
    assert run.flow.steps_done == 6


# --- at attach --------------------------------------------------------------------------------


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

    from nmflow.flow import guard, owners, resume, slots

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
        assert not {"step", "state_dict"} & set(vars(optimizer))
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


# --- STEP and schedule-free -------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw-foreach", "adamw-fused", "adamw-plain"])
def test_step_decays_adamw_whose_groups_do_not_say_so(optimizer: str) -> None:
    """Before torch 2.7 no group has `decoupled_weight_decay`; the class decides."""
    case = BY_ID["step"]
    make = OPTIMIZERS[optimizer]
    runs = [Run(MLP, case, make), Run(MLP, case, make)]
    for x in MLP.batches(TOTAL):
        for group in runs[1].optimizer.param_groups:
            group["decoupled_weight_decay"] = True
        runs[0].step(x)
        settled = runs[1].flow._steppers[0]._steps._frozen
        assert settled == []
        runs[1].step(x)
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
    from harness import reference_step

    for k, x in enumerate(MLP.batches(TOTAL)):
        run.step(x)
        reference_step(ref, x)
        if k % 3 == 2:
            held = dict(ref.held), dict(ref.frozen)
            for one in (run, ref):
                one.optimizer.eval()  # type: ignore[attr-defined]
            if case not in ("ste-interval", "one-shot"):
                assert_near(parameters_of(run.model), ref.weights(), f"evaluated after {k + 1}")
            with run.flow.hard():
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
        assert nmflow.holds(model[0].weight, "1:4")


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
