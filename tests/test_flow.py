"""Beside training: hard(), sync(), finalize(), several optimizers, gradients that are missing."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nmflow
import reference
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
    traces,
    twin,
)
from models import BY_ID as FAMILY
from models import FAMILIES, MLP, Family, Spec, loss_of
from nmflow.errors import FlowError, StateError, WeightError
from settings import BY_ID, CASES, OPTIMIZERS, TOTAL, Case

# --- hard() -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
@pytest.mark.parametrize("case", ["mdgf-exp", "one-shot", "sdgf-geometric", "hybrid"])
def test_hard_shows_the_final_pattern_and_restores_bitwise(case: str, family: Family) -> None:
    run, free = Run(family, BY_ID[case]), Run(family, BY_ID[case])
    batches = family.batches(TOTAL)
    n, m, panel = reference.parse(family.pattern)
    for k, x in enumerate(batches):
        before, dense = parameters_of(run.model), dense_of(run)
        with run.flow.hard():
            assert all_hold(run.model, family.targets, family.pattern)
            inside = parameters_of(run.model)
            run.model(x)
        assert_same(parameters_of(run.model), before, f"step {k}")
        assert_same(dense_of(run), dense, f"step {k}")
        if not (case == "one-shot" and k > 5):  # whose mask is older than its weights
            for name, spec in family.targets.items():
                rows = reference.rows_of(dense[name], spec)
                kept = reference.keep(rows, n, m, spec.dim, panel)
                assert torch.equal(reference.rows_of(inside[name], spec), rows * kept)
        run.step(x)
        free.step(x)
        assert_same(parameters_of(run.model), parameters_of(free.model), f"step {k}")


def test_hard_may_be_nested_and_left_by_an_error() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    batches = MLP.batches(TOTAL)
    run.train(batches[:5])
    before = parameters_of(run.model)
    with run.flow.hard(), run.flow.hard():
        assert all_hold(run.model, MLP.targets, MLP.pattern)
    assert_same(parameters_of(run.model), before)
    with pytest.raises(KeyError), run.flow.hard():
        raise KeyError
    assert_same(parameters_of(run.model), before)
    other = Run(MLP, BY_ID["mdgf-linear"])
    other.train(batches)
    run.train(batches[5:])
    assert_same(parameters_of(run.model), parameters_of(other.model))


def test_a_step_inside_hard_is_refused() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(5))
    before, dense = parameters_of(run.model), dense_of(run)
    with run.flow.hard():
        loss_of(run.model(MLP.batches(1)[0])).backward()
        with pytest.raises(FlowError, match="hard"):
            run.optimizer.step()
        with pytest.raises(FlowError, match="hard"):
            run.flow.finalize()
    assert run.flow.steps_done == 5
    assert_same(parameters_of(run.model), before)
    assert_same(dense_of(run), dense)


def test_hard_is_saved_as_what_it_is_not() -> None:
    """A checkpoint written inside hard() must resume as if it had been written outside."""
    case, batches = BY_ID["mdgf-exp-masked"], MLP.batches(TOTAL)
    run = Run(MLP, case)
    run.train(batches[:6])
    with run.flow.hard():
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


def _use(run: Run, what: str) -> None:
    if what == "step":
        run.optimizer.step()
    elif what == "hard":
        with run.flow.hard():
            pass
    else:
        getattr(run.flow, what)()


# --- writes between steps ---------------------------------------------------------------------


@torch.no_grad()
def _write(model: nn.Module, how: str, x: float = 0.25) -> None:
    weight = model.get_parameter("0.weight")
    if how == "add":
        weight.add_(x)
    elif how == "copy":
        weight.copy_(torch.full_like(weight, x))
    elif how == "item":
        weight[0, 0] = 123.0
    elif how == "data":
        weight.data = torch.full_like(weight, x)
    else:
        state = {name: torch.full_like(p, x) for name, p in model.state_dict().items()}
        model.load_state_dict(state)


@pytest.mark.parametrize("how", ["add", "copy", "item", "data", "load_state_dict"])
@pytest.mark.parametrize("case", ["ste-at-once", "mdgf-linear", "one-shot"])
@pytest.mark.parametrize("then", ["step", "hard", "finalize"])
def test_a_write_between_steps_is_refused_by_name(then: str, case: str, how: str) -> None:
    run = Run(MLP, BY_ID[case])
    batches = MLP.batches(6)
    run.train(batches[:3])
    run.optimizer.zero_grad()
    loss_of(run.model(batches[3])).backward()
    dense = dense_of(run)
    _write(run.model, how)
    written = parameters_of(run.model)
    exp_avg = run.optimizer.state[run.model.get_parameter("0.weight")]["exp_avg"].clone()
    for _ in range(2):  # it stays an error until it is mended
        with pytest.raises(StateError) as caught:
            _use(run, then)
    assert "0.weight" in str(caught.value)
    assert "sync" in str(caught.value)
    assert run.flow.steps_done == 3
    assert_same(parameters_of(run.model), written)
    assert_same(dense_of(run), dense)
    now = run.optimizer.state[run.model.get_parameter("0.weight")]["exp_avg"]
    assert torch.equal(now, exp_avg)


@pytest.mark.parametrize("case", ["ste-at-once", "mdgf-linear"])
def test_sync_takes_what_was_written_as_dense(case: str) -> None:
    run = Run(MLP, BY_ID[case])
    batches = MLP.batches(TOTAL)
    run.train(batches[:3])
    other = dense_of(run)["2.weight"]
    with torch.no_grad():
        new = torch.randn_like(run.model.get_parameter("0.weight"))
        run.model.get_parameter("0.weight").copy_(new)
    run.flow.sync()
    assert run.flow.steps_done == 3
    assert torch.equal(dense_of(run)["0.weight"], new)
    assert torch.equal(dense_of(run)["2.weight"], other)  # which nobody wrote
    kept = reference.keep(new, 1, 4)
    delta = run.flow.stage.delta
    assert torch.equal(run.model.get_parameter("0.weight"), torch.where(kept, new, new * delta))
    run.train(batches[3:])
    assert run.flow.steps_done == TOTAL
    assert all_hold(run.model, MLP.targets, MLP.pattern)


def test_equal_writes_are_no_writes() -> None:
    """`load_state_dict` of the model's own values, an EMA swap and back, a broadcast."""
    run, free = Run(MLP, BY_ID["ste-at-once"]), Run(MLP, BY_ID["ste-at-once"])
    batches = MLP.batches(TOTAL)
    for x in batches:
        own = copy.deepcopy(run.model.state_dict())
        _write(run.model, "copy")
        run.model.load_state_dict(own)
        run.step(x)
        free.step(x)
    assert_same(parameters_of(run.model), parameters_of(free.model))


