"""Steps on kept places: equal to dense ones within rounding, and dense with a reason elsewhere."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import nmflow
from harness import Run, assert_near, assert_same, check_row, parameters_of, reference_step, twin
from models import BY_ID as FAMILY
from models import MLP, loss_of
from nmflow import native
from nmflow.errors import CompressError, NMFlowError, RecipeError
from nmflow.flow import kept_layers
from nmflow.kernels import step_speed
from processes import launch
from settings import BY_ID, CASES, INTERVAL_CASES, MORE_CASES, NORMS_CASES, OPTIMIZERS, TOTAL, Case

pytestmark = pytest.mark.skipif(
    not native.available() or native.isa() == "portable", reason="no kernels without AVX2"
)

FROZEN = ["one-shot", "mdgf-frozen", "settling-frozen", "sdgf-frozen", "mdgf-scaled-frozen"]
FP32 = torch.float32


def on(case: Case, mode: str = "on") -> Case:
    return replace(case, attach={**case.attach, "sparse_steps": mode})


def sparse(flow: nmflow.Flow) -> list[str]:
    return [layer.name for layer in flow.explain().layers if layer.sparse]


def _layers(run: Run) -> Any:
    """The two Linear layers of the network."""
    return cast(nn.Sequential, run.model)[::2]


def why(flow: nmflow.Flow, name: str) -> str:
    return next(layer.why for layer in flow.explain().layers if layer.name == name)


# --- the contract -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    # But for the hybrid that holds masks: in float32 its groups come to a tie, dense or not.
    [*CASES, *MORE_CASES, *INTERVAL_CASES[:-1], *NORMS_CASES],
    ids=lambda case: case.id,
)
def test_every_recipe_equals_its_reference(case: Case) -> None:
    check_row(on(case), MLP, "adamw-plain" if case.kind == "STEP" else "sgd", FP32)


@pytest.mark.parametrize("family", sorted(FAMILY))
@pytest.mark.parametrize("case", FROZEN[:2])
def test_every_module_family_equals_its_reference(case: str, family: str) -> None:
    check_row(on(BY_ID[case]), FAMILY[family], "sgd", FP32)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS])
def test_every_optimizer_equals_its_reference(optimizer: str) -> None:
    # A straight-through rule under Adafactor, which is not elementwise, stays dense.
    for name in ("mdgf-frozen", "sdgf-frozen"):
        run = Run(MLP, on(BY_ID[name]), OPTIMIZERS[optimizer], dtype=FP32, attached=False)
        ref = twin(run, OPTIMIZERS[optimizer])
        run.attach()
        for x in MLP.batches(TOTAL, FP32):
            run.step(x)
            reference_step(ref, x)
        for key, value in run.model.named_parameters():
            torch.testing.assert_close(value, ref.weights()[key], rtol=1e-3, atol=1e-4)


# --- which layers, and when -------------------------------------------------------------------

WHEN = {  # the first step, of 14, from which both layers of the network are sparse, or never
    "one-shot": 5, "one-shot-frozen": 5, "mdgf-frozen": 10, "mdgf-linear-masked": 10,
    "settling-frozen": 10, "sdgf-frozen": 10, "gradual": 10, "hybrid-masked": 10, "ste": None,
    "sr-ste": None, "settling": None, "s-ste-frozen": None, "maxq": None, "dense": None,
    "mdgf-stairs": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", WHEN)
def test_from_which_step_on(name: str) -> None:
    run = Run(MLP, on(BY_ID[name]), dtype=FP32)
    first = None
    for k, x in enumerate(MLP.batches(TOTAL, FP32)):
        found = len(sparse(run.flow))
        assert found in (0, 2)
        assert (found > 0) == all(isinstance(m, kept_layers.OnKept) for m in _layers(run))
        first = k if first is None and found else first
        assert found or all(layer.why for layer in run.flow.explain().layers)
        run.step(x)
    assert first == WHEN[name]


FRAMES = {  # recipes whose mask is binary while its pattern changes, and the patterns served
    "sdgf-stepwise": (nmflow.SDGF("stepwise", gradient="masked"), "1:16", ["4:16", "2:16", "1:16"]),
    "sdgf-geometric": (
        nmflow.SDGF("geometric", gradient="masked"), "1:8", ["8:64", "4:32", "2:16", "1:8"],
    ),
    "sdgf-panels": (
        nmflow.SDGF("panels", gradient="masked"), "1:8@16",
        ["1:8", "1:8@2", "1:8@4", "1:8@8", "1:8@16"],
    ),
    "gradual": (nmflow.Gradual(), "1:16", ["4:16", "3:16", "2:16", "1:16"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_masked_frames_of_a_quarter_and_less_are_sparse_and_equal_dense_steps(name: str) -> None:
    recipe, pattern, served = FRAMES[name]
    models, met = [], []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        flow = nmflow.attach(
            model, optimizer, recipe, pattern, include="0.weight", total_steps=60, sparse_steps=mode
        )
        for k in range(60):
            if sparse(flow):
                met.append(str(flow.stage.patterns["0.weight"]))
            torch.manual_seed(k + 1)
            optimizer.zero_grad()
            model(torch.randn(9, 64)).square().mean().backward()
            optimizer.step()
        models.append(model)
    assert list(dict.fromkeys(met)) == served
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_off_swaps_nothing_and_auto_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    off = Run(MLP, on(BY_ID["mdgf-frozen"], "off"), dtype=FP32)
    off.train([*MLP.batches(10, FP32), *MLP.batches(4, FP32)])
    assert type(_layers(off)[0]) is nn.Linear
    assert "sparse_steps is 'off'" in str(off.flow.explain())
    for dense, kept in ((1.0, 2.0), (2.0, 1.0)):
        calls: list[Any] = []

        def told(*args: Any, pair=(dense, kept), calls=calls) -> tuple[float, float]:
            calls.append(args)
            return pair

        monkeypatch.setattr(kept_layers, "seconds", told)
        run = Run(MLP, on(BY_ID["mdgf-frozen"], "auto"), dtype=FP32)
        run.train(MLP.batches(10, FP32))
        assert "not measured yet" in why(run.flow, "0.weight")
        with torch.no_grad():
            run.model(MLP.batches(1, FP32)[0])
        with monkeypatch.context() as captured:  # in a CUDA graph nothing can be timed
            captured.setattr(kept_layers, "_captured", lambda x: True)
            run.model(MLP.batches(1, FP32)[0])
        assert not calls
        assert "not measured yet" in why(run.flow, "0.weight")
        run.train(MLP.batches(4, FP32))
        assert len(calls) == 2
        assert len(sparse(run.flow)) == (2 if kept < dense else 0)
        assert kept < dense or "0.50 ×" in why(run.flow, "0.weight")
        assert_near(parameters_of(run.model), parameters_of(off.model))


def test_a_mask_that_stayed_behind_makes_a_call_dense() -> None:
    """The network was moved in its sparse phase: the mask in the optimizer's state was not."""
    way = kept_layers.Way((1, 8, 1), torch.zeros(16, 16, dtype=torch.uint8, device="meta"), True)
    x, w = torch.ones(2, 128), torch.ones(16, 128)
    assert way.dense_call(x, w)
    assert way.said == "its held mask is on meta, and it was moved to cpu"
    way.kept = torch.zeros(16, 16, dtype=torch.uint8)
    assert not way.dense_call(x, w)
    assert way.said == ""


