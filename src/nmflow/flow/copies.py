"""Copies of a network in training, such as a moving average of it: dense, until they are pruned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nmflow.errors import FlowError
from nmflow.flow.casts import forget_casts
from nmflow.flow.pruning import prune_weights
from nmflow.flow.scores import Norms
from nmflow.flow.sharding import local
from nmflow.flow.state import unwrapped
from nmflow.select.plan import Plan

Copy = nn.Module | Mapping[str, Tensor]


def prune(copy: Copy, model: nn.Module, plan: Plan, norms: Norms) -> None:
    """Make each target of a copy exactly N:M, by the copy's own magnitudes.

    Raises:
        FlowError: the copy lacks a weight, has it in another shape, or shares its memory with the
            model; nothing is changed.
        WeightError: one of its weights is not finite; nothing is changed.
    """
    prune_weights(_weights(copy, model, plan), plan, norms, " of the copy")


@contextlib.contextmanager
def pruned(copy: Copy, model: nn.Module, plan: Plan, norms: Norms) -> Iterator[None]:
    """Show a copy pruned, as by `prune`, and restore it afterwards."""
    weights = _weights(copy, model, plan)
    before = {name: local(weight).clone() for name, weight in weights.items()}
    prune(copy, model, plan, norms)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                local(weight).copy_(before[name])
        forget_casts()


def _weights(copy: Copy, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The targets' weights in a copy, by the name of the target, through wrappers' prefixes."""
    if isinstance(copy, nn.Module):
        named: Mapping[str, Tensor] = dict(copy.named_parameters(remove_duplicate=False))
    elif isinstance(copy, Mapping):
        named = {n: x for n, x in copy.items() if isinstance(x, Tensor)}
    else:
        raise FlowError(f"copy is a {type(copy).__name__}: give a torch.nn.Module or its weights")
    found = {unwrapped(name): weight for name, weight in named.items()}
    own = {p.data_ptr() for p in map(local, model.parameters()) if p.numel()}
    weights = {}
    for target in plan:
        weight = found.get(unwrapped(target.name))
        if weight is None:
            raise FlowError(
                f"the copy has no '{target.name}': give a copy of the model that the flow is "
                "attached to, wrapped or not"
            )
        if tuple(weight.shape) != target.shape:
            raise FlowError(
                f"the copy's '{target.name}' has the shape {tuple(weight.shape)}, but the "
                f"model's is {target.shape}: give a copy of the model"
            )
        if local(weight).data_ptr() in own:
            raise FlowError(
                f"the copy's '{target.name}' is the model's own weight: give a copy of the model; "
                "for the model itself there are finalize() and final_masks()"
            )
        weights[target.name] = weight
    return weights
