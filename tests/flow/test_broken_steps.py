"""Steps that raise, wherever they do: W̃ is shown at once, and the run goes on or is resumed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
from harness import Run, assert_same, dense_of, parameters_of, through_file
from models import MLP, loss_of
from nmflow.errors import FlowError
from settings import BY_ID, OPTIMIZERS, TOTAL

CASES = ["sr-ste-at-once", "mdgf-linear-masked", "settling", "step", "hybrid-interval", "one-shot"]
STOP = 6


class Broken(Exception):
    """What a test raises."""


class Fragile(torch.optim.AdamW):
    """AdamW that raises before its update, after it, or for one of its parameters."""

    where: str | None = None
    kind: type[BaseException] = Broken

    def step(self, closure: Any = None) -> Any:
        if self.where == "before":
            raise self.kind
        if self.where == "middle":
            grads = [p.grad for p in self.param_groups[0]["params"]]
            for p in self.param_groups[0]["params"][1:]:
                p.grad = None
            super().step()
            for p, g in zip(self.param_groups[0]["params"], grads, strict=True):
                p.grad = g
            raise self.kind
        out = super().step(closure)
        if self.where == "after":
            raise self.kind
        return out


def fragile(parameters: Any) -> Fragile:
    return Fragile(parameters, lr=0.02, weight_decay=0.1)


def backward(run: Run, x: torch.Tensor) -> None:
    run.optimizer.zero_grad()
    loss_of(run.model(x)).backward()


def started(case: str, steps: int = STOP, make: Any = fragile) -> tuple[Run, list[torch.Tensor]]:
    """A run with the gradients of its next step."""
    run, batches = Run(MLP, BY_ID[case], make), MLP.batches(TOTAL)
    run.train(batches[:steps])
    backward(run, batches[steps])
    return run, batches


def shows_its_weights(run: Run) -> None:
    """The parameters hold W̃ of the dense weights at this step: writing it anew changes nothing."""
    shown = parameters_of(run.model)
    again = Run(MLP, run.case, run_make(run), seed=5, attached=False)
    model, state = through_file((run.model.state_dict(), run.optimizer.state_dict()))
    again.optimizer.load_state_dict(state)
    again.attach()
    assert again.flow.steps_done == run.flow.steps_done
    for name in MLP.targets:
        assert torch.equal(again.model.get_parameter(name), shown[name])
        assert torch.equal(model[name], shown[name])
    assert_same(dense_of(again), dense_of(run))


def run_make(run: Run) -> Any:
    return fragile if isinstance(run.optimizer, Fragile) else OPTIMIZERS["adamw-foreach"]


@pytest.mark.parametrize("scheduled", ["no", "before", "after"])
@pytest.mark.parametrize("kind", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_raises_before_its_update_and_is_repeated_is_one_step(
    case: str, kind: type[BaseException], scheduled: str
) -> None:
    """Nothing is faded, drawn or regularised twice, with a scheduler's wrapper beside ours."""
    free, batches = started(case)
    free.optimizer.step()
    free.train(batches[STOP + 1 :])
    run = Run(MLP, BY_ID[case], fragile, attached=False)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR
    if scheduled == "before":
        schedule(run.optimizer, lambda _: 1.0)
    run.attach()
    if scheduled == "after":
        schedule(run.optimizer, lambda _: 1.0)
    run.train(batches[:STOP])
    backward(run, batches[STOP])
    run.optimizer.where, run.optimizer.kind = "before", kind  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(kind):
            run.optimizer.step()
        assert run.flow.steps_done == STOP
        shows_its_weights(run)
    run.optimizer.where = None  # type: ignore[attr-defined]
    run.optimizer.step()
    run.train(batches[STOP + 1 :])
    assert_same(parameters_of(run.model), parameters_of(free.model))
    run.flow.finalize()


