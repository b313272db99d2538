"""`memory`: what it counts is what a run holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import nmflow
from harness import Run
from models import FAMILIES, MLP, Family
from nmflow.errors import PlanError
from settings import BY_ID, TOTAL

OPTIMIZERS: dict[int, Any] = {
    0: lambda ps: torch.optim.SGD(ps, lr=0.1),
    1: lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    2: lambda ps: torch.optim.AdamW(ps, lr=0.1),
}


def held(run: Run) -> dict[str, int]:
    """The bytes of the live tensors: parameters, gradients, and what the optimizer's state has."""
    sizes = {"weights": 0, "gradients": 0, "state": 0, "dense": 0, "masks": 0}
    for p in run.model.parameters():
        sizes["weights"] += p.nbytes
        sizes["gradients"] += 0 if p.grad is None else p.grad.nbytes
        for key, value in run.optimizer.state.get(p, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim:
                kind = {"nmflow_dense": "dense", "nmflow_mask": "masks", "nmflow_fading": "masks"}
                sizes[kind.get(key, "state")] += value.nbytes
    return sizes


@pytest.mark.parametrize("state", OPTIMIZERS)
@pytest.mark.parametrize(
    "case", ["settling", "one-shot", "hybrid", "mdgf-frozen", "ste-interval", "dense"]
)
def test_it_counts_what_a_run_holds(case: str, state: int) -> None:
    for family in FAMILIES:
        run = Run(family, BY_ID[case], OPTIMIZERS[state], dtype=torch.float32)
        run.train(family.batches(2, torch.float32))
        found = nmflow.memory(
            run.model, family.pattern, family.include, recipe=BY_ID[case].build(), state=state,
            **BY_ID[case].attach,
        )  # fmt: skip
        want = held(run)
        if any(p.grad is None for p in run.model.parameters()):
            continue
        assert {name: getattr(found, name) for name in want} == want, family.id
        assert found.total == sum(want.values())


@pytest.mark.parametrize("state", OPTIMIZERS)
@pytest.mark.parametrize("case", ["one-shot", "mdgf-frozen", "sdgf-frozen", "mdgf-stairs", "ste"])
def test_it_counts_a_frozen_phase_on_kept_values(case: str, state: int) -> None:
    for family in FAMILIES:
        chosen = BY_ID[case]
        more = {**chosen.attach, "sparse_steps": "on"}
        run = Run(family, replace(chosen, attach=more), OPTIMIZERS[state], dtype=torch.float32)
        run.train(family.batches(TOTAL, torch.float32))
        found = nmflow.memory(
            run.model, family.pattern, family.include, recipe=chosen.build(), state=state, **more
        )
        if any(p.grad is None for p in run.model.parameters()):
            continue
        slots = [slot for stepper in run.flow._steppers for slot in stepper.slots]
        places = [slot.places for slot in slots if slot.places is not None]
        assert bool(places) == (found.kept is not None) == (case != "ste"), family.id
        bits = sum(p.bits.nbytes + p.starts.nbytes for p in places)
        assert found.frozen == sum(held(run).values()) + bits, family.id
        assert ("frozen" in str(found)) == bool(places)


def test_a_network_of_seven_billion_on_meta() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig()).to(torch.bfloat16)
    found = nmflow.memory(model, "1:16", shards=8)
    count = sum(p.numel() for p in model.parameters())
    assert count == 6_738_415_616
    blocks = count - 2 * 32_000 * 4096 - 65 * 4096
    assert (found.without, found.dense, found.masks) == (8 * count, 2 * blocks, 0)
    assert "under a recipe" in str(found)
    for part, unit, weights in ((1, "GB", "13.5"), (1e-2, "MB", "134.8"), (1e-5, "kB", "134.8")):
        fields = (found.weights, found.gradients, found.state, found.dense, found.masks)
        less = nmflow.Memory(*(int(size * part) for size in fields), shards=1)
        lines = str(less).splitlines()
        assert lines[0].split() == [unit, "in", "all", "of", "1"]
        assert lines[2].split()[-1] == weights


@pytest.mark.parametrize("bad", [{"state": -1}, {"shards": 0}, {"state_bytes": 1.5}])
def test_what_is_no_count(bad: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(bad))):
        nmflow.memory(MLP.build(), MLP.pattern, **bad)
    assert isinstance(MLP, Family)
