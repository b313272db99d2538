"""One training run with a flow, and the checks that many tests share."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import nmflow
import reference
from models import Family, Spec, loss_of
from settings import OPTIMIZERS, TOTAL, Case, MakeOptimizer

ADAMW = OPTIMIZERS["adamw-foreach"]


def attach(
    model: nn.Module, optimizer: Any, case: Case, family: Family, total: int = TOTAL, **more: Any
) -> nmflow.Flow:
    options = {
        "recipe": case.build(),
        "pattern": family.pattern,
        "include": family.include,
        "total_steps": total,
        **family.attach,
        **case.attach,
        **more,
    }
    return nmflow.attach(model, optimizer, **options)


class Run:
    """A model, an optimizer and a flow."""

    def __init__(
        self,
        family: Family,
        case: Case,
        make: MakeOptimizer = ADAMW,
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        total: int = TOTAL,
        attached: bool = True,
        device: str = "cpu",
        **more: Any,
    ) -> None:
        self.family, self.case, self.total, self.more = family, case, total, more
        self.model = family.build(dtype, seed).to(device)
        self.optimizer = make(self.model.parameters())
        self.flow: Any = None
        if attached:
            self.attach()

    def attach(self) -> None:
        self.flow = attach(
            self.model, self.optimizer, self.case, self.family, self.total, **self.more
        )

    def step(self, *micro: torch.Tensor) -> None:
        """One optimizer step on the mean loss of its micro-batches."""
        self.optimizer.zero_grad()
        for x in micro:
            (loss_of(self.model(x)) / len(micro)).backward()
        self.optimizer.step()

    def train(self, batches: Iterable[torch.Tensor]) -> None:
        for x in batches:
            self.step(x)


def twin(run: Run, make: MakeOptimizer = ADAMW) -> reference.Reference:
    """The reference of a run that is not attached yet."""
    return reference.Reference(
        run.model, make, run.case, run.family.targets, run.family.pattern, run.total
    )


def reference_step(ref: reference.Reference, *micro: torch.Tensor) -> None:
    ref.optimizer.zero_grad()
    for x in micro:
        (loss_of(ref(x)) / len(micro)).backward()
    ref.step()


def through_file(state: Any) -> Any:
    """Save and load as a trainer does, with the safe unpickler."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def dense_of(run: Run) -> dict[str, torch.Tensor]:
    """The dense weights, copied: the flow hands out its own tensors."""
    return {name: w.detach().clone() for name, w in run.flow.dense_weights().items()}


def assert_same(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], what: str = ""
) -> None:
    """Bit for bit (but for the sign of a zero)."""
    assert list(one) == list(other), what
    for name in one:
        assert torch.equal(one[name], other[name]), f"{what} {name} differs"


def assert_near(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], what: str = ""
) -> None:
    """Equal to the last few bits: the order of a sum may differ, nothing else may."""
    assert list(one) == list(other), what
    for name, value in one.items():
        eps = torch.finfo(value.dtype).eps
        torch.testing.assert_close(
            value,
            other[name],
            rtol=2000 * eps,
            atol=200 * eps,
            msg=lambda text, name=name: f"{what} {name}: {text}",
        )


def all_hold(model: nn.Module, targets: dict[str, Spec], pattern: str) -> bool:
    n, m, panel = reference.parse(pattern)
    return all(
        reference.holds(
            reference.rows_of(model.get_parameter(name), spec), n, m, spec.dim, panel, spec.stacked
        )
        for name, spec in targets.items()
    )


def traces(optimizer: torch.optim.Optimizer) -> list[str]:
    """Everything of nmflow that can be seen on an optimizer."""
    found = [str(key) for state in optimizer.state.values() for key in state]
    found += [str(key) for group in optimizer.param_groups for key in group]
    found = [key for key in found if "nmflow" in key]
    hooks = {name: value for name, value in vars(optimizer).items() if name.endswith("_hooks")}
    return found + [name for name, value in hooks.items() if value]


def use(run: Run, what: str) -> None:
    """Step the run's optimizer, or call its flow: final_masks, dense, sync …."""
    if what == "step":
        run.optimizer.step()
    elif what in ("final_masks", "dense"):
        with getattr(run.flow, what)():
            pass
    else:
        getattr(run.flow, what)()


def check_row(
    case: Case, family: Family, optimizer: str, dtype: torch.dtype = torch.float64
) -> None:
    """Train a row of the contract table beside the reference; compare step for step, and resume."""
    make = OPTIMIZERS[optimizer]
    run = Run(family, case, make, dtype=dtype, attached=False)
    ref = twin(run, make)
    keys = list(run.model.state_dict())
    objects = dict(run.model.named_parameters())
    batches = family.batches(TOTAL, dtype)
    resume_at = 1 + sum(map(ord, case.id + family.id + optimizer)) % (TOTAL - 1)

    run.attach()
    planned = {(t.name, t.dim, t.rows) for t in run.flow.plan}
    assert planned == {(name, spec.dim, spec.rows) for name, spec in family.targets.items()}

    saved = None
    for k, x in enumerate(batches):
        assert run.flow.steps_done == k
        assert_near(parameters_of(run.model), ref.weights(), f"after {k} steps")
        if k == resume_at:
            saved = through_file((run.model.state_dict(), run.optimizer.state_dict()))
        run.step(x)
        reference_step(ref, x)
        assert list(run.model.state_dict()) == keys
        now = dict(run.model.named_parameters())
        assert list(now) == list(objects)
        assert all(now[name] is p for name, p in objects.items())

    last = parameters_of(run.model)
    assert_near(last, ref.weights(), "at the end")
    assert run.flow.stage.phase == ("dense" if case.kind == "Dense" else "final")
    assert case.kind == "Dense" or all_hold(run.model, family.targets, family.pattern)

    run.flow.finalize()
    assert_same(parameters_of(run.model), last, "after finalize")
    assert all(p is objects[name] for name, p in run.model.named_parameters())
    assert list(run.model.state_dict()) == keys
    assert traces(run.optimizer) == []

    assert saved is not None
    again = Run(family, case, make, dtype=dtype, seed=99, attached=False)
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.attach()
    assert again.flow.steps_done == resume_at
    again.train(batches[resume_at:])
    assert_same(parameters_of(again.model), last, f"resumed at {resume_at}")
