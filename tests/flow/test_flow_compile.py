"""`torch.compile`: one graph, and no recompilation while delta and the pattern move."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from harness import Run, all_hold, assert_near, parameters_of, reference_step, twin
from models import BY_ID as FAMILY
from models import loss_of
from settings import BY_ID, TOTAL


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
