"""The one table of what the contract tests run: recipes and optimizers.

Phases are given in steps, not fractions, so that a row says exactly where each phase begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import nmflow

TOTAL = 14
"""Steps of a contract run: 2 dense, 8 of decay or sparsity (four frames of two), 4 to fine-tune."""

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Case:
    """A recipe as its class's name and arguments, which the reference reads on its own."""

    id: str
    kind: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    attach: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        return getattr(nmflow, self.kind)(**self.kwargs)


def _mdgf(decay: str, gradient: str, **more: Any) -> dict[str, Any]:
    return {"decay": decay, "gradient": gradient, "dense": 2, "finetune": 4, **more}


CASES = [
    Case("dense", "Dense"),
    Case("one-shot", "OneShot", {"dense": 5}),
    Case("ste", "STE", {"dense": 2}),
    Case("sr-ste", "SRSTE", {"lam": 0.05, "dense": 2}),
    Case("step", "STEP", {"lam": 0.05, "dense": 5}),
    Case("gradual", "Gradual", {"dense": 2, "finetune": 4}),
    Case("mdgf-linear", "MDGF", _mdgf("linear", "straight-through")),
    Case("mdgf-linear-masked", "MDGF", _mdgf("linear", "masked")),
    Case("mdgf-exp", "MDGF", _mdgf("exponential", "straight-through")),
    Case("mdgf-exp-masked", "MDGF", _mdgf("exponential", "masked")),
    Case("settling", "Settling", _mdgf("exponential", "straight-through", pull=3.0)),
    Case("s-ste", "SSTE", {"dense": 2}),
    Case(
        "maxq", "MaxQ", {"schedule": "cosine", "lam": 0.05, "tau": 0.05, "dense": 2, "finetune": 4}
    ),
    Case(
        "settling-scaled", "Settling", _mdgf("linear", "masked", pull=3.0, scale=1.6, lr_scale=2.0)
    ),
    Case("sdgf-stepwise", "SDGF", {"structure": "stepwise", "dense": 2, "finetune": 4}),
    Case("sdgf-geometric", "SDGF", {"structure": "geometric", "dense": 2, "finetune": 4}),
    Case("hybrid", "Hybrid", {"structure": "stepwise", **_mdgf("linear", "straight-through")}),
    Case("hybrid-masked", "Hybrid", {"structure": "geometric", **_mdgf("exponential", "masked")}),
]

MORE_CASES = [
    Case("ste-at-once", "STE"),
    Case("sr-ste-at-once", "SRSTE", {"lam": 0.05}),
    Case("one-shot-frozen", "OneShot", {"dense": 5}, {"freeze_mask": True}),
    Case("gradual-at-once", "Gradual", {"finetune": 0}),
    Case("gradual-st", "Gradual", {"dense": 2, "finetune": 4, "gradient": "straight-through"}),
    Case("gradual-frozen", "Gradual", {"dense": 2, "finetune": 4}, {"freeze_mask": True}),
    Case("mdgf-beta", "MDGF", _mdgf("exponential", "masked", beta=0.9)),
    Case("mdgf-linear-beta", "MDGF", _mdgf("linear", "straight-through", beta=0.2)),
    Case("mdgf-at-once", "MDGF", {"decay": "exponential", "dense": 0, "finetune": 0}),
    Case("settling-linear", "Settling", _mdgf("linear", "masked", pull=0.5)),
    Case("settling-at-most", "Settling", _mdgf("linear", "straight-through", pull=1e3)),
    Case("settling-frozen", "Settling", _mdgf("linear", "masked", pull=2.0), {"freeze_mask": True}),
    Case(
        "sdgf-masked",
        "SDGF",
        {"structure": "geometric", "gradient": "masked", "dense": 2, "finetune": 4},
    ),
    Case("s-ste-at-once", "SSTE"),
    Case("s-ste-frozen", "SSTE", {"dense": 2, "finetune": 4}, {"freeze_mask": True}),
    Case("s-ste-scaled", "SSTE", {"dense": 2, "scale": 0.8, "lr_scale": 0.5}),
    Case(
        "maxq-linear",
        "MaxQ",
        {"schedule": "linear", "lam": 0.0, "tau": 1.0, "dense": 0, "finetune": 2},
    ),
    Case("sr-ste-scaled", "SRSTE", {"lam": 0.05, "dense": 2, "scale": 1.6}),
    Case("mdgf-scaled", "MDGF", _mdgf("exponential", "masked", scale=1.6)),
    Case("mdgf-scaled-st", "MDGF", _mdgf("linear", "straight-through", scale=2.0, lr_scale=0.5)),
    Case("mdgf-scaled-frozen", "MDGF", _mdgf("linear", "masked", scale=1.6), {"freeze_mask": True}),
    Case("sdgf-scaled", "SDGF", {"structure": "stepwise", "finetune": 3, "scale": 1.5}),
    Case(
        "hybrid-scaled",
        "Hybrid",
        {"structure": "stepwise", **_mdgf("linear", "masked"), "scale": 1.5},
    ),
    Case("step-rated", "STEP", {"lam": 0.05, "dense": 5, "lr_scale": 0.5}),
    Case("mdgf-stairs", "MDGF", _mdgf("linear", "masked", stairs=3)),
    Case("mdgf-exp-stairs", "MDGF", _mdgf("exponential", "straight-through", stairs=5)),
    Case("mdgf-stairs-many", "MDGF", _mdgf("linear", "masked", stairs=16)),
    Case("settling-stairs", "Settling", _mdgf("linear", "masked", pull=2.0, stairs=4)),
    Case(
        "sdgf-stairs",
        "SDGF",
        {"structure": "stepwise", "gradient": "masked", "dense": 2, "finetune": 4, "stairs": 2},
    ),
    Case("sdgf-stairs-odd", "SDGF", {"structure": "geometric", "finetune": 3, "stairs": 5}),
    Case("mdgf-frozen", "MDGF", _mdgf("linear", "masked"), {"freeze_mask": True}),
    Case(
        "sdgf-frozen",
        "SDGF",
        {"structure": "stepwise", "dense": 2, "finetune": 4},
        {"freeze_mask": True},
    ),
]
"""Variants that differ from a row of `CASES` in one argument; run on one module family."""

