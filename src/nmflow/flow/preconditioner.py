"""STEP's second phase: Adam's second moment, frozen as a preconditioner during a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from nmflow.errors import FlowError
from nmflow.flow.sharding import local

MOMENT = "exp_avg_sq"


def check(optimizer: Optimizer) -> None:
    """Raise a `FlowError` unless the optimizer has a second moment that can be frozen."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Adam | AdamW):
        raise FlowError(
            f"optimizer is {kind}, but STEP freezes Adam's second moment: use Adam or AdamW, or "
            "another recipe"
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise FlowError(
            f"optimizer is {kind} with amsgrad=True, whose second moment is a running maximum: "
            "STEP needs amsgrad=False"
        )


@dataclass(frozen=True)
class Frozen:
    """One parameter's values from before a step, kept only during that step."""

    param: Tensor
    before: Tensor
    moment: Tensor
    held: Tensor
    group: dict[str, Any]
    state: dict[str, Any]


def freeze(optimizer: Optimizer) -> list[Frozen]:
    """Remember each parameter that the next step will change, and its second moment v."""
    frozen = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if MOMENT in state and p.grad is not None:
                p_here, v = local(p), local(state[MOMENT])
                frozen.append(Frozen(p_here, p_here.clone(), v, v.clone(), group, state))
    return frozen


def thaw(frozen: list[Frozen]) -> None:
    """Put the second moments back, bit for bit."""
    for one in frozen:
        one.moment.copy_(one.held)


def settle(optimizer: Optimizer, frozen: list[Frozen], first: bool) -> None:
    r"""Repeat Adam's step with the frozen second moment.

    `W ← (1 - η·wd)·W - η / (1 - β₁ᵗ) · m / (√v̂ + ε)`, with m and t of the step that Adam has just
    taken and `v̂ = v / (1 - β₂ᵈ)` of step d. The bias correction goes into the moment once, at step
    d: from then on the state holds v̂, for each parameter with its own count of steps.

    Args:
        optimizer: the optimizer, after its step.
        frozen: what `freeze` remembered before it.
        first: whether this is the first step with a frozen moment.
    """
    thaw(frozen)
    stepped = {id(one.state) for one in frozen}
    decoupled = isinstance(optimizer, AdamW)  # its groups say so from torch 2.7 on only
    for group in optimizer.param_groups:
        beta2 = float(group["betas"][1])
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            late = id(state) not in stepped and p.grad is not None  # its first gradient came now
            if MOMENT in state and (first or late):
                steps = float(state["step"]) - (id(state) in stepped)
                local(state[MOMENT]).div_(1.0 - beta2**steps)
    for one in frozen:
        group, t = one.group, float(one.state["step"])
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if decay and (decoupled or group.get("decoupled_weight_decay", False)):
            one.before.mul_(1.0 - lr * decay)
        size = -lr / (1.0 - float(group["betas"][0]) ** t)
        denominator = one.moment.sqrt().add_(group["eps"])
        one.before.addcdiv_(local(one.state["exp_avg"]), denominator, value=size)
        one.param.copy_(one.before)
