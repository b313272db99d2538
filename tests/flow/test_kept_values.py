"""The optimizer's step on kept values: the same step, the same saved states, fewer bytes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from test_sparse_steps import FP32, on
from torch import Tensor

import nmflow
from harness import Run, assert_near, assert_same, parameters_of, through_file
from models import BY_ID as FAMILY
from models import MLP, loss_of
from nmflow import native
from nmflow.errors import StateError, WeightError
from nmflow.flow.marks import blank, fingerprint
from nmflow.flow.sparse_steps import ELEMENTWISE
from nmflow.masks import native as native_masks
from nmflow.masks.kept_values import Places, serves
from settings import BY_ID, OPTIMIZERS, TOTAL, Case

FROZEN = ["one-shot", "mdgf-frozen", "sdgf-frozen", "mdgf-stairs"]
SINCE = 11  # a step of each after which its mask is frozen


def whole(flow: nmflow.Flow) -> list[str]:
    return [layer.why_whole for layer in flow.explain().layers if not layer.compact]


def state_of(run: Run, name: str = "0.weight") -> dict[str, Any]:
    return run.optimizer.state[run.model.get_parameter(name)]


def begun(name: str = "mdgf-frozen", make: Any = OPTIMIZERS["adamw-fused"], **more: Any) -> Run:
    """A run whose last step was on kept values."""
    run = Run(MLP, on(BY_ID[name]), make, dtype=FP32, **more)
    run.train(MLP.batches(SINCE, FP32))
    run.train(MLP.batches(1, FP32))
    assert not whole(run.flow)
    return run


# --- taking values together -------------------------------------------------------------------


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    if not native.available():
        pytest.skip("no compiled library")
    before = native.isa()
    if native.set_isa(request.param) != request.param:
        native.set_isa(before)
        pytest.skip(f"no {request.param} here")
    yield
    native.set_isa(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 64), (4, 3, 5), (1100, 1030)], ids=str)
@pytest.mark.usefixtures("isa")
def test_values_go_together_and_apart(shape, dtype, threads):
    torch.set_num_threads(threads)
    x, kept = torch.randn(shape).to(dtype), torch.rand(shape) < 0.3
    kept[0] = True
    places = Places(kept)
    assert torch.equal(places.kept, kept)
    values = places.together(x)
    assert torch.equal(values, x[kept])
    out = torch.full_like(x, float("nan"))
    prints = blank(out) if serves(out) else None
    assert places.apart(values, out, prints)
    assert torch.equal(out, torch.where(kept, x, 0.0))
    assert prints is None or torch.equal(prints[1], fingerprint(out))
    for bad in (float("nan"), float("inf"), -float("inf")):
        values[-1] = bad
        assert not places.apart(values, out)
        want = torch.zeros_like(x).masked_scatter(kept, values)
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("isa")
def test_what_the_bits_do_not_say_is_refused():
    kept = torch.rand(9, 70) < 0.3
    x = torch.randn(9, 70)
    for spoil in (lambda p: p.starts[4:].add_(1), lambda p: p.bits[2, 8:].fill_(255)):
        places = Places(kept)
        spoil(places)
        values = x.new_zeros(places.count + 70)
        with pytest.raises(WeightError):
            native_masks.take(x, places.bits, places.starts, values)
        with pytest.raises(WeightError):
            native_masks.put(values, places.bits, places.starts, x.clone())


# --- the same step ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(ELEMENTWISE, key=str))
@pytest.mark.parametrize("name", FROZEN)
def test_steps_and_states_are_those_of_whole_weights(name: str, kind: Any) -> None:
    known = inspect.signature(kind).parameters
    options = {k: v for k, v in {"weight_decay": 0.1, "momentum": 0.9, "amsgrad": True}.items()
               if k in known}  # fmt: skip

    def make(params: Any) -> Any:
        return kind(params, lr=0.01, **options)

    runs = [Run(MLP, case, make, dtype=FP32) for case in (BY_ID[name], on(BY_ID[name]))]
    for run in runs:
        run.train(MLP.batches(TOTAL, FP32))
    one, other = runs
    assert not whole(other.flow)
    for key, value in parameters_of(one.model).items():
        torch.testing.assert_close(value, parameters_of(other.model)[key], rtol=2e-3, atol=2e-4)
    states = [run.optimizer.state_dict()["state"] for run in runs]
    assert list(states[0]) == list(states[1])
    for entry, same in zip(states[0].values(), states[1].values(), strict=True):
        assert set(entry) == set(same)
        kept = entry.get("nmflow_mask", torch.tensor(True))
        for key, value in entry.items():
            if isinstance(value, Tensor):
                assert value.shape == same[key].shape, key
                assert value.dtype == same[key].dtype, key
                if value.shape == kept.shape:
                    value, found = value[kept], same[key][kept]
                    torch.testing.assert_close(found, value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["conv1d", "attention", "hf-conv1d", "fused-qkv", "panels"])
def test_any_weight_whose_mask_is_frozen_is_stepped_so(family: str) -> None:
    cases = BY_ID["mdgf-frozen"], on(BY_ID["mdgf-frozen"])
    runs = [Run(FAMILY[family], case, dtype=FP32) for case in cases]
    for run in runs:
        run.train(FAMILY[family].batches(TOTAL, FP32))
    assert not whole(runs[1].flow)
    for (key, value), other in zip(
        parameters_of(runs[0].model).items(), parameters_of(runs[1].model).values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=2e-3, atol=2e-4, msg=key)


class Mine(torch.optim.AdamW):
    """A subclass, which may do anything."""


WHOLE: dict[str, tuple[Case, Any, str]] = {
    "not frozen": (BY_ID["mdgf-linear-masked"], OPTIMIZERS["sgd"], "not frozen"),
    "Adafactor": (BY_ID["mdgf-frozen"], OPTIMIZERS["adafactor"], "Adafactor is not known"),
    "a subclass": (BY_ID["mdgf-frozen"], Mine, "Mine is not known"),
    "scaled": (BY_ID["mdgf-scaled-frozen"], OPTIMIZERS["sgd"], "scales or changes kept weights"),
    "a form": (BY_ID["s-ste-frozen"], OPTIMIZERS["sgd"], "scales or changes kept weights"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_who_is_stepped_whole_and_why(kind: str) -> None:
    case, make, said = WHOLE[kind]
    run = Run(MLP, on(case), make, dtype=FP32)
    run.train(MLP.batches(12, FP32))
    assert all(said in why for why in whole(run.flow))
    assert len(whole(run.flow)) == 2


# --- bytes, and who looks ---------------------------------------------------------------------


def test_bytes_between_steps_and_whole_tensors_for_whoever_looks() -> None:
    run = begun()
    weight = run.model.get_parameter("0.weight")
    kept = weight.numel() // 4
    held = {k: v.numel() * v.element_size() for k, v in state_of(run).items()}
    assert held == {
        "exp_avg": 4 * kept, "exp_avg_sq": 4 * kept, "nmflow_dense": 4 * kept, "step": 4
    }  # fmt: skip
    want = weight.detach().clone()
    assert torch.equal(run.flow.dense_weights()["0.weight"], want)
    assert state_of(run)["exp_avg"].shape == weight.shape
    run.train(MLP.batches(1, FP32))
    assert state_of(run)["exp_avg"].shape == (kept,)
    saved = run.optimizer.state_dict()
    assert saved["state"][0]["exp_avg"].shape == weight.shape
    run.train(MLP.batches(1, FP32))
    assert saved["state"][0]["exp_avg"].shape == weight.shape  # what was handed out stays
    copied = copy.deepcopy(run.optimizer)
    assert next(iter(copied.state.values()))["exp_avg"].shape == weight.shape
    run.train(MLP.batches(1, FP32))
    run.flow.observe(lambda step, views: [view.weight.clone() for view in views])
    run.train(MLP.batches(1, FP32))
    with run.flow.dense(), torch.no_grad():
        weight.clamp_(-0.125, 0.125)
    assert float(run.flow.dense_weights()["0.weight"].abs().max()) <= 0.125
    run.train(MLP.batches(1, FP32))
    run.flow.finalize()
    assert state_of(run)["exp_avg"].shape == weight.shape
    assert not [key for key in state_of(run) if "nmflow" in key]
    run.train(MLP.batches(1, FP32))


def test_a_run_that_is_saved_at_each_step_is_the_same_bit_for_bit() -> None:
    runs = [begun(), begun()]
    for x in MLP.batches(5, FP32):
        for run in runs:
            run.step(x)
        runs[1].optimizer.state_dict()
        _ = runs[1].flow.dense_weights()
    assert_same(parameters_of(runs[0].model), parameters_of(runs[1].model))


def test_states_are_loaded_before_and_within_the_phase() -> None:
    run = begun()
    early = Run(MLP, on(BY_ID["mdgf-frozen"]), OPTIMIZERS["adamw-fused"], dtype=FP32)
    first = through_file((early.model.state_dict(), early.optimizer.state_dict()))
    saved = through_file((run.model.state_dict(), run.optimizer.state_dict()))
    run.train(MLP.batches(3, FP32))
    want = parameters_of(run.model)
    for start in (saved, first):  # into a phase whose state is compact
        run.model.load_state_dict(start[0])
        run.optimizer.load_state_dict(through_file(start[1]))
        if start is first:
            run.train(MLP.batches(SINCE, FP32))
            run.train(MLP.batches(1, FP32))
        run.train(MLP.batches(3, FP32))
        assert_near(parameters_of(run.model), want)


def test_a_write_that_nobody_told_of_is_refused_and_sync_takes_it() -> None:
    run = begun()
    weight = run.model.get_parameter("0.weight")
    place = int((weight != 0).flatten().nonzero()[0])
    with torch.no_grad():
        weight.view(-1)[place] = 0.5
    loss_of(run.model(MLP.batches(1, FP32)[0])).backward()
    with pytest.raises(StateError, match="was written since step"):
        run.optimizer.step()
    run.flow.sync()
    assert float(run.flow.dense_weights()["0.weight"].view(-1)[place]) == 0.5
    run.train(MLP.batches(1, FP32))


def test_a_step_that_raises_leaves_whole_gradients_and_weights() -> None:
    run = begun("mdgf-frozen", OPTIMIZERS["adamw-plain"])
    params = list(run.model.parameters())
    shapes = [p.shape for p in params]
    x = MLP.batches(1, FP32)[0]
    run.optimizer.zero_grad()
    loss_of(run.model(x)).backward()
    run.optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        run.optimizer.step()
    assert [p.shape for p in params] == shapes
    assert [p.grad.shape for p in params if p.grad is not None] == shapes
    run.optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    run.train(MLP.batches(2, FP32))
    assert not whole(run.flow)


def test_weights_without_a_gradient_stand_still() -> None:
    run = begun()
    before = parameters_of(run.model)
    run.optimizer.zero_grad()
    loss_of(run.model(MLP.batches(1, FP32)[0])).backward()
    run.model.get_parameter("0.weight").grad = None
    run.optimizer.step()
    after = parameters_of(run.model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["2.weight"], after["2.weight"])


def test_a_scaler_that_finds_an_infinity_skips_the_step() -> None:
    run = begun()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before, k = parameters_of(run.model), run.flow.steps_done
    for factor in (float("inf"), 1.0):
        run.optimizer.zero_grad()
        scaler.scale(loss_of(run.model(MLP.batches(1, FP32)[0])) * factor).backward()
        scaler.step(run.optimizer)
        scaler.update()
        if factor != 1.0:
            assert run.flow.steps_done == k
            assert_same(parameters_of(run.model), before)
    assert run.flow.steps_done == k + 1


def test_the_library_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    want = begun()
    want.train(MLP.batches(2, FP32))
    monkeypatch.setattr("nmflow.masks.kept_values.serves", lambda x: False)
    monkeypatch.setattr("nmflow.flow.slot_kept.serves", lambda x: False)
    run = begun()
    run.train(MLP.batches(2, FP32))
    assert_same(parameters_of(run.model), parameters_of(want.model))
