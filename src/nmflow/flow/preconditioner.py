"""STEP's second phase: Adam's second moment, frozen as a preconditioner for the time of a step."""

from __future__ import annotations

import torch
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


def freeze(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    r"""Prepare the second moments v so that the coming step computes with v as it is.

    Adam first updates `v ← β₂·v + (1 - β₂)·g²` and then divides by √v. So v is set to
    `(v - (1 - β₂)·g²) / β₂`, from which the update comes back to v.

    Returns:
        Each moment with its value, for `restore`: nothing of it lives between steps.
    """
    saved = []
    for group in optimizer.param_groups:
        beta = float(group["betas"][1])
        for p in group["params"]:
            moment = optimizer.state.get(p, {}).get(MOMENT)
            if moment is None or p.grad is None:
                continue
            v, g = local(moment), local(p.grad)
            scale = getattr(optimizer, "grad_scale", None)
            g = g if scale is None else g / scale.to(g.device)
            if group["weight_decay"] and not group.get("decoupled_weight_decay", False):
                g = g + group["weight_decay"] * local(p)
            saved.append((v, v.clone()))
            step = (g * g).to(v.dtype).mul_(1.0 - beta)
            # The margin covers the rounding of Adam's own sum, which must not end below zero.
            margin = 8 * torch.finfo(v.dtype).eps
            v.sub_(step).div_(beta).add_(step, alpha=margin)
    return saved


def restore(saved: list[tuple[Tensor, Tensor]]) -> None:
    """Put the second moments back, bit for bit."""
    for moment, value in saved:
        moment.copy_(value)
