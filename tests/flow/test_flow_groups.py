"""Several optimizers, parameter groups and patterns; what observers see."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
import reference
from harness import (
    ADAMW,
    Run,
    all_hold,
    assert_near,
    attach,
    dense_of,
    parameters_of,
    reference_step,
    traces,
    twin,
)
from models import BY_ID as FAMILY
from models import MLP, Spec, loss_of
from settings import BY_ID, OPTIMIZERS, TOTAL


@pytest.mark.parametrize("case", ["sr-ste", "mdgf-exp-masked", "hybrid", "one-shot"])
def test_several_optimizers(case: str) -> None:
    def halves(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [
            ADAMW(model.get_submodule("0").parameters()),
            OPTIMIZERS["sgd"](model.get_submodule("2").parameters()),
        ]

    run = Run(MLP, BY_ID[case], attached=False)
    ref = twin(run)
    optimizers, others = halves(run.model), halves(ref.model)
    flow = attach(run.model, optimizers, BY_ID[case], MLP)
    for k, x in enumerate(MLP.batches(TOTAL)):
        assert flow.steps_done == k
        run.model.zero_grad()
        loss_of(run.model(x)).backward()
        ref.model.zero_grad()
        loss_of(ref(x)).backward()
        ref.regularise()
        for one, other in zip(optimizers, others, strict=True):
            one.step()
            other.step()
        ref.k += 1
        assert_near(parameters_of(run.model), ref.weights(), f"step {k}")
    assert all_hold(run.model, MLP.targets, MLP.pattern)
    flow.finalize()
    assert [traces(optimizer) for optimizer in optimizers] == [[], []]


@pytest.mark.parametrize("case", ["mdgf-linear", "settling"])
def test_parameter_groups_added_and_tuned(case: str) -> None:
    """Groups with their own rate and weight decay; one is added after attach, with others."""
    run = Run(MLP, BY_ID[case], attached=False)
    ref = twin(run)
    for one in (run, ref):
        weights = [one.model.get_parameter(name) for name in MLP.targets]
        one.optimizer = torch.optim.AdamW(
            [{"params": [weights[0]], "weight_decay": 0.3}, {"params": [weights[1]], "lr": 0.05}]
        )
    run.attach()
    for one in (run, ref):
        biases = [one.model.get_parameter(name) for name in ("0.bias", "2.bias")]
        one.optimizer.add_param_group({"params": biases, "weight_decay": 0.0})
    for k, x in enumerate(MLP.batches(TOTAL)):
        run.step(x)
        reference_step(ref, x)
        for one in (run, ref):
            one.optimizer.param_groups[0]["lr"] = 0.01 / (k + 1)
    assert_near(parameters_of(run.model), ref.weights())


def test_patterns_by_glob() -> None:
    family = FAMILY["encoder-layer"]
    model = family.build()
    optimizer = ADAMW(model.parameters())
    flow = nmflow.attach(
        model,
        optimizer,
        recipe=nmflow.SDGF(structure="stepwise", dense=0, finetune=2),
        pattern={"linear1.*": "1:8", "self_attn.*": "2:4", "linear2.*": "1:4@4"},
        total_steps=10,
    )
    assert {t.name: str(t.pattern) for t in flow.plan} == {
        "self_attn.in_proj_weight": "2:4",
        "self_attn.out_proj.weight": "2:4",
        "linear1.weight": "1:8",
        "linear2.weight": "1:4@4",
    }
    stages = []
    for x in family.batches(10):
        stages.append({label: str(p) for label, p in flow.stage.patterns.items()})
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    assert [s["linear1.weight"] for s in stages] == [
        *["7:8"] * 2,
        *["4:8"] * 2,
        *["2:8"] * 2,
        *["1:8"] * 4,
    ]
    assert [s["self_attn.in_proj_weight"] for s in stages] == [*["3:4"] * 4, *["2:4"] * 6]
    assert stages[0]["linear2.weight"] == "3:4@4"
    flow.finalize()
    assert reference.holds(model.get_parameter("linear1.weight"), 1, 8)
    assert not reference.holds(model.get_parameter("linear1.weight")[:, :4], 0, 4)
    assert reference.holds(model.get_parameter("self_attn.in_proj_weight"), 2, 4)
    assert reference.holds(model.get_parameter("self_attn.out_proj.weight"), 2, 4)
    assert reference.holds(model.get_parameter("linear2.weight"), 1, 4, panel=4)


def test_excluded_weights_stay_dense() -> None:
    run = Run(MLP, BY_ID["ste-at-once"], include="all", exclude=["2.*"], pattern="1:4")
    run.train(MLP.batches(TOTAL))
    run.flow.finalize()
    assert all_hold(run.model, {"0.weight": Spec()}, "1:4")
    assert bool((run.model.get_parameter("2.weight") != 0).all())


def test_rows_of_a_fused_projection_that_are_no_target_are_plain() -> None:
    """`include="qk"`: the value rows receive the optimizer's step and nothing else."""
    family = FAMILY["fused-qkv"]
    run = Run(family, BY_ID["sr-ste-at-once"])
    run.train(family.batches(TOTAL))
    weight = run.model.get_parameter("attn.qkv.weight")
    assert reference.holds(weight[:16], 1, 4)
    assert bool((weight[16:] != 0).all())
    assert torch.equal(dense_of(run)["attn.qkv.weight"][16:], weight[16:])


