"""A run that is stopped and resumed at any step is, bit for bit, the run that was not stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dsd

from harness import (
    ADAMW,
    Run,
    all_hold,
    assert_near,
    assert_same,
    attach,
    dense_of,
    parameters_of,
    reference_step,
    through_file,
    twin,
)
from models import BY_ID as FAMILY
from models import MLP, Family
from nmflow.errors import StateError
from pairs import pairwise
from settings import BY_ID, CASES, INTERVAL_CASES, MORE_CASES, OPTIMIZERS, TOTAL, Case

ALL_CASES = [*CASES, *MORE_CASES, *INTERVAL_CASES]
EVERY_CASE = pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.id)

ORDERS = {
    "model-optimizer-attach": "moa",
    "optimizer-model-attach": "oma",
    "attach-model-optimizer": "amo",
    "attach-optimizer-model": "aom",
    "model-attach-optimizer": "mao",
}


def saved_at_every_step(run: Run, batches: list[torch.Tensor]) -> list[Any]:
    """Train, and keep what a trainer would have saved before each step."""
    saved = []
    for x in batches:
        saved.append(through_file((run.model.state_dict(), run.optimizer.state_dict())))
        run.step(x)
    saved.append(through_file((run.model.state_dict(), run.optimizer.state_dict())))
    return saved


def resumed(
    family: Family, case: Case, saved: Any, order: str, make: Any = ADAMW, **more: Any
) -> Run:
    """A new process: other weights, a new optimizer, and the saved state in one of the orders."""
    run = Run(family, case, make, seed=99, attached=False, **more)
    model_state, optimizer_state = copy.deepcopy(saved)
    for what in order:
        if what == "m":
            run.model.load_state_dict(model_state)
        elif what == "o":
            run.optimizer.load_state_dict(optimizer_state)
        else:
            run.attach()
    return run


@EVERY_CASE
def test_resume_at_any_step(case: Case) -> None:
    """Every step of every phase; the five orders of loading take turns."""
    batches = MLP.batches(TOTAL + 2)
    run = Run(MLP, case)
    saved = saved_at_every_step(run, batches)
    last, dense = parameters_of(run.model), dense_of(run)
    for k, state in enumerate(saved):
        order = list(ORDERS.values())[(k + len(case.id)) % len(ORDERS)]
        again = resumed(MLP, case, state, order)
        assert again.flow.steps_done == k, order
        assert_same(parameters_of(again.model), {**state[0]}, f"loaded at {k} {order}")
        again.train(batches[k:])
        assert_same(parameters_of(again.model), last, f"resumed at {k} {order}")
        assert_same(dense_of(again), dense, f"dense, resumed at {k} {order}")
        again.flow.finalize()
        assert case.kind == "Dense" or all_hold(again.model, MLP.targets, MLP.pattern)


@pytest.mark.parametrize(
    ("case", "optimizer", "order"),
    pairwise(
        ["one-shot", "sr-ste", "hybrid-masked", "mdgf-frozen"], list(OPTIMIZERS), list(ORDERS)
    ),
)
def test_resume_in_every_order(case: str, optimizer: str, order: str) -> None:
    family, make = FAMILY["fused-qkv"], OPTIMIZERS[optimizer]
    batches = family.batches(TOTAL)
    run = Run(family, BY_ID[case], make)
    saved = saved_at_every_step(run, batches)
    for k in (0, 1, 7, 11):
        again = resumed(family, BY_ID[case], saved[k], ORDERS[order], make)
        again.train(batches[k:])
        assert_same(parameters_of(again.model), parameters_of(run.model), f"resumed at {k}")


@pytest.mark.slow
@EVERY_CASE
@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
@pytest.mark.parametrize("family", ["lstm", "conv2d-grouped", "hf-conv1d", "panels", "3:8"])
def test_resume_everything(family: str, order: str, case: Case) -> None:
    batches = FAMILY[family].batches(TOTAL)
    run = Run(FAMILY[family], case)
    saved = saved_at_every_step(run, batches)
    for k, state in enumerate(saved):
        again = resumed(FAMILY[family], case, state, order)
        again.train(batches[k:])
        assert_same(parameters_of(again.model), parameters_of(run.model), f"resumed at {k}")


def test_resume_twice_and_back() -> None:
    """An older state may be loaded into a flow that is further on, as a trainer that rolls back."""
    batches = MLP.batches(TOTAL)
    run = Run(MLP, BY_ID["mdgf-linear-masked"])
    saved = saved_at_every_step(run, batches)
    last = parameters_of(run.model)
    for k, order in ((9, "mo"), (2, "om"), (5, "mo"), (0, "om")):
        for what in order:
            if what == "m":
                run.model.load_state_dict(saved[k][0])
            else:
                run.optimizer.load_state_dict(copy.deepcopy(saved[k][1]))
        assert run.flow.steps_done == k
        run.train(batches[k:])
        assert_same(parameters_of(run.model), last, f"back to {k}")


def test_a_frozen_mask_is_the_one_that_was_frozen() -> None:
    """Resumed after the dense weights moved on, a mask taken anew would be another one."""
    case = Case("one-shot", "OneShot", {"dense": 2})
    batches = MLP.batches(12)
    run = Run(MLP, case, total=12)
    run.train(batches[:2])
    frozen = run.model.get_parameter("0.weight") != 0
    run.train([4 * x for x in batches[2:6]])
    state = through_file((run.model.state_dict(), run.optimizer.state_dict()))
    again = resumed(MLP, case, state, "moa", total=12)
    again.train(batches[6:])
    assert torch.equal(again.model.get_parameter("0.weight") != 0, frozen)


def test_saving_changes_nothing() -> None:
    batches = MLP.batches(TOTAL)
    one, other = Run(MLP, BY_ID["sr-ste"]), Run(MLP, BY_ID["sr-ste"])
    one.train(batches)
    saved_at_every_step(other, batches)
    assert_same(parameters_of(one.model), parameters_of(other.model))


def test_a_saved_state_is_plain_and_owns_its_tensors() -> None:
    run = Run(MLP, BY_ID["mdgf-exp"])
    run.train(MLP.batches(3))
    state = run.optimizer.state_dict()
    kept = copy.deepcopy(state)
    for group in state["param_groups"]:
        mine = {key: value for key, value in group.items() if "nmflow" in key}
        assert mine["nmflow_step"] == 3
        assert all(isinstance(value, int | str | float) for value in mine.values())
    dense = [entry["nmflow_dense"] for entry in state["state"].values() if "nmflow_dense" in entry]
    assert len(dense) == 2
    assert {id(p) for p in run.model.parameters()}.isdisjoint({id(d) for d in dense})
    assert_same(
        {str(i): entry["exp_avg"] for i, entry in state["state"].items()},
        {str(i): entry["exp_avg"] for i, entry in kept["state"].items()},
    )


def test_the_whole_optimizer_can_be_deepcopied_in_its_state() -> None:
    """Trainers keep the best state in memory by a deepcopy of the state dicts."""
    batches = MLP.batches(TOTAL)
    run = Run(MLP, BY_ID["hybrid"])
    run.train(batches[:6])
    best = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.train(batches[6:])
    again = resumed(MLP, BY_ID["hybrid"], best, "oma")
    again.train(batches[6:])
    assert_same(parameters_of(again.model), parameters_of(run.model))


# --- torch.distributed.checkpoint.state_dict --------------------------------------------------


def _set(run: Run, saved: Any, flatten: bool = False) -> None:
    dsd.set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=saved[0],
        optim_state_dict=saved[1],
        options=dsd.StateDictOptions(flatten_optimizer_state_dict=flatten),
    )


FORMS = [  # torch reads the flat form by the keys that the new optimizer has: attach before it
    pytest.param("attach", False, id="attach-load"),
    pytest.param("load", False, id="load-attach"),
    pytest.param("attach", True, id="attach-load-flat"),
]


@pytest.mark.parametrize(("first", "flatten"), FORMS)
@pytest.mark.parametrize("optimizer", ["adamw-foreach", "adamw-fused", "sgd", "adafactor"])
@pytest.mark.parametrize("case", ["one-shot", "sr-ste", "mdgf-linear", "hybrid-masked"])
def test_state_dict_of_distributed_checkpoint(
    case: str, optimizer: str, first: str, flatten: bool
) -> None:
    """Get and set by name; a new optimizer is given state by a phantom step that is not counted."""
    make, batches = OPTIMIZERS[optimizer], MLP.batches(TOTAL)
    run = Run(MLP, BY_ID[case], make)
    options = dsd.StateDictOptions(flatten_optimizer_state_dict=flatten)
    for k, x in enumerate(batches):
        if k == 7:
            saved = through_file(dsd.get_state_dict(run.model, run.optimizer, options=options))
        run.step(x)
    again = Run(MLP, BY_ID[case], make, seed=99, attached=first == "attach")
    _set(again, saved, flatten)
    if first == "load":
        again.attach()
    assert again.flow.steps_done == 7
    again.train(batches[7:])
    assert_same(parameters_of(again.model), parameters_of(run.model))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", ["ste-at-once", "sr-ste-at-once", "mdgf-at-once", "one-shot"])
def test_the_phantom_step_of_a_first_save_does_not_count(case: str, optimizer: str) -> None:
    """`get_state_dict` before any step makes a step of its own, lr 0 and zero gradients."""
    make, batches = OPTIMIZERS[optimizer], MLP.batches(TOTAL)
    run = Run(MLP, BY_ID[case], make, attached=False)
    ref = twin(run, make)
    run.attach()
    before, dense = parameters_of(run.model), dense_of(run)
    saved = through_file(dsd.get_state_dict(run.model, run.optimizer))
    dsd.get_optimizer_state_dict(ref.model, ref.optimizer)
    assert run.flow.steps_done == 0
    assert_same(parameters_of(run.model), before)
    assert_same(dense_of(run), dense)
    for x in batches:
        run.step(x)
        reference_step(ref, x)
    assert run.flow.steps_done == TOTAL
    for name, weight in ref.weights().items():
        torch.testing.assert_close(run.model.get_parameter(name).detach(), weight)
    again = Run(MLP, BY_ID[case], make, seed=99)
    _set(again, saved)
    assert again.flow.steps_done == 0
    again.train(batches)
    assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_real_first_step_at_lr_0_does_count() -> None:
    """Warm-up begins at lr 0 in many trainers: that is a step like any other."""
    run = Run(MLP, BY_ID["mdgf-linear"], attached=False)
    ref = twin(run)
    run.attach()
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one.optimizer, lambda k: min(1.0, k / 3))
        for one in (run, ref)
    ]
    for k, x in enumerate(MLP.batches(TOTAL)):
        assert run.flow.steps_done == k
        run.step(x)
        reference_step(ref, x)
        for schedule in schedules:
            schedule.step()
    assert_near(parameters_of(run.model), ref.weights())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@EVERY_CASE
def test_checkpoints_on_disk(case: Case, tmp_path: Path) -> None:
    """`torch.distributed.checkpoint.save` and `load` in place, in one process.

    What is loaded are the keys that a fresh run has: a mask that is kept must be among them.
    """
    batches, stop = MLP.batches(TOTAL), 11
    run = Run(MLP, case)
    run.train(batches[:stop])
    model_state, optimizer_state = dsd.get_state_dict(run.model, run.optimizer)
    dcp.state_dict_saver.save(
        {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(tmp_path)
    )
    run.train(batches[stop:])
    again = Run(MLP, case, seed=99)
    model_state, optimizer_state = dsd.get_state_dict(again.model, again.optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.state_dict_loader.load(state, checkpoint_id=str(tmp_path))
    _set(again, (state["model"], state["optimizer"]))
    assert again.flow.steps_done == stop
    again.train(batches[stop:])
    assert_same(parameters_of(again.model), parameters_of(run.model))


# --- states that do not belong ----------------------------------------------------------------

OTHERS = {
    "recipe": (Case("", "STE", {"dense": 2}), {}),
    "argument": (Case("", "MDGF", {"decay": "linear", "dense": 3, "finetune": 4}), {}),
    "gradient": (BY_ID["mdgf-linear-masked"], {}),
    "pattern": (BY_ID["mdgf-linear"], {"pattern": "2:4"}),
    "panel": (BY_ID["mdgf-linear"], {"pattern": "1:4@2"}),
    "targets": (BY_ID["mdgf-linear"], {"include": ["0.*"]}),
}


@pytest.mark.parametrize("order", ["oma", "amo"], ids=["before-attach", "after-attach"])
@pytest.mark.parametrize("what", OTHERS)
def test_a_state_of_another_flow_is_refused(what: str, order: str) -> None:
    """Loaded before or after the flow is attached: an error, and the weights stay as they are."""
    case, more = OTHERS[what]
    run = Run(MLP, case, **more)
    run.train(MLP.batches(5))
    saved = through_file((run.model.state_dict(), run.optimizer.state_dict()))
    again = Run(MLP, BY_ID["mdgf-linear"], seed=99, attached=order == "amo")
    again.model.load_state_dict(saved[0]) if order == "oma" else None
    before = parameters_of(again.model)
    if order == "oma":
        again.optimizer.load_state_dict(saved[1])
        with pytest.raises(StateError) as caught:
            again.attach()
        assert not again.optimizer._optimizer_step_pre_hooks
        assert not again.optimizer._optimizer_step_post_hooks
    else:
        again.train(MLP.batches(2))
        before, state = parameters_of(again.model), through_file(again.optimizer.state_dict())
        with pytest.raises(StateError) as caught:
            again.optimizer.load_state_dict(saved[1])
        after = again.optimizer.state_dict()
        assert after["param_groups"] == state["param_groups"]
        for i, entry in state["state"].items():
            assert_same(
                {k: v for k, v in entry.items() if torch.is_tensor(v)},
                {k: v for k, v in after["state"][i].items() if torch.is_tensor(v)},
            )
        again.train(MLP.batches(2))  # the flow goes on as if nothing had been tried
        assert again.flow.steps_done == 4
        return
    assert str(caught.value)
    assert_same(parameters_of(again.model), before)


def test_patterns_that_changed_places_are_refused() -> None:
    """The same patterns on as many weights, but the other way round."""
    case = BY_ID["mdgf-linear"]
    ways = [{"0.*": "1:4", "2.*": "2:4"}, {"0.*": "2:4", "2.*": "1:4"}]
    run = Run(MLP, case, pattern=ways[0])
    run.train(MLP.batches(5))
    saved = through_file(run.optimizer.state_dict())
    other = Run(MLP, case, seed=99, pattern=ways[1])
    with pytest.raises(StateError):
        other.optimizer.load_state_dict(saved)
    same = Run(MLP, case, seed=99, pattern=ways[0])
    same.optimizer.load_state_dict(saved)
    assert same.flow.steps_done == 5


def test_a_state_of_another_network_is_refused() -> None:
    run = Run(FAMILY["hf-conv1d"], BY_ID["mdgf-linear"])
    run.train(FAMILY["hf-conv1d"].batches(5))
    saved = through_file(run.optimizer.state_dict())
    other = Run(MLP, BY_ID["mdgf-linear"], seed=99)
    other.train(MLP.batches(1))
    before = parameters_of(other.model)
    with pytest.raises(StateError):
        other.optimizer.load_state_dict(saved)
    assert_same(parameters_of(other.model), before)
    unattached = Run(MLP, BY_ID["mdgf-linear"], seed=99, attached=False)
    unattached.optimizer.load_state_dict(saved)
    before = parameters_of(unattached.model)
    with pytest.raises(StateError):
        unattached.attach()
    assert_same(parameters_of(unattached.model), before)


def test_a_state_of_a_plain_run_may_be_the_start() -> None:
    """Attach to an optimizer that already trained dense: the recipe starts at step 0 from there."""
    batches = MLP.batches(TOTAL + 3)
    run = Run(MLP, BY_ID["sr-ste"], attached=False)
    run.train(batches[:3])
    ref = twin(run)
    ref.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.attach()
    assert run.flow.steps_done == 0
    for x in batches[3:]:
        run.step(x)
        reference_step(ref, x)
    assert_near(parameters_of(run.model), ref.weights())


def test_several_optimizers_resume_together() -> None:
    def build(seed: int) -> tuple[Any, list[torch.optim.Optimizer]]:
        model = MLP.build(seed=seed)
        halves = [model.get_submodule("0").parameters(), model.get_submodule("2").parameters()]
        return model, [ADAMW(halves[0]), OPTIMIZERS["sgd"](halves[1])]

    def train(model: Any, optimizers: list[torch.optim.Optimizer], batches: Any) -> None:
        for x in batches:
            model.zero_grad()
            model(x).pow(2).mean().backward()
            for optimizer in optimizers:
                optimizer.step()

    case, batches = BY_ID["mdgf-linear-masked"], MLP.batches(TOTAL)
    model, optimizers = build(0)
    flow = attach(model, optimizers, case, MLP)
    train(model, optimizers, batches[:6])
    assert flow.steps_done == 6
    saved = through_file((model.state_dict(), [o.state_dict() for o in optimizers]))
    train(model, optimizers, batches[6:])
    for order in ("attach", "load"):
        again, others = build(99)
        if order == "attach":
            flow = attach(again, others, case, MLP)
        again.load_state_dict(saved[0])
        for optimizer, state in zip(others, copy.deepcopy(saved[1]), strict=True):
            optimizer.load_state_dict(state)
        if order == "load":
            flow = attach(again, others, case, MLP)
        assert flow.steps_done == 6
        train(again, others, batches[6:])
        assert_same(parameters_of(again), parameters_of(model), order)
