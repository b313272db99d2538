"""Norms of inputs, which bring activations into masks: checked, and named in a saved state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from nmflow.errors import PlanError, WeightError
from nmflow.masks import wanda_score
from nmflow.select.plan import Plan
from nmflow.select.target import Target

Norms = Mapping[str, Tensor]


def of(chosen: Plan, norms: Norms) -> dict[str, Tensor]:
    """The norms of each target's inputs, by label.

    Raises:
        PlanError: a target has none, or norms name something that is not a target.
        WeightError: norms do not fit a target's inputs, or are not finite numbers of 0 or more.
    """
    if not isinstance(norms, Mapping):
        raise WeightError(f"norms is a {type(norms).__name__}: give a mapping of names to tensors")
    found = {}
    for target in chosen:
        key = target.label if target.label in norms else target.name
        if key not in norms:
            raise PlanError(
                f"norms has none for '{target.label}': give ‖x‖ of its {target.length} inputs, or "
                "exclude it"
            )
        norm = norms[key]
        if not isinstance(norm, Tensor):
            raise WeightError(f"norms of '{key}' is a {type(norm).__name__}: give a tensor")
        try:
            # One place for each input is enough to check whether norms fit.
            some = [1] * len(target.shape)
            some[target.dim] = target.shape[target.dim]
            wanda_score(torch.zeros(some), norm.cpu(), target.dim)
        except WeightError as error:
            raise WeightError(f"norms of '{key}': {error}") from None
        found[target.label] = norm.detach().clone()
    strange = set(norms) - {name for t in chosen for name in (t.label, t.name)}
    if strange:
        raise PlanError(
            f"norms has {sorted(strange)[0]!r}, which is not a target: give norms for the plan's "
            "weights only"
        )
    return found


def digest(norms: Norms) -> str:
    """A text that is equal for two runs with equal norms; empty without any."""
    if not norms:
        return ""
    told = hashlib.sha256()
    for label in sorted(norms):
        told.update(label.encode() + norms[label].double().cpu().contiguous().numpy().tobytes())
    return told.hexdigest()[:16]


def scored(w: Tensor, target: Target, norms: Norms) -> Tensor:
    """The scores from which a mask is made: |W|·‖x‖ with norms, else W."""
    norm = norms.get(target.label)
    return w if norm is None else wanda_score(w, norm, target.dim)