def test_sync_where_nothing_was_written_changes_nothing() -> None:
    run, free = Run(MLP, BY_ID["sr-ste"]), Run(MLP, BY_ID["sr-ste"])
    for x in MLP.batches(TOTAL):
        run.flow.sync()
        run.step(x)
        free.step(x)
    assert_same(parameters_of(run.model), parameters_of(free.model))
    assert_same(dense_of(run), dense_of(free))


def test_other_parameters_may_be_written() -> None:
    run = Run(MLP, BY_ID["ste-at-once"])
    batches = MLP.batches(4)
    run.train(batches[:2])
    with torch.no_grad():
        run.model.get_parameter("0.bias").fill_(3.0)
    run.train(batches[2:])
    assert float(run.model.get_parameter("0.bias").detach().mean()) > 2.5


def test_weights_that_turn_nan_are_named() -> None:
    run = Run(MLP, BY_ID["ste-at-once"])
    run.train(MLP.batches(3))
    with pytest.raises(WeightError, match=r"0\.weight"):
        run.train([MLP.batches(1)[0] * float("nan"), MLP.batches(1)[0]])


# --- finalize ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize("what", ["finalize", "hard", "sync", "dense_weights"])
def test_a_finalized_flow_is_over(what: str) -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(TOTAL))
    run.flow.finalize()
    before = parameters_of(run.model)
    with pytest.raises(FlowError, match="finalize"):
        _use(run, what)
    assert_same(parameters_of(run.model), before)


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


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [
        *itertools.product(
            ["sr-ste-at-once", "mdgf-linear-masked", "one-shot", "settling"], OPTIMIZERS
        ),
        ("step", "adamw-foreach"),
    ],
)
def test_gradients_that_are_missing(case: str, optimizer: str) -> None:
    """A parameter without a gradient is not stepped and has late state; it decays all the same."""
    make = OPTIMIZERS[optimizer]
    run = Run(MLP, BY_ID[case], make, attached=False)
    ref = twin(run, make)
    run.attach()
    for k, x in enumerate(MLP.batches(TOTAL)):
        for one, forward in ((run, run.model), (ref, ref)):
            one.optimizer.zero_grad()
            loss_of(forward(x)).backward()
            if k < 4:
                one.model.get_parameter("0.weight").grad = None
            if k in (5, 6, 9):
                one.model.get_parameter("2.weight").grad = None
        run.optimizer.step()
        ref.step()
        assert_near(parameters_of(run.model), ref.weights(), f"step {k}")
    assert all_hold(run.model, MLP.targets, MLP.pattern)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.kind != "STEP"], ids=lambda case: case.id
)
def test_a_parameter_that_is_never_stepped_still_ends_in_the_pattern(
    case: Case, optimizer: str
) -> None:
    run = Run(MLP, case, OPTIMIZERS[optimizer])
    first = run.model.get_parameter("0.weight")
    dense = dense_of(run)["0.weight"]
    for x in MLP.batches(TOTAL):
        run.optimizer.zero_grad()
        loss_of(run.model(x)).backward()
        first.grad = None
        run.optimizer.step()
    assert torch.equal(dense_of(run)["0.weight"], dense)
    assert case.kind == "Dense" or all_hold(run.model, MLP.targets, MLP.pattern)
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    again = Run(MLP, case, OPTIMIZERS[optimizer], seed=9, attached=False)
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.attach()
    again.train(MLP.batches(1))  # state that is built now, after all
    run.train(MLP.batches(1))
    assert_same(parameters_of(again.model), parameters_of(run.model))