INTERVAL_CASES = [
    Case("ste-interval", "STE", {"dense": 2}, {"mask_interval": 3}),
    Case("gradual-interval", "Gradual", {"dense": 2, "finetune": 4}, {"mask_interval": 3}),
    Case(
        "settling-interval",
        "Settling",
        _mdgf("linear", "straight-through", pull=2.0),
        {"mask_interval": 3},
    ),
    Case("mdgf-interval", "MDGF", _mdgf("linear", "masked"), {"mask_interval": 3}),
    Case(
        "hybrid-interval",
        "Hybrid",
        {"structure": "stepwise", **_mdgf("linear", "masked")},
        {"mask_interval": 3, "freeze_mask": True},
    ),
]

NORMS = {
    "0.weight": torch.linspace(0.2, 3.0, 16).flip(0) ** 2,
    "2.weight": torch.cat([torch.zeros(3), torch.linspace(0.5, 4.0, 29)]),
}
"""Of the inputs of the network of Linear layers alone; some inputs are always 0."""

NORMS_CASES = [
    Case("ste-norms", "STE", {"dense": 2}, {"norms": NORMS}),
    Case("sr-ste-norms", "SRSTE", {"lam": 0.05, "dense": 2}, {"norms": NORMS}),
    Case("mdgf-norms", "MDGF", _mdgf("exponential", "masked"), {"norms": NORMS}),
    Case(
        "settling-norms-frozen",
        "Settling",
        _mdgf("linear", "masked", pull=2.0),
        {"norms": NORMS, "freeze_mask": True},
    ),
    Case("one-shot-norms", "OneShot", {"dense": 5}, {"norms": NORMS}),
    Case("gradual-norms", "Gradual", {"dense": 2, "finetune": 4}, {"norms": NORMS}),
    Case(
        "hybrid-norms",
        "Hybrid",
        {"structure": "stepwise", **_mdgf("linear", "masked")},
        {"norms": NORMS},
    ),
]

_PANELS = {"structure": "panels", "dense": 2, "finetune": 4}
_HOWS = {"": {}, "-frozen": {"freeze_mask": True}, "-interval": {"mask_interval": 3}}
PANEL_CASES = [
    Case(id + ending, kind, {**_PANELS, **kwargs}, how)
    for id, kind, kwargs in (
        ("sdgf-panels", "SDGF", {}),
        ("sdgf-panels-masked", "SDGF", {"gradient": "masked"}),
        ("sdgf-panels-stairs", "SDGF", {"stairs": 3}),
        ("hybrid-panels", "Hybrid", {"decay": "linear", "gradient": "masked"}),
    )
    for ending, how in _HOWS.items()
    # Stairs have no interval, and the reference takes the hybrid's second mask at every step.
    if "mask_interval" not in how or (kind == "SDGF" and "stairs" not in kwargs)
]
"""Panels that grow, for networks whose patterns have some."""

BY_ID = {case.id: case for case in [*CASES, *MORE_CASES, *INTERVAL_CASES, *NORMS_CASES]}

ADAM = ["adamw-foreach", "adamw-fused", "adamw-plain"]
"""The optimizers with a second moment that STEP can freeze."""

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw-foreach": functools.partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, foreach=True),
    "adamw-fused": functools.partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, fused=True),
    "adamw-plain": functools.partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, foreach=False),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adafactor": functools.partial(torch.optim.Adafactor, lr=0.05, weight_decay=0.01),
}
