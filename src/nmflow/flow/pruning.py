"""Weights made exactly N:M at once, by their own magnitudes: of a copy, or of a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nmflow.errors import FlowError, WeightError
from nmflow.flow import owners
from nmflow.flow.scores import Norms, scored
from nmflow.flow.sharding import local, region
from nmflow.masks import project as masked
from nmflow.masks import select
from nmflow.select.plan import Names, Patterns, Plan, choose
from nmflow.select.weights import layers_of


def project(
    model: nn.Module,
    pattern: Patterns = "1:16",
    include: Names = "all",
    exclude: Names = (),
    *,
    remainder: str = "auto",
) -> Plan:
    r"""Make a network exactly N:M at once, in place, by the magnitudes of its weights.

    `W ← W ⊙ m`, with m the N largest \|W\| of every group of M. For what no optimizer has to train
    to it: an average from a file, a network into which adapters were merged. Frozen weights are
    pruned too. To train on with the masks held, attach `OneShot(dense=0)` afterwards.

    Args:
        model: the network, on any device, sharded or not.
        pattern: N:M with N kept, or patterns by glob or preset.
        include: presets, globs or both, see `plan`.
        exclude: presets or globs to leave out.
        remainder: `"auto"`, `"error"` or `"skip"` an axis that M does not divide, see `plan`.

    Returns:
        The plan: what was pruned, and why not the rest.

    Raises:
        PlanError: as `plan`. Nothing is changed by any of the errors.
        FlowError: a recipe trains one of the weights; or a shard cuts a group.
        WeightError: a weight is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
        >>> _ = project(model, "1:16", include="0.*")
        >>> int((model[0].weight != 0).sum())  # of 8 × 32 weights
        16
    """
    layers = [(layer, layer.why_not) for layer in layers_of(model)]
    chosen = choose(layers, pattern, include, exclude, remainder)
    params = dict(model.named_parameters(remove_duplicate=False))
    weights = {target.name: params[target.name] for target in chosen}
    for name, weight in weights.items():
        if owners.is_owned(weight):
            raise FlowError(
                f"'{name}' is trained by a recipe, which ends at its pattern: call finalize() on "
                "that flow, or finalize_copy(copy) for a copy of the model"
            )
    prune_weights(weights, chosen, {})
    return chosen


@torch.no_grad()
def prune_weights(weights: Mapping[str, Tensor], plan: Plan, norms: Norms, of: str = "") -> None:
    """Make weights exactly N:M, by the targets of their names.

    Args:
        weights: the targets' weights by name; each is written in place.
        plan: the targets.
        norms: of inputs by label; with none of them, magnitudes alone order the weights.
        of: what the weights are of, for errors.

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