@pytest.mark.parametrize("where", ["before", "middle", "after"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_raises_shows_the_sparse_weights_and_can_be_resumed(
    case: str, where: str
) -> None:
    run, batches = started(case)
    run.optimizer.where = where  # type: ignore[attr-defined]
    with pytest.raises(Broken):
        run.optimizer.step()
    assert run.flow.steps_done == STOP
    shows_its_weights(run)
    run.optimizer.where = None  # type: ignore[attr-defined]
    saved = through_file((run.model.state_dict(), run.optimizer.state_dict()))
    again = Run(MLP, BY_ID[case], fragile, seed=5)
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    assert_same(parameters_of(again.model), parameters_of(run.model))
    run.train(batches[STOP:])
    assert run.flow.steps_done == TOTAL


def test_new_gradients_after_a_step_that_raised_are_faded() -> None:
    """The first ones are gone with `zero_grad`; those of another batch meet the rule as ever."""
    run, batches = started("mdgf-linear-masked")
    free, _ = started("mdgf-linear-masked")
    run.optimizer.where = "before"  # type: ignore[attr-defined]
    with pytest.raises(Broken):
        run.optimizer.step()
    run.optimizer.where = None  # type: ignore[attr-defined]
    for one in (run, free):
        for p in one.model.parameters():
            assert p.grad is not None
            p.grad.zero_()  # the same tensors
        loss_of(one.model(batches[0])).backward()
        one.optimizer.step()
    assert_same(dense_of(run), dense_of(free))


@pytest.mark.parametrize("ours_first", [False, True])
def test_hooks_of_others_that_raise(ours_first: bool) -> None:
    """After the update ours is done before theirs, whoever came first: the step counts."""
    run = Run(MLP, BY_ID["settling"], attached=ours_first)
    free, batches = Run(MLP, BY_ID["settling"]), MLP.batches(TOTAL)

    def bad(*_: Any) -> None:
        raise Broken

    handle = run.optimizer.register_step_post_hook(bad)
    if not ours_first:
        run.attach()
    for x in batches[:STOP]:
        backward(run, x)
        with pytest.raises(Broken):
            run.optimizer.step()
        free.step(x)
    handle.remove()
    handle = run.optimizer.register_step_pre_hook(bad)
    backward(run, batches[STOP])
    with pytest.raises(Broken):
        run.optimizer.step()
    shows_its_weights(run)
    handle.remove()
    run.optimizer.step()
    free.step(batches[STOP])
    run.train(batches[STOP + 1 :])
    free.train(batches[STOP + 1 :])
    assert_same(parameters_of(run.model), parameters_of(free.model))


def test_a_closure_that_raises() -> None:
    run, batches = started("settling", make=OPTIMIZERS["adamw-foreach"])
    free, _ = started("settling", make=OPTIMIZERS["adamw-foreach"])

    def closure() -> Any:
        raise Broken

    with pytest.raises(Broken):
        run.optimizer.step(closure)
    shows_its_weights(run)
    for one in (run, free):
        one.optimizer.step()
        one.train(batches[STOP + 1 :])
    assert_same(parameters_of(run.model), parameters_of(free.model))


class Plain(torch.optim.SGD):
    """Steps as `SGD.step`, whose hooks run too: one step within another."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Unhooked(torch.optim.SGD):
    """Its `step` claims to run the hooks, and does not: torch believes it."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad)

    step.hooked = True  # type: ignore[attr-defined]


def test_a_step_within_a_step_counts_once() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # so that SGD's step has its hooks
    runs = [
        Run(MLP, BY_ID["settling"], lambda p, k=k: k(p, lr=0.1)) for k in (torch.optim.SGD, Plain)
    ]
    for run in runs:
        run.train(MLP.batches(TOTAL))
        assert run.flow.steps_done == TOTAL
    assert_same(parameters_of(runs[0].model), parameters_of(runs[1].model))


def test_a_step_without_hooks_is_dropped_and_said() -> None:
    run = Run(MLP, BY_ID["settling"], lambda p: Unhooked(p, lr=0.1))
    shown, dense = parameters_of(run.model), dense_of(run)
    backward(run, MLP.batches(1)[0])
    with pytest.raises(FlowError, match="without the hooks"):
        run.optimizer.step()
    assert_same(
        {n: parameters_of(run.model)[n] for n in MLP.targets}, {n: shown[n] for n in MLP.targets}
    )
    assert_same(dense_of(run), dense)


_copies: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("how", _copies)
def test_a_copy_after_the_run_is_an_optimizer_like_others(how: str) -> None:
    run = Run(MLP, BY_ID["settling"])
    run.train(MLP.batches(TOTAL))
    run.flow.finalize()
    assert "__reduce_ex__" not in vars(run.optimizer)
    other = Run(MLP, BY_ID["settling"], attached=False)
    other.model, other.optimizer = _copies[how]((run.model, run.optimizer))
    backward(other, MLP.batches(1)[0])
    other.optimizer.step()


@pytest.mark.parametrize("steps", [0, 1, STOP])
@pytest.mark.parametrize("how", _copies)
def test_a_copied_pair_is_attached_to_anew(how: str, steps: int) -> None:
    """A copy has no hooks, but the state: it goes on from there, and never touches the original."""
    run, batches = Run(MLP, BY_ID["settling"]), MLP.batches(TOTAL)
    run.train(batches[:steps])
    pair = (run.model, run.optimizer)
    other = Run(MLP, BY_ID["settling"], attached=False)
    other.model, other.optimizer = _copies[how](_copies[how](pair))
    torch.optim.lr_scheduler.LambdaLR(other.optimizer, lambda _: 1.0)
    before = parameters_of(other.model)
    with pytest.raises(FlowError, match=r"copy of one with a recipe.*nmflow\.attach"):
        other.optimizer.step()
    assert_same(parameters_of(other.model), before)
    if not steps:
        with pytest.raises(FlowError, match=r"copy of the optimizer.*state_dict\(\)"):
            other.attach()
        other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.attach()
    assert other.flow.steps_done == steps
    for one in (other, run):
        one.train(batches[steps:])
        assert one.flow.steps_done == TOTAL
    assert_same(parameters_of(other.model), parameters_of(run.model))


def test_finalize_leaves_the_methods_of_the_optimizer() -> None:
    run = Run(MLP, BY_ID["settling"])
    assert "step" in vars(run.optimizer)
    run.flow.finalize()
    assert "step" not in vars(run.optimizer)
    again = nmflow.attach(run.model, run.optimizer, "ste", "1:4", include="0.*", total_steps=3)
    torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda _: 1.0)  # it wraps ours
    again.finalize()
    backward(run, MLP.batches(1)[0])
    before = parameters_of(run.model)
    run.optimizer.step()
    assert any(not torch.equal(p, before[n]) for n, p in run.model.named_parameters())
