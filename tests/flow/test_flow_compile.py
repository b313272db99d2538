"""`torch.compile`: one graph, and no recompilation while delta and the pattern move."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import nmflow
from harness import Run, all_hold, assert_near, parameters_of, reference_step, twin
from models import BY_ID as FAMILY
from models import loss_of
from settings import BY_ID, INTERVAL_CASES, TOTAL, Case
from settings import CASES as ALL


@pytest.fixture(autouse=True)
def _strict_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


CASES = ["mdgf-linear", "mdgf-exp-masked", "sdgf-stepwise", "hybrid", "one-shot", "sr-ste"]
CASES += ["gradual", "settling"]


@pytest.mark.parametrize("family", ["linear", "encoder-layer", "fused-qkv", "conv2d-grouped"])
@pytest.mark.parametrize("case", CASES)
def test_no_recompilation(case: str, family: str) -> None:
    run = Run(FAMILY[family], BY_ID[case], attached=False)
    ref = twin(run)
    run.attach()
    compiled = torch.compile(run.model, backend="aot_eager", fullgraph=True)
    for x in FAMILY[family].batches(TOTAL):
        run.optimizer.zero_grad()
        loss_of(compiled(x)).backward()
        run.optimizer.step()
        reference_step(ref, x)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert_near(parameters_of(run.model), ref.weights())
    with run.flow.final_masks():
        compiled(FAMILY[family].batches(1)[0])
    run.flow.finalize()
    compiled(FAMILY[family].batches(1)[0])
    assert counters["stats"]["unique_graphs"] == 1


def test_attach_to_a_compiled_module() -> None:
    """The wrapper that `torch.compile` returns names its parameters `_orig_mod.…`."""
    family = FAMILY["encoder-layer"]
    run = Run(family, BY_ID["mdgf-linear"], attached=False)
    ref = twin(run)
    plain = run.model
    run.model = torch.compile(plain, backend="aot_eager")  # type: ignore[assignment]
    run.attach()
    for x in family.batches(TOTAL):
        run.step(x)
        reference_step(ref, x)
    assert_near(parameters_of(plain), ref.weights())
    assert all_hold(plain, family.targets, family.pattern)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["linear", "encoder-layer"])
@pytest.mark.parametrize("case", ["mdgf-exp-masked", "sdgf-stepwise"])
def test_inductor(case: str, family: str) -> None:
    """The default backend, forward and backward; its arithmetic is fused, so nearly equal."""
    run = Run(FAMILY[family], BY_ID[case], attached=False)
    ref = twin(run)
    run.attach()
    compiled = torch.compile(run.model, fullgraph=True)
    for x in FAMILY[family].batches(TOTAL):
        run.optimizer.zero_grad()
        loss_of(compiled(x)).backward()
        run.optimizer.step()
        reference_step(ref, x)
    assert counters["stats"]["unique_graphs"] == 1
    for name, weight in ref.weights().items():
        now = run.model.get_parameter(name).detach()
        torch.testing.assert_close(now, weight, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_compiled_optimizer_step() -> None:
    """`torch.compile(optimizer.step)` traces around the hooks, or runs them; never skips them."""
    run = Run(FAMILY["linear"], BY_ID["mdgf-linear"], attached=False)
    ref = twin(run)
    run.attach()
    with torch._dynamo.config.patch(error_on_recompile=False):
        step = torch.compile(run.optimizer.step, backend="aot_eager")
        for x in FAMILY["linear"].batches(TOTAL):
            run.optimizer.zero_grad()
            loss_of(run.model(x)).backward()
            step()
            reference_step(ref, x)
    assert run.flow.steps_done == TOTAL
    for name, weight in ref.weights().items():  # its AdamW divides in another order
        now = run.model.get_parameter(name).detach()
        torch.testing.assert_close(now, weight, rtol=1e-4, atol=1e-7)


STEPS: dict[str, Any] = {
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "adamw-plain": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def _compiled_run(
    case: Case, make: Any, widths: list[int], compiled: str, backend: str = "eager"
) -> dict[str, torch.Tensor]:
    """A run whose step alone, or whose whole training step, is compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = torch.nn.Sequential(*layers).double()
    optimizer = make(model.parameters())
    flow = nmflow.attach(
        model, optimizer, case.build(), "1:4", include="*", total_steps=TOTAL, **case.attach
    )

    def forward_and_backward(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(x)).backward()

    def whole(x: torch.Tensor) -> None:
        forward_and_backward(x)
        optimizer.step()

    step = torch.compile(optimizer.step, backend=backend) if compiled == "step" else optimizer.step
    train: Any = torch.compile(whole, backend=backend) if compiled == "whole" else None
    with torch._dynamo.config.patch(error_on_recompile=False):
        for x in torch.randn(TOTAL, 4, widths[0]).double():
            if train is None:
                forward_and_backward(x)
                step()
            else:
                train(x)
    assert flow.steps_done == TOTAL
    return parameters_of(model)


