"""`dense()`, in which W is edited, and writes inside `final_masks()`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
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
    twin,
    use,
)
from models import BY_ID as FAMILY
from models import MLP, loss_of
from nmflow.errors import FlowError, StateError, WeightError
from settings import BY_ID, CASES, INTERVAL_CASES, MORE_CASES, OPTIMIZERS, TOTAL, Case

NAME = "0.weight"


@torch.no_grad()
def constrain(model: nn.Module) -> None:
    """A clamp, and rows of at most unit norm."""
    for p in model.parameters():
        p.clamp_(-0.2, 0.2)
        if p.ndim == 2:
            p.copy_(p / p.norm(dim=1, keepdim=True).clamp(min=0.4) * 0.4)


# The reference does not hold the hybrid's second mask.
HELD = [case for case in INTERVAL_CASES if case.kind != "Hybrid"]


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES, *HELD], ids=lambda case: case.id)
def test_a_constraint_after_each_step(case: Case) -> None:
    """It is on W, and the network is W̃ of what it leaves, as in the reference."""
    run = Run(MLP, case, attached=False)
    ref = twin(run)
    run.attach()
    for x in MLP.batches(TOTAL):
        run.step(x)
        with run.flow.dense():
            constrain(run.model)
        reference_step(ref, x)
        constrain(ref.model)
        assert_near(parameters_of(run.model), ref.weights())
        assert_near(dense_of(run), ref.dense_weights())
    run.flow.finalize()
    assert case.kind == "Dense" or all_hold(run.model, MLP.targets, MLP.pattern)


@pytest.mark.parametrize("family", ["fused-qkv", "lstm", "hf-conv1d", "panels"])
def test_a_constraint_in_every_family(family: str) -> None:
    run = Run(FAMILY[family], BY_ID["hybrid-masked"], attached=False)
    ref = twin(run)
    run.attach()
    for x in FAMILY[family].batches(TOTAL):
        run.step(x)
        reference_step(ref, x)
        for model, block in ((run.model, run.flow.dense()), (ref.model, torch.no_grad())):
            with block, torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.2, 0.2)
        assert_near(parameters_of(run.model), ref.weights())


def test_a_block_that_changes_nothing_changes_nothing() -> None:
    for case in ("mdgf-linear", "one-shot", "ste-interval", "dense"):
        run, free = Run(MLP, BY_ID[case]), Run(MLP, BY_ID[case])
        for x in MLP.batches(TOTAL):
            run.step(x)
            free.step(x)
            with run.flow.dense():
                assert_same(dense_of(run), {n: run.model.get_parameter(n) for n in MLP.targets})
        assert_same(parameters_of(run.model), parameters_of(free.model), case)


def test_several_optimizers() -> None:
    model = MLP.build()
    optimizers = [ADAMW(model.get_submodule("0").parameters())]
    optimizers.append(OPTIMIZERS["sgd"](model.get_submodule("2").parameters()))
    flow = attach(model, optimizers, BY_ID["mdgf-linear"], MLP)
    for x in MLP.batches(TOTAL):
        model.zero_grad()
        loss_of(model(x)).backward()
        for optimizer in optimizers:
            optimizer.step()
        with flow.dense():
            constrain(model)
        assert all(float(w.norm(dim=1).max()) < 0.4001 for w in flow.dense_weights().values())
    flow.finalize()


EDITS: dict[str, Any] = {
    "rebinding": lambda p: setattr(p, "data", torch.full_like(p, 0.25)),
    "in place": lambda p: p.fill_(0.25),
    ".data": lambda p: p.data.fill_(0.25),
}


@pytest.mark.parametrize("how", EDITS)
def test_however_it_is_edited(how: str) -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(5))
    with run.flow.dense(), torch.no_grad():
        EDITS[how](run.model.get_parameter(NAME))
    assert bool((dense_of(run)[NAME] == 0.25).all())
    run.train(MLP.batches(TOTAL - 5))
    run.flow.finalize()
    assert all_hold(run.model, MLP.targets, MLP.pattern)


@pytest.mark.parametrize("case", ["one-shot", "ste-interval", "mdgf-frozen"])
def test_a_checkpoint_that_is_loaded_in_the_block_gets_masks_of_its_own(case: str) -> None:
    run = Run(MLP, BY_ID[case])
    run.train(MLP.batches(11))
    other = MLP.build(seed=9).state_dict()
    with run.flow.dense():
        run.model.load_state_dict(other)
    assert torch.equal(dense_of(run)[NAME], other[NAME])
    assert torch.equal(run.model.get_parameter(NAME) != 0, nmflow.mask(other[NAME], "1:4"))


@pytest.mark.parametrize("bad", ["raises", "nan", "shape", "replaced"])
def test_a_block_that_fails_takes_nothing(bad: str) -> None:
    run, free = Run(MLP, BY_ID["mdgf-linear"]), Run(MLP, BY_ID["mdgf-linear"])
    batches = MLP.batches(TOTAL)
    run.train(batches[:5])
    dense, shown = dense_of(run), parameters_of(run.model)
    layer = run.model.get_submodule("2")

    @torch.no_grad()
    def fail() -> None:
        run.model.get_parameter(NAME).fill_(7.0)
        weight = run.model.get_parameter("2.weight")
        if bad == "raises":
            raise KeyError
        if bad == "nan":
            weight[0, 0] = float("nan")
        elif bad == "shape":
            weight.data = torch.zeros(2, dtype=torch.float64)
        else:
            run.model.add_module("2", nn.Identity())

    with pytest.raises((KeyError, WeightError, FlowError)), run.flow.dense():
        fail()
    run.model.add_module("2", layer)
    assert_same(dense_of(run), dense)
    assert_same(parameters_of(run.model), shown)
    run.train(batches[5:])
    free.train(batches)
    assert_same(parameters_of(run.model), parameters_of(free.model))


@pytest.mark.parametrize("inside", ["dense", "final_masks"])
@pytest.mark.parametrize("what", ["step", "load", "finalize", "sync", "dense", "final_masks"])
def test_what_may_not_be_done_in_a_block(what: str, inside: str) -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(5))
    before, state = parameters_of(run.model), copy.deepcopy(run.optimizer.state_dict())
    with getattr(run.flow, inside)():
        if what == inside == "final_masks":
            use(run, what)
        elif what == "load":
            with pytest.raises(FlowError, match=inside):
                run.optimizer.load_state_dict(state)
        else:
            with pytest.raises(FlowError, match=inside):
                use(run, what)
    assert_same(parameters_of(run.model), before)
    run.train(MLP.batches(2))


def test_the_optimizers_state_is_the_same_in_a_block() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(5))
    before = copy.deepcopy(run.optimizer.state_dict())
    with run.flow.dense(), torch.no_grad():
        run.model.get_parameter(NAME).fill_(7.0)
        inside = copy.deepcopy(run.optimizer.state_dict())
    for i, entry in before["state"].items():
        assert all(torch.equal(entry[key], inside["state"][i][key]) for key in entry)


# --- writes inside final_masks() --------------------------------------------------------------


@pytest.mark.parametrize("how", ["row", "load_state_dict"])
@pytest.mark.parametrize("case", ["mdgf-linear", "one-shot", "hybrid"])
def test_a_write_inside_final_masks_is_an_error_and_not_lost(case: str, how: str) -> None:
    run = Run(MLP, BY_ID[case])
    run.train(MLP.batches(4))
    dense, shown = dense_of(run), parameters_of(run.model)
    other = MLP.build(seed=9).state_dict()
    param = run.model.get_parameter(NAME)

    def write() -> None:
        if how == "row":
            param.data[3] = 0.5
        else:
            run.model.load_state_dict(other)

    with pytest.raises(StateError, match=r"0\.weight.*sync"), run.flow.final_masks():
        write()
    assert_same(dense_of(run), dense)
    with pytest.raises(StateError, match="sync"):
        run.optimizer.step()
    run.flow.sync()
    if how == "row":
        expected = dense[NAME].clone()
        expected[3] = torch.where(shown[NAME][3] == 0.5, expected[3], 0.5)
        assert torch.equal(dense_of(run)[NAME], expected)
    else:
        assert_same(dense_of(run), {name: other[name] for name in MLP.targets})
    run.train(MLP.batches(TOTAL - 4))


@pytest.mark.parametrize("several", [False, True], ids=["one optimizer", "an optimizer each"])
@pytest.mark.parametrize("inside", [None, KeyError], ids=["no error", "an error inside"])
def test_a_weight_of_another_shape_leaves_the_others_as_they_were(
    several: bool, inside: type[Exception] | None
) -> None:
    """They show W̃ again, not the final masks, under which the next gradients would be taken."""
    layers = [nn.Linear(8, 8) for _ in range(3)]
    model = nn.Sequential(*layers)
    groups = (
        [list(layer.parameters()) for layer in layers] if several else [list(model.parameters())]
    )
    optimizers = [torch.optim.SGD(group, lr=0.1) for group in groups]
    flow = nmflow.attach(model, optimizers, "mdgf-linear", "1:4", "*", total_steps=9)
    before = [layer.weight.detach().clone() for layer in layers]
    with pytest.raises(inside or StateError, match=None if inside else "shape"):  # noqa: PT012, SIM117
        with flow.final_masks():
            layers[0].weight.data = torch.zeros(4, 4)
            if inside:
                raise inside
    assert torch.equal(layers[1].weight, before[1])
    assert torch.equal(layers[2].weight, before[2])
    with pytest.raises(StateError, match="shape"):
        flow.sync()
    layers[0].weight.data = before[0]
    flow.sync()
    with flow.final_masks():
        assert all(nmflow.holds(layer.weight, "1:4") for layer in layers)


def test_an_error_inside_comes_before_the_write() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(4))

    def fail() -> None:
        run.model.get_parameter(NAME).data.fill_(1.0)
        raise KeyError

    with pytest.raises(KeyError), run.flow.final_masks():
        fail()
    with pytest.raises(StateError, match=NAME):
        run.optimizer.step()


def test_a_swap_and_back_inside_is_no_write() -> None:
    run, free = Run(MLP, BY_ID["mdgf-linear"]), Run(MLP, BY_ID["mdgf-linear"])
    for x in MLP.batches(TOTAL):
        with run.flow.final_masks():
            own = copy.deepcopy(run.model.state_dict())
            run.model.load_state_dict(MLP.build(seed=9).state_dict())
            run.model.load_state_dict(own)
        run.step(x)
        free.step(x)
    assert_same(parameters_of(run.model), parameters_of(free.model))


def test_blocks_that_nobody_closes_are_noticed() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(4))
    run.flow.final_masks().__enter__()
    with pytest.raises(FlowError, match="final_masks"):
        run.optimizer.step()
    assert all_hold(run.model, MLP.targets, MLP.pattern)
