"""Writes of every kind: noticed to the element, and taken by sync() where they were."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from harness import Run, assert_same, dense_of, parameters_of, through_file, use
from models import BY_ID as FAMILY
from models import MLP
from nmflow.errors import FlowError, StateError, WeightError
from nmflow.flow.marks import Mark, fingerprint
from settings import BY_ID, TOTAL

NAME = "0.weight"
CASE_IDS = ["ste-at-once", "mdgf-linear", "hybrid", "one-shot", "ste-interval", "mdgf-frozen"]


def at(case: str, k: int, dtype: torch.dtype = torch.float64, family: str = "linear") -> Run:
    run = Run(FAMILY[family], BY_ID[case], dtype=dtype)
    run.train(FAMILY[family].batches(k, dtype))
    return run


# --- the fingerprint --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["plain", "transposed", "strided", "channels_last"]),
    data=st.data(),
)
def test_every_element_counts(shape, dtype, layout, data) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "transposed":
        x = x.movedim(0, -1)
    elif layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    elif layout == "channels_last" and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    before = fingerprint(x)
    assert torch.equal(before, fingerprint(x))
    where = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    old = x[where].clone()
    x[where] = (
        torch.nextafter(old.float(), torch.tensor(9e9)).to(dtype) if dtype != old.dtype else 7
    )
    if bool(x[where] != old):
        assert not torch.equal(before, fingerprint(x))


def test_values_that_change_places_count() -> None:
    x = torch.arange(48.0).reshape(4, 12)
    for other in (x.flip(0), x.flip(1), x[:, torch.randperm(12)] + 0, x.roll(1)):
        assert torch.equal(x, other) or not torch.equal(fingerprint(x), fingerprint(other))
    assert fingerprint(torch.zeros(0, 4)).numel() == 1


def test_a_mark_notices_the_address() -> None:
    x = torch.randn(4, 4)
    mark = Mark.of(x)
    assert not mark.moved(x)
    assert mark.moved(x.clone())
    assert bool(mark.same(x.clone()))


# --- what is noticed --------------------------------------------------------------------------

WRITES: dict[str, Callable[[Tensor], object]] = {
    "one element by .data": lambda p: p.data[1, 3].add_(0.125),
    "one row by .data": lambda p: p.data[2].normal_(),
    "one row": lambda p: p[2].normal_(),
    "one column": lambda p: p[:, 5].fill_(0.5),
    "clamp by .data": lambda p: p.data.clamp_(-0.01, 0.01),
    "scale by .data": lambda p: p.data.mul_(0.99),
    "rows that change places": lambda p: p.data.copy_(p.data.flip(0)),
    "another tensor as .data": lambda p: setattr(p, "data", p.data * 0.5),
    "detached": lambda p: p.detach().add_(1.0),
    "numpy": lambda p: p.detach().numpy().__setitem__((0, 0), 3.0),
}


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("case", CASE_IDS)
def test_sync_takes_exactly_what_was_written(case: str, what: str) -> None:
    run = at(case, 7)
    param, shown, dense = run.model.get_parameter(NAME), parameters_of(run.model), dense_of(run)
    with torch.no_grad():
        WRITES[what](param)
    now = param.detach().clone()
    run.optimizer.zero_grad()
    run.model(MLP.batches(1)[0]).pow(2).mean().backward()
    with pytest.raises(StateError, match=NAME):
        run.optimizer.step()
    assert_same(dense_of(run), dense)
    run.flow.sync()
    expected = torch.where(now != shown[NAME], now, dense[NAME])
    assert_same(dense_of(run), {**dense, NAME: expected})
    after = parameters_of(run.model)
    run.flow.sync()  # a second one finds nothing
    assert_same(dense_of(run), {**dense, NAME: expected})
    assert_same(parameters_of(run.model), after)
    run.train(MLP.batches(TOTAL - 7))
    assert run.flow.steps_done == TOTAL


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["linear", "fused-qkv", "hf-conv1d", "panels"])
@pytest.mark.parametrize("case", ["mdgf-linear", "hybrid-masked", "mdgf-frozen"])
def test_nothing_written_is_nothing_taken(case: str, family: str, dtype: torch.dtype) -> None:
    """W̃ is worked out again bit for bit, at every step, so that no place is taken by mistake."""
    run = Run(FAMILY[family], BY_ID[case], dtype=dtype)
    for x in FAMILY[family].batches(TOTAL, dtype):
        dense, shown = dense_of(run), parameters_of(run.model)
        with torch.no_grad():
            for p in run.model.parameters():
                p.copy_(p.clone())
                p.data.copy_(torch.where(p == 0, -p, p))  # the sign of a zero is no write
        run.flow.sync()
        assert_same(dense_of(run), dense)
        assert_same(parameters_of(run.model), shown)
        run.step(x)


def test_a_frozen_mask_is_taken_anew_where_it_was_written_only() -> None:
    run = at("one-shot", 9)
    run.train([4 * x for x in MLP.batches(3)])
    param = run.model.get_parameter(NAME)
    before = param.detach() != 0
    with torch.no_grad():
        param[3] = torch.arange(param.shape[1], 0, -1, dtype=param.dtype)
    run.flow.sync()
    kept = param.detach() != 0
    rows = [i for i in range(len(param)) if i != 3]
    assert torch.equal(kept[rows], before[rows])
    assert kept[3].reshape(-1, 4)[:, 0].all()
    assert int(kept[3].sum()) == param.shape[1] // 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_write_that_is_not_finite_takes_nothing(bad: float) -> None:
    run = at("mdgf-linear", 5)
    dense = dense_of(run)
    with torch.no_grad():
        run.model.get_parameter(NAME)[0, 0] = bad
        run.model.get_parameter("2.weight").fill_(0.5)
    with pytest.raises(WeightError, match=NAME):
        run.flow.sync()
    assert_same(dense_of(run), dense)
    with pytest.raises(StateError):
        run.optimizer.step()


# --- load_state_dict --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASE_IDS)
@pytest.mark.parametrize("how", ["whole model", "a submodule", "not strict"])
def test_a_loaded_checkpoint_is_W_exactly(how: str, case: str) -> None:
    """Also where it is 0 at places that are pruned, as any sparse checkpoint is."""
    run, other = at(case, 7), Run(MLP, BY_ID["ste-at-once"], seed=7)
    other.train(MLP.batches(2))
    state = copy.deepcopy(other.model.state_dict())
    state[NAME][0] = 0.0
    if how == "whole model":
        run.model.load_state_dict(state)
    elif how == "a submodule":
        layer = run.model.get_submodule("0")
        layer.load_state_dict({"weight": state[NAME], "bias": state["0.bias"]})
    else:
        run.model.load_state_dict({NAME: state[NAME]}, strict=False)
    before = dense_of(run)["2.weight"]
    run.flow.sync()
    assert torch.equal(dense_of(run)[NAME], state[NAME])
    kept = state["2.weight"] if how == "whole model" else before
    assert torch.equal(dense_of(run)["2.weight"], kept)


def test_what_a_failed_load_did_not_write_is_not_taken_whole() -> None:
    run = at("ste-at-once", 3)
    dense, shown = dense_of(run), parameters_of(run.model)
    state = {NAME: torch.zeros(3, 3), "2.weight": torch.zeros_like(shown["2.weight"])}
    with pytest.raises(RuntimeError):
        run.model.load_state_dict(state, strict=False)
    with torch.no_grad():
        run.model.get_parameter(NAME)[0, 0] = 5.0
    run.flow.sync()
    expected = dense[NAME].clone()
    expected[0, 0] = 5.0
    assert torch.equal(dense_of(run)[NAME], expected)


def test_the_networks_own_weights_are_no_write() -> None:
    run = at("mdgf-linear", 5)
    dense = dense_of(run)
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
    run.flow.sync()
    assert_same(dense_of(run), dense)


def test_copies_and_pickles_in_mid_run_are_free_of_hooks() -> None:
    run = at("mdgf-linear", 5)
    dense = dense_of(run)
    with run.flow.final_masks():
        blob = pickle.dumps(run.model)
        copied = copy.deepcopy(run.model)
    assert b"nmflow" not in blob
    for other in (copied, pickle.loads(blob)):
        other.load_state_dict({n: torch.zeros_like(p) for n, p in other.state_dict().items()})
    run.flow.sync()
    assert_same(dense_of(run), dense)
    run.flow.finalize()
    for module in run.model.modules():
        assert not module._load_state_dict_pre_hooks


def test_a_whole_model_in_a_file_has_only_classes_that_torch_load_takes(tmp_path: Path) -> None:
    run = at("mdgf-linear", 5)
    part: Any = run.model.get_submodule("0")
    torch.save(part, tmp_path / "part.pt")
    with torch.serialization.safe_globals([nn.Linear]):
        loaded = torch.load(tmp_path / "part.pt", weights_only=True)
    assert torch.equal(loaded.weight, part.weight)
    assert type(loaded._load_state_dict_pre_hooks) is OrderedDict
    # Hooks of others go along, and can be removed.
    handle = part.register_load_state_dict_pre_hook(_count)
    other = pickle.loads(pickle.dumps(part))
    assert [h.hook for h in other._load_state_dict_pre_hooks.values()] == [_count]
    handle.remove()
    run.flow.finalize()
    assert not part._load_state_dict_pre_hooks


def _count(*_: object) -> None:
    """A hook of others."""


# --- conversions and replacements -------------------------------------------------------------


def test_a_converted_model_keeps_W() -> None:
    run = at("mdgf-frozen", 12, torch.float32)
    dense = dense_of(run)
    run.model.to(torch.float64)
    with pytest.raises(StateError, match="sync"):
        run.optimizer.step()
    run.flow.sync()
    assert_same(dense_of(run), {name: w.double() for name, w in dense.items()})
    run.model.to(torch.float32)
    run.flow.sync()
    assert_same(dense_of(run), dense)


def test_memory_format_and_sharing_are_no_writes() -> None:
    run, free = at("mdgf-linear", 4), at("mdgf-linear", 4)
    run.model.share_memory()
    for x in MLP.batches(4):
        run.step(x)
        free.step(x)
    assert_same(parameters_of(run.model), parameters_of(free.model))


def _parametrize(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.get_submodule("0"))


def _untied(model: nn.Module) -> None:
    model.get_submodule("0").weight = nn.Parameter(model.get_parameter(NAME).detach().clone())


REPLACED: dict[str, Callable[[nn.Module], object]] = {
    "layer": lambda m: m.add_module("0", nn.Linear(16, 32).double()),
    "parameter": _untied,
    "deleted": lambda m: delattr(m.get_submodule("0"), "weight"),
    "parametrization": _parametrize,
    "pruned by torch": lambda m: prune.identity(m.get_submodule("0"), "weight"),
    "assigned": lambda m: m.load_state_dict(m.state_dict(), assign=True),
    "identity": lambda m: m.add_module("0", nn.Identity()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("then", ["step", "sync", "dense", "final_masks", "finalize"])
@pytest.mark.parametrize("what", REPLACED)
def test_a_replaced_weight_is_named(what: str, then: str) -> None:
    run = at("mdgf-linear", 4)
    REPLACED[what](run.model)
    with pytest.raises(FlowError, match=NAME):
        use(run, then)
    assert run.flow.steps_done == 4
    assert "nmflow_dense" in through_file(run.optimizer.state_dict())["state"][0]


def test_a_weight_that_was_tied_has_to_stay_tied() -> None:
    import nmflow

    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = nmflow.attach(model, optimizer, "ste", "1:4", "*", total_steps=9)
    model[1].weight = nn.Parameter(torch.ones(16, 16))
    with pytest.raises(FlowError, match=r"1\.weight"):
        flow.finalize()


def test_another_shape_is_refused() -> None:
    run = at("mdgf-linear", 4)
    run.model.get_parameter(NAME).data = torch.zeros(2, 2, dtype=torch.float64)
    for then in (run.optimizer.step, run.flow.sync, run.flow.finalize):
        with pytest.raises(StateError, match=NAME):
            then()
    with pytest.raises(StateError, match=NAME), run.flow.dense():
        pass


def test_a_device_tells_of_a_silent_write_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading a value would wait for the device: the step goes on, the next one tells."""
    run = at("mdgf-linear", 4)
    monkeypatch.setattr("nmflow.flow.edits.waits", lambda tensor: True)
    run.step(MLP.batches(1)[0])
    run.model.get_parameter("2.weight").data[0, 0] = 3.0
    run.step(MLP.batches(1)[0])
    with pytest.raises(StateError, match=r"2\.weight.*dense\(\)"):
        run.step(MLP.batches(1)[0])
    run.step(MLP.batches(1)[0])
    run.model.get_parameter("2.weight").data[0, 0] = 3.0
    with pytest.raises(StateError, match=r"2\.weight"):  # there is time beside training
        run.flow.finalize()