def _check_compiled(case: Case, make: Any, widths: list[int], compiled: str, backend: str) -> None:
    plain = _compiled_run(case, make, widths, "no")
    got = _compiled_run(case, make, widths, compiled, backend)
    for name, weight in plain.items():  # a compiled AdamW divides in another order
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", ["step", "whole"])
@pytest.mark.parametrize("case", ["mdgf-exp-masked", "settling"])
def test_a_compiled_step_of_equal_layers(case: str, compiled: str) -> None:
    """No gradient reaches the kernel call of another weight of its shape."""
    _check_compiled(BY_ID[case], STEPS["sgd"], [16, 16, 16, 16], compiled, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["step", "whole"])
@pytest.mark.parametrize("widths", [[16, 16, 16, 16], [16, 32, 8]], ids=["equal", "uneven"])
@pytest.mark.parametrize(
    ("case", "make"),
    [
        pytest.param(case, make, id=f"{case.id}-{make}")
        for case in [*ALL, *INTERVAL_CASES]
        for make in STEPS
        if case.kind != "STEP" or make != "sgd"  # which has no second moment
    ],
)
def test_every_recipe_on_a_compiled_step(
    case: Case, make: str, widths: list[int], compiled: str
) -> None:
    _check_compiled(case, STEPS[make], widths, compiled, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["step", "whole"])
@pytest.mark.parametrize("case", ["mdgf-exp-masked", "settling", "sr-ste"])
def test_a_step_compiled_by_inductor(case: str, compiled: str) -> None:
    _check_compiled(BY_ID[case], STEPS["adamw-foreach"], [16, 16, 8], compiled, "inductor")


def test_a_compiled_step_that_raises_shows_the_sparse_weights() -> None:
    run = Run(FAMILY["linear"], BY_ID["settling"])
    shown = parameters_of(run.model)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    run.optimizer.register_step_pre_hook(broken)
    step = torch.compile(run.optimizer.step, backend="eager")
    loss_of(run.model(FAMILY["linear"].batches(1)[0])).backward()
    with torch._dynamo.config.patch(error_on_recompile=False), pytest.raises(KeyboardInterrupt):
        step()
    for name in FAMILY["linear"].targets:
        assert torch.equal((run.model.get_parameter(name) != 0), shown[name] != 0)
    assert run.flow.steps_done == 0


@pytest.mark.parametrize("case", [*ALL, *INTERVAL_CASES], ids=lambda case: case.id)
def test_what_a_captured_graph_reads_and_writes_stays_where_it_is(case: Case) -> None:
    """A CUDA graph of the forward and backward pass finds W̃ and the gradients at every replay."""
    family = FAMILY["linear"]
    run = Run(family, case, dtype=torch.float32)
    x = family.batches(1, torch.float32)[0]
    loss_of(run.model(x)).backward()

    def places() -> list[int]:
        return [t.data_ptr() for p in run.model.parameters() for t in (p, p.grad) if t is not None]

    before = places()
    for _ in range(TOTAL):
        run.optimizer.zero_grad(set_to_none=False)
        loss_of(run.model(x)).backward()
        run.optimizer.step()
        assert places() == before
