"""Copies of a network in training, such as moving averages: finalized by name, or shown so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
from harness import Run, all_hold, assert_same, parameters_of
from models import BY_ID as FAMILY
from models import FAMILIES, MLP, Family
from nmflow.errors import FlowError, WeightError
from settings import BY_ID, TOTAL


class Ema(nn.Module):
    """As timm's ModelEmaV2 and V3: the copy is `.module`."""

    def __init__(self, model: nn.Module, decay: float = 0.9) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        values = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        for e, m in values:
            e.lerp_(m, 1 - self.decay)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel": lambda m: torch.optim.swa_utils.AveragedModel(
        m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    ),
    "as timm's": Ema,
}


def averaged(kind: str, family: Family, steps: int = TOTAL, case: str = "ste-at-once") -> Any:
    run = Run(family, BY_ID[case])
    average = COPIES[kind](run.model)
    for x in family.batches(steps):
        run.step(x)
        average.update_parameters(run.model)
    return run, average


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_ends_at_the_pattern(kind: str, family: Family) -> None:
    run, average = averaged(kind, family, 6)
    before, own = parameters_of(average.module), parameters_of(run.model)
    assert not all_hold(average.module, family.targets, family.pattern)
    with run.flow.final_masks(average):
        assert all_hold(average.module, family.targets, family.pattern)
        inside = parameters_of(average.module)
    assert_same(parameters_of(average.module), before)
    run.flow.finalize()
    run.flow.finalize_copy(average)
    assert_same(parameters_of(average.module), inside)
    for name, weight in inside.items():
        assert torch.equal(weight, torch.where(weight != 0, before[name], 0.0))
    assert_same(parameters_of(run.model), own)


def test_the_largest_of_the_copy_are_kept() -> None:
    run, average = averaged("as timm's", MLP)
    before = parameters_of(average.module)
    run.flow.finalize_copy(average)
    for name in MLP.targets:
        kept = nmflow.mask(before[name], MLP.pattern)
        weight = average.module.get_parameter(name)
        assert torch.equal(weight, torch.where(kept, before[name], 0.0))


def test_a_dictionary_of_tensors() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    run.train(MLP.batches(4))
    state = copy.deepcopy(run.model.state_dict())
    run.flow.finalize_copy({f"module.{name}": x for name, x in state.items()})
    assert nmflow.holds(state["0.weight"], MLP.pattern)


def test_a_dense_run_has_nothing_to_prune() -> None:
    run, average = averaged("AveragedModel", MLP, 3, "dense")
    before = parameters_of(average)
    run.flow.finalize_copy(average)
    assert_same(parameters_of(average), before)


def test_the_average_of_W() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    average = Ema(run.model, decay=0.0)
    run.train(MLP.batches(9))
    with run.flow.dense():
        average.update_parameters(run.model)
    for name, dense in run.flow.dense_weights().items():
        assert torch.equal(average.module.get_parameter(name), dense)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda m: nn.Linear(16, 32), FlowError, r"0\.weight"),
        (lambda m: FAMILY["fused-qkv"].build(), FlowError, r"0\.weight"),
        (lambda m: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), FlowError, "shape"),
        (lambda m: m, FlowError, "own weight"),
        (lambda m: dict(m.state_dict()), FlowError, "own weight"),
        (lambda m: "model", FlowError, "str"),
        (lambda m: {}, FlowError, r"0\.weight"),
    ],
)
def test_what_is_no_copy(make: Any, kind: type[Exception], words: str) -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    before = parameters_of(run.model)
    with pytest.raises(kind, match=words):
        run.flow.finalize_copy(make(run.model))
    with pytest.raises(kind, match=words), run.flow.final_masks(make(run.model)):
        pass
    assert_same(parameters_of(run.model), before)


def test_a_copy_that_is_not_finite_is_left_as_it_is() -> None:
    run = Run(MLP, BY_ID["mdgf-linear"])
    average = copy.deepcopy(run.model)
    with torch.no_grad():
        average.get_parameter("2.weight")[0, 0] = float("nan")
    first = average.get_parameter("0.weight").detach().clone()
    with pytest.raises(WeightError, match=r"2\.weight"):
        run.flow.finalize_copy(average)
    assert torch.equal(average.get_parameter("0.weight"), first)


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """One process of four, of which the others are made up."""
    made_up = pytest.importorskip(
        "torch.testing._internal.distributed.fake_pg", reason="this torch has no made-up processes"
    )
    distributed = torch.distributed
    distributed.init_process_group(
        "fake", rank=request.param, world_size=4, store=made_up.FakeStore()
    )
    yield request.param
    distributed.destroy_process_group()


@pytest.mark.parametrize("rank", range(4), indirect=True)
def test_a_process_without_rows_of_a_weight_prunes_its_part_of_the_others(rank: int) -> None:
    """Two rows lie on two of four processes; an empty part has no address to be told by."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (4,))
    layers = [nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)]
    for layer in layers:
        whole = layer.weight.detach()
        parts = [*whole.split(-(-len(whole) // 4)), *[whole[:0]] * 4]
        part = DTensor.from_local(
            parts[rank].clone(), mesh, [Shard(0)], shape=whole.shape, stride=whole.stride()
        )
        layer.weight = nn.Parameter(part)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = nmflow.attach(model, optimizer, "mdgf-linear", "1:2", "*", total_steps=9)
    average = copy.deepcopy(model)
    held = [p.to_local() for p in average.parameters()]  # pyright: ignore[reportAttributeAccessIssue]
    before = [p.clone() for p in held]
    with flow.final_masks(average):
        assert all(nmflow.holds(p, "1:2") for p in held)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    flow.finalize_copy(average)
    assert all(nmflow.holds(p, "1:2") for p in held)
    with pytest.raises(FlowError, match="is the model's own weight"):
        flow.finalize_copy(model)