def test_a_step_without_any_gradient_counts() -> None:
    """The schedule is in optimizer steps: `step()` was called, so k moves."""
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(4))
    run.optimizer.zero_grad()
    run.optimizer.step()
    assert run.flow.steps_done == 5


@pytest.mark.parametrize("case", ["mdgf-exp", "sr-ste"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
def test_activation_checkpointing(case: str, reentrant: bool) -> None:
    """A block whose forward runs again in backward sees the same weights."""
    family = FAMILY["encoder-layer"]
    run, free = Run(family, BY_ID[case]), Run(family, BY_ID[case])
    for x in family.batches(TOTAL):
        run.optimizer.zero_grad()
        x = x.requires_grad_(reentrant)
        loss_of(checkpoint(run.model, x, use_reentrant=reentrant)).backward()  # type: ignore[arg-type]
        run.optimizer.step()
        free.step(x.detach())
    assert_same(parameters_of(run.model), parameters_of(free.model))


def test_a_parameter_on_two_modules_is_one_target() -> None:
    """Tied weights are masked once, and stay tied."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = nn.Linear(8, 8)
            self.two.weight = self.one.weight
            self.last = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.two(torch.tanh(self.one(x)))))

    family = Family("tied", Tied, (8,), {"one.weight": Spec()}, include=["one.*"])
    run = Run(family, BY_ID["mdgf-linear-masked"], attached=False)
    ref = twin(run)
    run.attach()
    for x in family.batches(TOTAL):
        run.step(x)
        reference_step(ref, x)
    assert_near(parameters_of(run.model), ref.weights())
    assert run.model.get_submodule("two").weight is run.model.get_submodule("one").weight


# --- several optimizers, patterns, groups -----------------------------------------------------


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


# --- observers --------------------------------------------------------------------------------


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