@pytest.mark.parametrize(
    "error", [CompressError("Triton does not run 'pack'"), torch.OutOfMemoryError("2.00 GiB")]
)
def test_a_layer_that_cannot_be_measured_is_dense_and_says_why(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    off, run = (Run(MLP, on(BY_ID["mdgf-frozen"], mode), dtype=FP32) for mode in ("off", "auto"))
    calls = []

    def told(*args: Any) -> tuple[float, float]:
        calls.append(args)
        raise error

    monkeypatch.setattr(kept_layers, "seconds", told)
    for one in (off, run):
        one.train([*MLP.batches(10, FP32), *MLP.batches(4, FP32)])
    assert len(calls) == 2
    assert not sparse(run.flow)
    assert f"could not be measured: {error}" in why(run.flow, "0.weight")
    assert_near(parameters_of(run.model), parameters_of(off.model))


def test_auto_measures_real_layers() -> None:
    """1:16 of a layer that is large enough is faster on every machine that has the kernels."""
    model = nn.Sequential(nn.Linear(1024, 1024))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = nmflow.attach(
        model,
        optimizer,
        nmflow.OneShot(dense=0),
        "1:16",
        include="*",
        total_steps=3,
        sparse_steps="auto",
    )
    model(torch.randn(512, 1024)).square().mean().backward()
    assert sparse(flow) == ["0.weight"]


def _saves_all() -> Any:
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)


def _counted(model: nn.Module, x: torch.Tensor, seen: list[int]) -> torch.Tensor:
    def count(saved: torch.Tensor) -> torch.Tensor:
        seen.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        return model(x)


def _flops(model: nn.Module, x: torch.Tensor, seen: list[int]) -> torch.Tensor:
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    seen.append(counter.get_total_flops())
    return y


