"""Weights made exactly N:M at once, by their own magnitudes: of a network, or of a copy of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nmflow.errors import WeightError
from nmflow.flow.casts import forget_casts
from nmflow.flow.scores import Norms, scored
from nmflow.flow.sharding import local, region
from nmflow.masks import project as masked
from nmflow.masks import select
from nmflow.select.target import Plan


@torch.no_grad()
def prune_weights(weights: Mapping[str, Tensor], plan: Plan, norms: Norms, of: str = "") -> None:
    """Make weights exactly N:M, by the targets of their names.

    Args:
        weights: the targets' weights by name; each is written in place.
        plan: the targets.
        norms: norms of inputs by label; without any, magnitudes alone order the weights.
        of: what the weights belong to, for errors.

    Raises:
        WeightError: one of them is not finite; nothing is changed.
    """
    wholes: dict[str, Tensor] = {}
    for target in plan:
        weight = weights[target.name]
        whole = wholes.setdefault(target.name, local(weight).clone())
        part = region(weight, target, target.pattern.m)
        if part.count == 0:
            continue
        w = part.of(local(weight))
        by = scored(w, target, norms)
        kept, finite = select(by, target.pattern, target.dim, target.stacked)
        if not bool(finite):
            raise WeightError(
                f"'{target.name}'{of} holds a NaN or an infinity, which no magnitude mask can "
                "order: give finite weights"
            )
        part.of(whole).copy_(masked(w, kept))
    for name, whole in wholes.items():
        local(weights[name]).copy_(whole)
    forget_casts()
