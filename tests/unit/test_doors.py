"""What the public functions say of things that are no networks, and of networks at a wrong door."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
from nmflow.errors import CompressError, DistillError, FlowError, NMFlowError, PlanError

X = torch.randn(2, 16)


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)


DOORS: dict[str, tuple[type[NMFlowError], Callable[[Any], Any]]] = {
    "attach": (FlowError, lambda m: nmflow.attach(m, _optimizer(), total_steps=3)),
    "plan": (PlanError, lambda m: nmflow.plan(m, "1:4")),
    "prune": (PlanError, lambda m: nmflow.prune(m, "1:4")),
    "wanda": (PlanError, lambda m: nmflow.prune(m, "1:4", method="wanda", calibration=[X])),
    "audit": (PlanError, lambda m: nmflow.audit(m, "1:4")),
    "cost": (PlanError, lambda m: nmflow.cost(m, X, "1:4")),
    "memory": (PlanError, lambda m: nmflow.memory(m, "1:4")),
    "permute_hidden": (PlanError, lambda m: nmflow.permute_hidden(m, X, "1:4")),
    "gradient_noise": (PlanError, lambda m: nmflow.gradient_noise(m, lambda m, b: m(b), [X], [])),
    "track": (FlowError, lambda m: nmflow.track(m)),
    "compress": (CompressError, lambda m: nmflow.compress(m)),
    "decompress": (CompressError, lambda m: nmflow.decompress(m)),
    "report_of": (CompressError, lambda m: nmflow.report_of(m)),
    "save": (CompressError, lambda m: nmflow.save(m, "never")),
    "load": (CompressError, lambda m: nmflow.load("never", m)),
    "save_state": (CompressError, lambda m: nmflow.save_state(m, "never")),
    "export_onnx": (CompressError, lambda m: nmflow.export_onnx(m, X, "never")),
    "export_onnx_int8": (CompressError, lambda m: nmflow.export_onnx_int8(m, X, "never")),
    "export_program": (CompressError, lambda m: nmflow.export_program(m, X)),
    "export_decoder": (CompressError, lambda m: nmflow.export_decoder(m, "never")),
    "to_semi_structured": (CompressError, lambda m: nmflow.to_semi_structured(m)),
    "explain": (CompressError, lambda m: nmflow.kernels.explain(m, X)),
    "Distiller": (DistillError, lambda m: nmflow.Distiller(m)),
    "Distiller.of": (DistillError, lambda m: nmflow.Distiller.of(m)),
    "distiller": (DistillError, lambda m: nmflow.Distiller(nn.Linear(16, 16))(m, {})),
}
NO_NETWORKS = {
    "None": None,
    "number": 3,
    "class": nn.Linear,
    "parameters": nn.Linear(2, 2).parameters(),
    "list": [nn.Linear(16, 16)],
}


@pytest.mark.parametrize("given", NO_NETWORKS)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_network_is_named(door: str, given: str) -> None:
    error, call = DOORS[door]
    with pytest.raises(error, match=r"is (a|the class) \w+: give ") as told:
        call(NO_NETWORKS[given])
    assert len(str(told.value).splitlines()) == 1


def test_every_public_function_of_a_network_is_at_a_door() -> None:
    """A new one whose first argument is a model has its row above."""
    taking = set()
    for name in nmflow.__all__:
        thing = getattr(nmflow, name)
        code = getattr(thing, "__code__", None)
        if code and code.co_argcount and re.match(r"model", code.co_varnames[0]):
            taking.add(name)
    assert taking <= DOORS.keys()
    assert "compress" in taking


@pytest.mark.parametrize("door", ["plan", "prune", "attach", "cost", "compress"])
def test_a_packed_network_is_told_from_one_without_weights(door: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    nmflow.prune(model, "1:4", include="*")
    packed = nmflow.compress(model, measure=False)
    with pytest.raises(NMFlowError, match=r"packed.*decompress"):
        DOORS[door][1](packed)


@pytest.mark.parametrize("tokens", [0, 1.5, None, "1", (), (1, -3), (1.0,), (0,)])
def test_tokens_are_positive_numbers(tokens: Any) -> None:
    with pytest.raises(CompressError, match=r"tokens is .*give positive numbers"):
        nmflow.compress(nn.Linear(16, 16), tokens=tokens)
