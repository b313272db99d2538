"""Optimizers of torch and of other packages, and the law that a recipe keeps on each of them.

The law: a run under a recipe is, bit for bit, the run of the same optimizer in which the dense
weights are kept by hand; or `attach`, or the first step, refuses the optimizer in one sentence, and
weights and optimizer are then as they were.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import nmflow
import reference
from models import loss_of
from nmflow.errors import NMFlowError
from settings import BY_ID, Case

STEPS = 8
TARGETS = ("0.weight", "2.weight")
Make = Callable[[nn.Module], Any]


def network() -> nn.Module:
    """All of its parameters are matrices, which some optimizers ask for."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    return nn.Sequential(*layers)


def batches() -> list[torch.Tensor]:
    return list(torch.randn(STEPS, 4, 16, generator=torch.Generator().manual_seed(1)))


def _mode(optimizer: Any, name: str) -> None:
    if callable(getattr(optimizer, name, None)):
        getattr(optimizer, name)()


def _step(
    model: nn.Module, optimizer: Any, x: torch.Tensor, k: int, after: Callable[[], None]
) -> None:
    """One step, with a closure for those that need one; `after` the backward pass."""
    torch.manual_seed(k)  # some round at random

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        after()
        return loss

    given = inspect.signature(optimizer.step).parameters.get("closure")
    if given is not None and given.default is inspect.Parameter.empty:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def _state(model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def by_hand(make: Make, case: Case | None) -> list[torch.Tensor]:
    """The dense weights after a run, kept by hand beside the optimizer; without a case, dense."""
    model = network()
    optimizer = make(model)
    _mode(optimizer, "train")
    for k, x in enumerate(batches()):
        weights = [model.get_parameter(name) for name in TARGETS]
        dense = [w.detach().clone() for w in weights]
        masks = [_masks(case, k, w) for w in dense]
        with torch.no_grad():
            for w, d, mask in zip(weights, dense, masks, strict=True):
                w.copy_(d if mask is None else torch.where(mask[0], d, d * mask[1]))

        @torch.no_grad()
        def after(weights=weights, dense=dense, masks=masks) -> None:
            for w, d, mask in zip(weights, dense, masks, strict=True):
                if mask is not None and case is not None and w.grad is not None:
                    _prepare(case, optimizer, w, d, mask)
                w.copy_(d)

        _step(model, optimizer, x, k, after)
    return _state(model, optimizer)


def _masks(case: Case | None, k: int, w: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    frame = None if case is None else reference.frame_at(case, k, STEPS, 1, 4, w.shape[1])
    if frame is None:
        return None
    (n, m), previous, delta = frame
    assert previous is None
    return reference.keep(w, n, m), delta


def _prepare(case: Case, optimizer: Any, w: torch.Tensor, dense: torch.Tensor, mask: tuple) -> None:
    """The recipe's part of a step: the gradient's rule, or the pull of `dense`."""
    kept, delta = mask
    assert w.grad is not None
    if case.kwargs.get("gradient") == "masked":
        w.grad.mul_(torch.where(kept, torch.ones_like(w), torch.full_like(w, delta)))
    if case.kind == "SRSTE":
        sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
        w.grad.add_(dense - w, alpha=sign * case.kwargs["lam"])
    if case.kind == "Settling" and delta != 1.0:
        (lr,) = (g["lr"] for g in optimizer.param_groups if any(p is w for p in g["params"]))
        dense.lerp_(w.detach(), min(1.0, float(lr) * case.kwargs["pull"]))


def make_and_attach(make: Make) -> None:
    """Attach, and see that an error leaves the weights and the optimizer alone."""
    model = network()
    optimizer = make(model)
    before, own, groups = _state(model, optimizer), set(vars(optimizer)), _keys(optimizer)
    try:
        nmflow.attach(model, optimizer, pattern="1:4", include="*", total_steps=STEPS)
    except NMFlowError:
        assert all(torch.equal(a, b) for a, b in zip(_state(model, optimizer), before, strict=True))
        assert (set(vars(optimizer)), _keys(optimizer)) == (own, groups)
        raise


def _keys(optimizer: Any) -> list[list[str]]:
    return [sorted(group) for group in optimizer.param_groups]


class Refused(Exception):
    """A recipe refused the optimizer, and nothing was lost."""


def under_a_recipe(make: Make, case: Case) -> list[torch.Tensor]:
    """The dense weights after a run under a recipe.

    Raises:
        Refused: with the sentence that said it.
    """
    model = network()
    optimizer = make(model)
    before, steps = _state(model, optimizer), 0
    flow = None
    try:
        flow = nmflow.attach(
            model, optimizer, case.build(), "1:4", include="*", total_steps=STEPS, **case.attach
        )
        _mode(optimizer, "train")
        for k, x in enumerate(batches()):
            _step(model, optimizer, x, k, lambda: None)
            steps += 1
    except NMFlowError as error:
        said = error
    else:
        said = None
    if said is not None:
        kept = _state(model, optimizer) if flow is None else list(flow.dense_weights().values())
        same = all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
        assert steps == 0, f"refused after {steps} steps: {said}"
        assert same, f"the weights are not as they were: {said}"
        raise Refused(str(said))
    assert flow is not None
    assert flow.steps_done == STEPS
    return [flow.dense_weights()[name].detach().clone() for name in TARGETS]


CASES = [
    BY_ID["settling"],
    Case("masked", "MDGF", {"decay": "linear", "gradient": "masked", "dense": 2, "finetune": 2}),
    Case("sr-ste", "SRSTE", {"lam": 0.0625, "dense": 2}),
]


def verdict(make: Make) -> tuple[str, str]:
    """What a recipe makes of an optimizer.

    Returns:
        `("works", "")`, `("refused", the sentence)`, or `("not tried", why it does not train this
        network without a recipe)`.

    Raises:
        AssertionError: it is neither right nor refused.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make_and_attach(make)
        except NMFlowError as error:
            return "refused", str(error)
        except Exception as error:  # noqa: BLE001 - it cannot be built for this network
            return "not tried", _first_line(error)
        try:
            plain, again = by_hand(make, None), by_hand(make, None)
        except Exception as error:  # noqa: BLE001 - whatever it is, a recipe is not the reason
            return "not tried", _first_line(error)
        if not all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)):
            return "not tried", "two runs without a recipe differ"
        for case in CASES:
            try:
                got = under_a_recipe(make, case)
            except Refused as error:
                return "refused", str(error)
            for one, other in zip(got, by_hand(make, case), strict=True):
                assert torch.equal(one, other), f"{case.id}: off by {(one - other).abs().max():.2g}"
    return "works", ""


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


# --- where they come from ---------------------------------------------------------------------


def _plain(kind: Any) -> Make:
    """A class by its parameters alone, at a rate that shows within a few steps where it has one."""

    def make(model: nn.Module) -> Any:
        taken = inspect.signature(kind).parameters
        given = {"lr": 0.01, "momentum": 0.9, "num_iterations": STEPS, "num_data": STEPS}
        params: Any = model if "model" in taken else list(model.parameters())
        if "muon" in kind.__name__.lower() and kind.__module__.startswith("pytorch_optimizer"):
            params = [{"params": params, "use_muon": True}]
        return kind(params, **{k: v for k, v in given.items() if k in taken})

    return make


def _classes(module: Any, leave: tuple[str, ...] = ()) -> Iterator[tuple[str, Make]]:
    for name, kind in sorted(vars(module).items()):
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
            continue
        if kind is not torch.optim.Optimizer and name not in leave and not name.startswith("_"):
            yield name, _plain(kind)


def of_torch() -> dict[str, Make]:
    return dict(_classes(torch.optim))


def of_timm() -> dict[str, Make]:
    if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        # The package imports its networks, which need torchvision; its optimizers do not.
        spec = importlib.util.find_spec("timm")
        assert spec is not None
        parent, models = types.ModuleType("timm"), types.ModuleType("timm.models")
        parent.__path__ = list(spec.submodule_search_locations or ())
        models.group_parameters = None  # type: ignore[attr-defined]
        sys.modules |= {"timm": parent, "timm.models": models}
    timm = importlib.import_module("timm.optim")
    names = [*timm.list_optimizers(), "lookahead_adamw"]
    return {
        name: lambda m, name=name: timm.create_optimizer_v2(m.parameters(), opt=name, lr=0.01)
        for name in names
    }


def of_pytorch_optimizer() -> dict[str, Make]:
    package = importlib.import_module("pytorch_optimizer")
    makes = {
        name: _plain(package.load_optimizer(name)) for name in package.get_supported_optimizers()
    }

    def wrapped(kind: Any) -> Make:
        return lambda m: kind(torch.optim.AdamW(m.parameters(), lr=0.01))

    for name in ("Lookahead", "ScheduleFreeWrapper", "TRAC", "PCGrad"):
        makes[name] = wrapped(getattr(package, name))
    for name in ("SAM", "GSAM", "WSAM", "LookSAM", "FriendlySAM"):
        kind = getattr(package, name)
        makes[name] = lambda m, kind=kind: kind(
            m.parameters(), base_optimizer=torch.optim.AdamW, lr=0.01
        )
    return makes


def of_torchao() -> dict[str, Make]:
    return dict(_classes(importlib.import_module("torchao.optim")))


def of_bitsandbytes() -> dict[str, Make]:
    return dict(_classes(importlib.import_module("bitsandbytes.optim")))


def of_schedulefree() -> dict[str, Make]:
    return dict(_classes(importlib.import_module("schedulefree")))


def of_transformers() -> dict[str, Make]:
    kind = importlib.import_module("transformers.optimization").Adafactor
    return {
        "Adafactor(lr=None)": lambda m: kind(m.parameters()),
        "Adafactor(lr=0.01, relative_step=False)": lambda m: kind(
            m.parameters(), lr=0.01, relative_step=False, scale_parameter=False
        ),
    }


SOURCES: dict[str, Callable[[], dict[str, Make]]] = {
    "torch.optim": of_torch,
    "transformers": of_transformers,
    "schedulefree": of_schedulefree,
    "timm": of_timm,
    "torchao": of_torchao,
    "bitsandbytes": of_bitsandbytes,
    "pytorch_optimizer": of_pytorch_optimizer,
}