WATCHED: dict[str, Callable[[nn.Module, torch.Tensor, list[int]], Any]] = {
    "checkpoint": lambda model, x, seen: checkpoint(model, x, use_reentrant=False),
    "selective": lambda model, x, seen: checkpoint(
        model, x, use_reentrant=False, context_fn=_saves_all
    ),
    "hooks": _counted,
    "flops": _flops,
}


@pytest.mark.parametrize("faster", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", ["linear", "hf-conv1d"])
@pytest.mark.parametrize("watched", WATCHED)
def test_a_measurement_is_seen_by_nobody(
    watched: str, family: str, autocast: bool, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that measures is, for whoever watches it, the step after it on the same input."""

    def judged(*args: Any) -> tuple[float, float]:
        step_speed.seconds(*args)
        return (2.0, 1.0) if faster else (1.0, 2.0)

    monkeypatch.setattr(step_speed, "_KNOWN", {})
    monkeypatch.setattr(kept_layers, "seconds", judged)
    run = Run(FAMILY[family], on(BY_ID["mdgf-frozen"], "auto"), dtype=FP32)
    run.train(FAMILY[family].batches(10, FP32))
    x = FAMILY[family].batches(1, FP32)[0].requires_grad_()
    found: list[Any] = []
    for _ in range(2):
        run.model.zero_grad()
        seen: list[int] = []
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = WATCHED[watched](run.model, x, seen)
        y.float().square().mean().backward()
        found.append((seen, [p.grad for p in run.model.parameters()]))
    assert len(sparse(run.flow)) == (2 if faster else 0)
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


def _network(kind: str) -> tuple[nn.Module, str]:
    linear = nn.Linear(64, 64)
    if kind == "tied":
        other = nn.Linear(64, 64)
        other.weight = linear.weight
        return nn.Sequential(linear, other), "tied: '0.weight' and '1.weight'"
    if kind == "attention":
        return nn.MultiheadAttention(64, 2), "in_proj_weight of a MultiheadAttention"
    if kind == "convolution":
        return nn.Conv1d(64, 64, 1), "weight of a Conv1d"
    if kind == "subclass":
        return nn.Sequential(type("Mine", (nn.Linear,), {})(64, 64)), "weight of a Mine"
    if kind == "forward":
        linear.forward = linear.forward
        return nn.Sequential(linear), "replaced on the object"
    if kind == "long groups":
        return nn.Sequential(nn.Linear(512, 4)), ""
    if kind == "double":
        return nn.Sequential(linear.double()), "float64"
    return nn.Sequential(linear), ""


STAYS = {
    "tied": {}, "attention": {}, "convolution": {}, "subclass": {}, "forward": {}, "double": {},
    "a half": {"pattern": "2:4"}, "long groups": {"pattern": "1:512"},
    "some rows": {"pattern": {"0.weight": "1:8"}},
}  # fmt: skip
REASONS = {"a half": "2:4 keeps more than a quarter", "long groups": "M up to 256"}


@pytest.mark.parametrize("kind", [k for k in STAYS if k != "some rows"])
def test_who_stays_dense_and_why(kind: str) -> None:
    model, said = _network(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = nmflow.attach(
        model, optimizer, nmflow.OneShot(dense=0), STAYS[kind].get("pattern", "1:8"), include="*",
        total_steps=3, sparse_steps="on",
    )  # fmt: skip
    assert (
        not any(isinstance(m, kept_layers.OnKept) for m in model.modules()) or kind == "attention"
    )
    assert REASONS.get(kind, said) in flow.explain().layers[0].why


def test_targets_that_are_some_rows_of_a_weight_stay_dense() -> None:
    family = FAMILY["fused-qkv"]
    run = Run(family, on(BY_ID["one-shot"]), dtype=FP32)
    run.train(family.batches(6, FP32))
    assert "some of its rows are not targets" in why(run.flow, "attn.qkv.weight")


def test_a_parametrized_weight_is_no_target_at_all() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = nmflow.attach(
        model, optimizer, nmflow.OneShot(dense=0), "1:8", include=["1.*"], total_steps=3,
        sparse_steps="on",
    )  # fmt: skip
    assert [layer.name for layer in flow.explain().layers] == ["1.weight"]


def test_observers_see_whole_gradients_and_the_other_steps_are_sparse() -> None:
    run = Run(MLP, on(BY_ID["mdgf-frozen"]), dtype=FP32)
    run.train(MLP.batches(10, FP32))
    seen: list[int] = []

    def look(step: int, views: list[Any]) -> None:
        seen.append(step)
        assert all(bool(view.grad[~view.mask].any()) for view in views)

    run.flow.observe(look, every=2)
    assert "observer" in why(run.flow, "0.weight")
    x = MLP.batches(1, FP32)[0]
    run.step(x)
    assert len(sparse(run.flow)) == 2
    run.step(x)
    assert not sparse(run.flow)
    run.train(MLP.batches(2, FP32))
    assert seen == [10, 12]


def test_a_mode_that_is_none_is_refused_before_anything_is_done() -> None:
    model = MLP.build(FP32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for mode in cast(Any, ("sparse", True, None)):
        with pytest.raises(RecipeError, match="sparse_steps is"):
            nmflow.attach(model, optimizer, total_steps=3, sparse_steps=mode)
    assert not optimizer.state


# --- what stays as it is ----------------------------------------------------------------------


def _begun(case: str = "mdgf-frozen", steps: int = 11, **more: Any) -> Run:
    run = Run(MLP, on(BY_ID[case]), dtype=FP32, **more)
    run.train(MLP.batches(steps, FP32))
    assert len(sparse(run.flow)) == 2
    return run


def test_copies_and_pickles_are_plain_modules_and_so_is_what_finalize_leaves() -> None:
    run = _begun()
    x = MLP.batches(1, FP32)[0]
    want = run.model(x)
    for other in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        assert [type(m) for m in cast(Any, other)[::2]] == [nn.Linear] * 2
        assert all("nmflow" not in key for m in other.modules() for key in vars(m))
        torch.testing.assert_close(other(x), want)
    run.flow.finalize()
    assert [type(m) for m in _layers(run)] == [nn.Linear] * 2
    assert not any("nmflow" in key for m in run.model.modules() for key in vars(m))


def test_a_write_that_nobody_told_of_is_what_the_next_forward_computes_with() -> None:
    """As when averaged weights are shown for an evaluation, by `.data`, and taken back."""
    run = _begun()
    x = MLP.batches(1, FP32)[0]
    own = [p.detach().clone() for p in run.model.parameters()]
    for scale in (0.5, 1.0):
        shown = [torch.randn_like(p) if scale == 0.5 else p.clone() for p in own]
        for p, new in zip(run.model.parameters(), shown, strict=True):
            p.data.copy_(new)
        torch.testing.assert_close(run.model(x), copy.deepcopy(run.model)(x))
    with run.flow.dense():
        torch.testing.assert_close(run.model(x), copy.deepcopy(run.model)(x))
    with run.flow.final_masks():
        torch.testing.assert_close(run.model(x), copy.deepcopy(run.model)(x))


def test_gradients_are_dense_tensors_with_zeros_and_clipping_sees_their_norm() -> None:
    run = _begun()
    x = MLP.batches(1, FP32)[0] * 3
    whole = copy.deepcopy(run.model)
    for model in (run.model, whole):
        for p in model.parameters():
            p.grad = None
        loss_of(model(x)).backward()
    kept = {n: p != 0 if p.dim() == 2 else torch.ones_like(p, dtype=torch.bool)
            for n, p in run.model.named_parameters()}  # fmt: skip
    squares = 0.0
    for (name, p), q in zip(run.model.named_parameters(), whole.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.is_contiguous()
        assert p.grad.shape == p.shape
        torch.testing.assert_close(p.grad, q.grad * kept[name], rtol=1e-4, atol=1e-6)
        squares += float((q.grad * kept[name]).double().square().sum())
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1e9)
    torch.testing.assert_close(float(norm), squares**0.5, rtol=1e-5, atol=0.0)
    assert float(norm) < float(nn.utils.clip_grad_norm_(whole.parameters(), 1e9))


def test_clipped_accumulated_and_checkpointed_steps_equal_the_dense_computation() -> None:
    """The dense run clips by the norm at kept places: by hand, since it has the others too."""
    runs = [Run(MLP, c, dtype=FP32) for c in (BY_ID["mdgf-frozen"], on(BY_ID["mdgf-frozen"]))]
    for k, x in enumerate(MLP.batches(TOTAL, FP32)):
        for run, is_sparse in zip(runs, (False, True), strict=True):
            run.optimizer.zero_grad()
            for part in x.chunk(2):
                part = part.clone().requires_grad_()
                out = checkpoint(run.model, part, use_reentrant=bool(k % 2 and is_sparse))
                loss_of(out).backward()
            if k >= 10 and not is_sparse:
                for p in run.model.parameters():
                    if p.dim() == 2 and p.grad is not None:
                        p.grad.mul_(p != 0)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
            run.optimizer.step()
    assert_near(parameters_of(runs[0].model), parameters_of(runs[1].model))


def test_under_other_autocasts_than_bfloat16_it_is_dense_and_says_so() -> None:
    run, plain = _begun(), _begun()
    x = MLP.batches(1, FP32)[0]
    for one in (run, plain):
        one.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(one.model(x))
        loss.backward()
    assert "float16" in why(run.flow, "0.weight")
    whole = copy.deepcopy(plain.model)
    for p in whole.parameters():
        p.grad = None
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(whole(x))
    loss.backward()
    for p, q in zip(run.model.parameters(), whole.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert run.model(x).dtype == torch.bfloat16
    assert len(sparse(run.flow)) == 2
    run.model(x)
    assert len(sparse(run.flow)) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_of_torch_func_and_forward_gradients_are_dense() -> None:
    run = _begun()
    x = MLP.batches(1, FP32)[0]
    params = {n: p.detach() for n, p in run.model.named_parameters()}

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return loss_of(torch.func.functional_call(run.model, params, x))

    whole = copy.deepcopy(run.model)
    loss_of(whole(x)).backward()
    for name, g in torch.func.grad(loss)(params).items():
        torch.testing.assert_close(g, whole.get_parameter(name).grad)
    tangents = [torch.func.jvp(m, (x,), (torch.ones_like(x),))[1] for m in (run.model, whole)]
    torch.testing.assert_close(*tangents)
    torch.testing.assert_close(torch.vmap(run.model)(x), whole(x))


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_a_compiled_network_is_compiled_once_more(mode: str) -> None:
    torch._dynamo.reset()
    run = Run(MLP, on(BY_ID["mdgf-frozen"], mode), dtype=FP32, attached=False)
    ref = twin(run)
    run.attach()
    graphs: list[list[str]] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append([str(n.target) for n in gm.graph.nodes])
        return gm.forward

    compiled = torch.compile(run.model, backend=backend, fullgraph=True)
    for x in MLP.batches(TOTAL, FP32):
        run.optimizer.zero_grad()
        loss_of(compiled(x)).backward()
        run.optimizer.step()
        reference_step(ref, x)
    assert [sum("kept_linear" in t for t in g) for g in graphs] == [0, 2]
    for key, value in run.model.named_parameters():
        torch.testing.assert_close(value, ref.weights()[key], rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


def test_a_state_is_resumed_into_the_sparse_phase_and_out_of_it() -> None:
    run = _begun()
    states = run.model.state_dict(), run.optimizer.state_dict()
    states = copy.deepcopy(states)
    last = MLP.batches(3, FP32)
    run.train(last)
    for mode in ("on", "off"):
        again = Run(MLP, on(BY_ID["mdgf-frozen"], mode), dtype=FP32, attached=False)
        again.model.load_state_dict(states[0])
        again.optimizer.load_state_dict(copy.deepcopy(states[1]))
        again.attach()
        assert len(sparse(again.flow)) == (2 if mode == "on" else 0)
        again.train(last)
        same = assert_same if mode == "on" else assert_near
        same(parameters_of(again.model), parameters_of(run.model))
    early = Run(MLP, on(BY_ID["mdgf-frozen"]), dtype=FP32)
    early_state = copy.deepcopy(early.optimizer.state_dict())
    early.optimizer.load_state_dict(states[1])
    assert len(sparse(early.flow)) == 2
    early.optimizer.load_state_dict(early_state)
    assert not sparse(early.flow)


def test_an_attach_that_fails_leaves_plain_layers() -> None:
    model = MLP.build(FP32)
    cast(Any, model)[2].weight.data[0, 0] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NMFlowError, match="NaN"):
        nmflow.attach(
            model, optimizer, nmflow.OneShot(dense=0), "1:4", include="*", total_steps=3,
            sparse_steps="on",
        )  # fmt: skip
    assert [type(m) for m in cast(Any, model)[::2]] == [nn.Linear] * 2


# --- two processes ----------------------------------------------------------------------------


def _ddp(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    alone = Run(MLP, BY_ID["mdgf-frozen"], dtype=FP32)
    run = Run(MLP, on(BY_ID["mdgf-frozen"]), dtype=FP32)
    wrapped = DistributedDataParallel(run.model, gradient_as_bucket_view=True)
    for k, x in enumerate(MLP.batches(TOTAL, FP32)):
        alone.step(x)
        run.optimizer.zero_grad(set_to_none=bool(k % 2))
        loss_of(wrapped(x.chunk(2)[rank])).backward()
        run.optimizer.step()
    assert len(sparse(run.flow)) == 2
    for p, q in zip(run.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
def test_ddp(tmp_path: Path) -> None:
    launch(_ddp, tmp_path)
