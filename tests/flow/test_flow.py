"""Beside training: final_masks() and finalize()."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import nmflow
import reference
from harness import (
    Run,
    all_hold,
    assert_same,
    dense_of,
    parameters_of,
    traces,
    use,
)
from models import FAMILIES, MLP, Family, loss_of
from nmflow.errors import FlowError, WeightError
from settings import BY_ID, OPTIMIZERS, TOTAL


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
@pytest.mark.parametrize("case", ["mdgf-exp", "one-shot", "sdgf-geometric", "hybrid"])
def test_final_masks_are_shown_and_weights_restored_bitwise(case: str, family: Family) -> None:
    run, free = Run(family, BY_ID[case]), Run(family, BY_ID[case])
    batches = family.batches(TOTAL)
    n, m, panel = reference.parse(family.pattern)
    for k, x in enumerate(batches):
        before, dense = parameters_of(run.model), dense_of(run)
        with run.flow.final_masks():
            assert all_hold(run.model, family.targets, family.pattern)
            inside = parameters_of(run.model)
            run.model(x)
        assert_same(parameters_of(run.model), before, f"step {k}")
        assert_same(dense_of(run), dense, f"step {k}")
        if not (case == "one-shot" and k > 5):  # whose mask is older than its weights
            for name, spec in family.targets.items():
                rows = reference.rows_of(dense[name], spec)
                kept = reference.keep(rows, n, m, spec.dim, panel, spec.stacked)
                assert torch.equal(reference.rows_of(inside[name], spec), rows * kept)
        run.step(x)
        free.step(x)
        assert_same(parameters_of(run.model), parameters_of(free.model), f"step {k}")


def test_final_masks_may_be_nested_and_left_by_an_error() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    batches = MLP.batches(TOTAL)
    run.train(batches[:5])
    before = parameters_of(run.model)
    with run.flow.final_masks(), run.flow.final_masks():
        assert all_hold(run.model, MLP.targets, MLP.pattern)
    assert_same(parameters_of(run.model), before)
    with pytest.raises(KeyError), run.flow.final_masks():
        raise KeyError
    assert_same(parameters_of(run.model), before)
    other = Run(MLP, BY_ID["mdgf-linear"])
    other.train(batches)
    run.train(batches[5:])
    assert_same(parameters_of(run.model), parameters_of(other.model))


def test_a_step_inside_final_masks_is_refused() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(5))
    before, dense = parameters_of(run.model), dense_of(run)
    with run.flow.final_masks():
        loss_of(run.model(MLP.batches(1)[0])).backward()
        with pytest.raises(FlowError, match="final_masks"):
            run.optimizer.step()
        with pytest.raises(FlowError, match="final_masks"):
            run.flow.finalize()
    assert run.flow.steps_done == 5
    assert_same(parameters_of(run.model), before)
    assert_same(dense_of(run), dense)


def test_final_masks_is_saved_as_what_it_is_not() -> None:
    """A checkpoint written inside final_masks() must resume as if it had been written outside."""
    case, batches = BY_ID["mdgf-exp-masked"], MLP.batches(TOTAL)
    run = Run(MLP, case)
    run.train(batches[:6])
    with run.flow.final_masks():
        saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.train(batches[6:])
    again = Run(MLP, case, seed=99, attached=False)
    again.optimizer.load_state_dict(saved[1])
    again.attach()
    again.train(batches[6:])
    for name in MLP.targets:
        one, other = run.model.get_parameter(name), again.model.get_parameter(name)
        assert torch.equal(dense_of(run)[name] != 0, dense_of(again)[name] != 0)
        assert one.shape == other.shape


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_deepcopy_and_pickle_after_finalize(family: Family) -> None:
    run = Run(family, BY_ID["mdgf-exp"])
    batches = family.batches(TOTAL)
    run.train(batches)
    run.flow.finalize()
    run.model.eval()
    with torch.no_grad():
        expected = run.model(batches[0])
        copied, optimizer = copy.deepcopy((run.model, run.optimizer))
        assert torch.equal(copied(batches[0]), expected)
        assert all_hold(copied, family.targets, family.pattern)
        fresh = family.build(seed=5).eval()
        fresh.load_state_dict(run.model.state_dict())
        assert torch.equal(fresh(batches[0]), expected)
        buffer = io.BytesIO()
        torch.save(run.model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(batches[0]), expected)
    assert traces(optimizer) == []
    assert pickle.loads(pickle.dumps(run.optimizer.state_dict())).keys() == {
        "state",
        "param_groups",
    }
    for x in batches[:2]:  # both are plain: training them on is dense training
        for model, one in ((run.model, run.optimizer), (copied, optimizer)):
            one.zero_grad()
            loss_of(model(x)).backward()
            one.step()
    assert_same(parameters_of(run.model), parameters_of(copied))
    assert not all_hold(run.model, family.targets, family.pattern)


def test_the_model_may_be_copied_in_mid_run() -> None:
    """An averaged copy of the network is a network, with the sparse weights of now."""
    run, free = Run(MLP, BY_ID["ste-at-once"]), Run(MLP, BY_ID["ste-at-once"])
    average = torch.optim.swa_utils.AveragedModel(run.model)
    for x in MLP.batches(TOTAL):
        run.step(x)
        free.step(x)
        average.update_parameters(run.model)
        assert_same(parameters_of(copy.deepcopy(run.model)), parameters_of(run.model))
    assert_same(parameters_of(run.model), parameters_of(free.model))


@pytest.mark.parametrize(("end", "said"), [("finalize", "finalized"), ("detach", "detached")])
@pytest.mark.parametrize("what", ["finalize", "final_masks", "dense", "sync", "dense_weights"])
def test_a_flow_that_has_ended_is_over(what: str, end: str, said: str) -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(TOTAL))
    getattr(run.flow, end)()
    assert said in repr(run.flow)
    before = parameters_of(run.model)
    with pytest.raises(FlowError, match="finalize"):
        use(run, what)
    assert_same(parameters_of(run.model), before)


@pytest.mark.parametrize("case", ["settling", "mdgf-frozen"])
def test_a_flow_that_trains_is_not_pickled_and_its_copy_has_ended(case: str) -> None:
    """A model that holds its flow is copied as any other, such as for an average of it."""
    run, free = Run(MLP, BY_ID[case]), Run(MLP, BY_ID[case])
    model: Any = run.model
    model.flow = run.flow
    for x in MLP.batches(TOTAL):
        run.step(x)
        free.step(x)
        for what in (run.flow, model):
            with pytest.raises(FlowError, match=r"optimizer\.state_dict\(\)"):
                pickle.dumps(what)
        other: Any = copy.deepcopy(model)
        assert other.flow.model is other
        assert other.flow.steps_done == run.flow.steps_done
        assert "copied" in repr(other.flow)
        for end in (other.flow.finalize, other.flow.final_masks, other.flow.detach):
            with pytest.raises(FlowError, match="a copy of a flow: attach again"):
                end()
    run.flow.finalize()
    free.flow.finalize()
    assert_same(parameters_of(model), parameters_of(free.model))
    assert_same(parameters_of(pickle.loads(pickle.dumps(model))), parameters_of(model))


@pytest.mark.parametrize("sparse_steps", ["off", "on"])
@pytest.mark.parametrize("steps", [0, 3, TOTAL])
@pytest.mark.parametrize("case", ["ste", "settling", "mdgf-frozen", "step", "mdgf-scaled-frozen"])
def test_a_flow_that_is_detached_was_never_there(case: str, steps: int, sparse_steps: str) -> None:
    """The parameters hold W, and the optimizer has its own state and no hook of ours."""
    how = replace(BY_ID[case], attach={**BY_ID[case].attach, "sparse_steps": sparse_steps})
    make = OPTIMIZERS["adamw-plain"]
    run = Run(MLP, how, make, dtype=torch.float32)
    run.train(MLP.batches(steps, torch.float32))
    dense = {name: w.clone() for name, w in run.flow.dense_weights().items()}
    moments = copy.deepcopy(run.optimizer.state_dict())
    run.flow.detach()
    found = parameters_of(run.model)
    assert_same({name: found[name] for name in dense}, dense)

    plain = make(run.model.parameters())
    state = run.optimizer.state_dict()
    assert [g.keys() for g in state["param_groups"]] == [g.keys() for g in plain.param_groups]
    for i, one in state["state"].items():
        assert not any(str(key).startswith("nmflow") for key in one)
        assert all(torch.equal(one[key], moments["state"][i][key]) for key in one)
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        assert not getattr(run.optimizer, hooks)
    plain.load_state_dict(state)
    with pytest.raises(FlowError, match="detach"):
        run.flow.detach()
    flow = nmflow.attach(run.model, run.optimizer, "ste", "1:4", include="*", total_steps=2)
    assert flow.steps_done == 0


@pytest.mark.parametrize("what", ["written", "inside a block", "replaced"])
def test_a_flow_that_cannot_be_detached_goes_on(what: str) -> None:
    run = Run(MLP, BY_ID["settling"])
    run.train(MLP.batches(3))
    model: Any = run.model
    before, first = parameters_of(model), model[0]
    block: Any = run.flow.final_masks() if what == "inside a block" else contextlib.nullcontext()
    with block:
        if what == "written":
            with torch.no_grad():
                model[0].weight[0, 0] += 1
        elif what == "replaced":
            model[0] = copy.deepcopy(first)
        with pytest.raises(FlowError):
            run.flow.detach()
    if what == "written":
        with torch.no_grad():
            model[0].weight.copy_(before["0.weight"])
    model[0] = first
    assert_same(parameters_of(model), before)
    run.train(MLP.batches(1))


def _final(run: Run, x: torch.Tensor) -> None:
    with run.flow.final_masks():
        run.model(x)


def _dense(run: Run, x: torch.Tensor) -> None:
    with run.flow.dense():
        for p in run.model.parameters():
            p.clamp_(-0.1, 0.1)


def _sync(run: Run, x: torch.Tensor) -> None:
    run.model.load_state_dict({n: p * 0.5 for n, p in run.model.state_dict().items()})
    run.flow.sync()


WITHIN: dict[str, Callable[[Run, torch.Tensor], None]] = {
    "final_masks": _final,
    "dense": _dense,
    "sync": _sync,
    "stage_at": lambda run, x: print(run.flow.stage_at(3), run.flow.dense_weights().keys()),
}


@pytest.mark.parametrize("what", ["attach", *WITHIN])
@pytest.mark.parametrize("case", ["settling", "mdgf-frozen", "one-shot", "s-ste", "hybrid"])
def test_inference_mode_changes_nothing(case: str, what: str) -> None:
    """What a flow does in it, such as in the middle of an evaluation, is what it does outside."""
    ends = []
    for inside in (True, False):
        run = Run(MLP, BY_ID[case], attached=False)
        mode: Any = torch.inference_mode if inside else torch.no_grad
        with mode() if what == "attach" else contextlib.nullcontext():
            run.attach()
        for k, x in enumerate(MLP.batches(TOTAL)):
            run.step(x)
            if k in (1, 4, TOTAL - 2) and what != "attach":
                with mode():
                    WITHIN[what](run, x)
        with mode():
            run.flow.finalize()
        run.step(MLP.batches(1)[0])
        ends.append(parameters_of(run.model))
    assert_same(*ends)


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = torch.nn.Linear(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(WeightError, match=r"'weight' was made in torch.inference_mode\(\)"):
        nmflow.attach(model, optimizer, pattern="1:4", include="*", total_steps=2)


def test_attach_again_after_finalize() -> None:
    """From 2:4 to 1:4 in two runs of one optimizer."""
    run = Run(MLP, BY_ID["ste"], pattern="2:4")
    run.train(MLP.batches(TOTAL))
    run.flow.finalize()
    assert all_hold(run.model, MLP.targets, "2:4")
    run.more = {}
    run.attach()
    assert run.flow.steps_done == 0
    run.train(MLP.batches(TOTAL))
    run.flow.finalize()
    assert all_hold(run.model, MLP.targets, "1:4")
    assert traces(run.optimizer) == []