def test_the_last_step_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    with caplog.at_level(logging.DEBUG, logger="nmflow"):
        run.train(MLP.batches(TOTAL))
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        run.train(MLP.batches(4))
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("case", ["sr-ste", "mdgf-exp-masked", "one-shot"])
def test_observers_see_the_raw_gradient_and_the_dense_weight(case: str, scaled: bool) -> None:
    family = FAMILY["fused-qkv"]
    make = OPTIMIZERS["adamw-fused" if scaled else "adamw-foreach"]
    run = Run(family, BY_ID[case], make, dtype=torch.float32, attached=False)
    ref = twin(run, make)
    run.attach()
    seen: list[Any] = []
    name = "attn.qkv.weight"

    def watch(step: int, views: list[Any]) -> None:
        rows = [(v.target.label, v.weight.clone(), v.grad.clone(), v.mask.clone()) for v in views]
        seen.append((step, rows))

    handle = run.flow.observe(watch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
    for k, x in enumerate(family.batches(TOTAL, torch.float32)):
        run.optimizer.zero_grad()
        scaler.scale(loss_of(run.model(x))).backward()
        plain = copy.deepcopy(ref)
        weight = plain.effective().get(name, plain.model.get_parameter(name))
        weight = weight.detach().requires_grad_()
        output = torch.func.functional_call(plain.model, {name: weight}, (x,))
        (raw,) = torch.autograd.grad(loss_of(output), weight)
        scaler.step(run.optimizer)
        scaler.update()
        step, views = seen[-1]
        ((label, dense, grad, mask),) = views
        assert (step, label) == (k, "attn.qkv.weight[0:16]")
        assert_near({"w": dense}, {"w": ref.dense_weights()[name][:16]})
        assert_near({"g": grad}, {"g": raw[:16]})
        frozen = ref.frozen.get(name)
        kept = reference.keep(dense, 1, 4) if frozen is None else frozen
        assert torch.equal(mask, kept)
        reference_step(ref, x)
    assert len(seen) == TOTAL
    handle.remove()
    run.train(family.batches(1, torch.float32))
    assert len(seen) == TOTAL


def test_a_pull_is_what_it_says_and_none_is_mdgf() -> None:
    """One SGD step by hand, at a rate that is a tensor too; and μ = 0 is MDGF, bit for bit."""
    for lr in (0.25, torch.tensor(0.25)):
        layer = nn.Linear(4, 1, bias=False, dtype=torch.float64)
        layer.weight.data = torch.tensor([[4.0, -2.0, 1.0, 0.5]], dtype=torch.float64)
        model = nn.Sequential(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        recipe = nmflow.Settling(decay="linear", dense=0, finetune=1, pull=0.8)
        flow = nmflow.attach(model, optimizer, recipe, "1:4", include="*", total_steps=5)
        for k in range(2):
            optimizer.zero_grad()
            (0.0 * model(torch.ones(1, 4, dtype=torch.float64)).sum()).backward()
            optimizer.step()
            assert flow.steps_done == k + 1
        # δ was 1 at the first step and 3/4 at the second, so that what is pruned lost 1/4 of 0.2.
        dense = optimizer.state[layer.weight]["nmflow_dense"]
        expected = torch.tensor([[4.0, -1.9, 0.95, 0.475]], dtype=torch.float64)
        torch.testing.assert_close(dense, expected)
    ends = []
    for recipe in (nmflow.Settling(pull=0.0), nmflow.MDGF(gradient="straight-through", dense=0.05)):
        torch.manual_seed(0)
        model = nn.Linear(16, 8)
        optimizer = ADAMW(model.parameters())
        nmflow.attach(model, optimizer, recipe, "1:4", include="*", total_steps=20)
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(4, 16)).square().sum().backward()
            optimizer.step()
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)
