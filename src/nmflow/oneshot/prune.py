"""`prune`: make a network N:M without training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.errors import FlowError, NMFlowWarning, PlanError, WeightError
from nmflow.flow.casts import forget_casts
from nmflow.flow.owners import is_owned
from nmflow.flow.pruning import prune_weights
from nmflow.flow.sharding import local, region, sharded, summed
from nmflow.masks import mask, project, wanda_score
from nmflow.oneshot import calibration as calibrating
from nmflow.oneshot.calibration import Calibration, Inputs
from nmflow.oneshot.sparsegpt import BLOCK, DAMPING, sparsegpt
from nmflow.select.modules import check_model
from nmflow.select.plan import Names, Patterns, Plan, Target, choose, rows_of
from nmflow.select.weights import layers_of
from nmflow.text_table import table

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class PrunedWeight:
    """One pruned weight.

    Attributes:
        label: its name, with the rows if it is not all of them.
        pattern: N:M.
        kept: the share of ‖W‖² in the kept weights, before any update.
        norm: ‖W̃‖² as a share of ‖W‖²; SparseGPT's update makes it differ from `kept`.
    """

    label: str
    pattern: str
    kept: float
    norm: float


class Pruned(list[PrunedWeight]):
    """The weights that were pruned; as `str`, a table.

    Attributes:
        plan: their targets, and the reasons for the other weights.
    """

    def __init__(self, weights: Iterable[PrunedWeight] = (), plan: Plan | None = None) -> None:
        super().__init__(weights)
        self.plan = Plan() if plan is None else plan

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {"weights": [asdict(one) for one in self]}

    def __str__(self) -> str:
        rows = [(w.label, w.pattern, f"{w.kept:.1%}", f"{w.norm:.1%}") for w in self]
        return table([("weight", "pattern", "kept of ‖W‖²", "‖W̃‖² of it"), *rows])


def prune(
    model: nn.Module,
    pattern: Patterns,
    include: Names = "all",
    exclude: Names = (),
    *,
    method: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    remainder: str = "auto",
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Pruned:
    r"""Prune a network to N:M in place, in one shot, instead of training or before it.

    * `"magnitude"` keeps the largest `|w|`, and needs no data: `W ← W ⊙ m`. Sharded weights stay
      sharded.
    * `"wanda"` keeps the largest `|w| · ‖x‖`, see `nmflow.masks.wanda_score`.
    * `"sparsegpt"` also updates the kept weights to compensate for the others, see
      `nmflow.oneshot.sparsegpt`.

    The last two read calibration batches and go layer by layer: each layer (such as `layers.3`) is
    pruned by the inputs that it gets from the pruned layers before it. If layers read only the
    outputs of the layer before, and the batches are the same each time, this takes two forward
    passes over the batches in all. Otherwise, it takes one for each layer, which ends after it.

    Memory holds a layer's outputs for all batches, and up to 1 GiB of earlier ones; 4 bytes per
    input (`wanda`) or 4 · in² bytes per matrix (`sparsegpt`) of one layer; and a copy of the
    weights, so that an error leaves the network as it was. Weights of `nn.Linear`, `Conv1D`
    and stacks of experts are found where torch multiplies them. For others, such as convolutions,
    an error gives the reason. Tokens whose `attention_mask` is 0 do not count, except in experts,
    and in a decoder that has as many tokens as its encoder. Under autocast, inputs are as it casts
    them.

    Frozen weights are pruned too. To train on with the masks held, attach `OneShot(dense=0)`
    afterwards. Training, if you can, is far better at N:M: see the
    [comparison](../howto/pretrained.md).

    Args:
        model: the network. For `"wanda"` and `"sparsegpt"` it is not sharded, and on the device of
            the batches.
        pattern: a pattern, or patterns by glob or preset, as for `nmflow.plan`.
        include: presets or globs of the weights, see `nmflow.plan`.
        exclude: presets or globs to leave out.
        method: one of the three.
        calibration: batches, such as a list or a `DataLoader`: mappings of keyword arguments,
            tuples of positional ones, or tensors.
        remainder: as for `nmflow.plan`.
        damping: of SparseGPT.
        block: of SparseGPT.

    Returns:
        The pruned weights, each with the share of its norm that was kept; `plan` says why the
        others were left out.

    Warns:
        NMFlowWarning: as `nmflow.plan`.

    Raises:
        PlanError: an unknown method; nothing to prune.
        WeightError: calibration is missing, or given for `"magnitude"`; a weight got no input;
            values are not finite. The network is then as it was.
        FlowError: a weight is under a recipe; it is sharded, and the method reads inputs; a shard
            cuts a group.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 2))
        >>> batches = [torch.randn(32, 16) for _ in range(4)]
        >>> pruned = prune(model, "2:4", "0.*", method="sparsegpt", calibration=batches)
        >>> pruned[0].label, int((model[0].weight != 0).sum())
        ('0.weight', 64)

    References:
        Sun et al., arXiv 2306.11695 (Wanda); Frantar and Alistarh, arXiv 2301.00774 (SparseGPT).
    """
    check_model(model, PlanError)
    if method not in METHODS:
        raise PlanError(f"method is {method!r}: choose from {', '.join(METHODS)}")
    if (calibration is None) != (method == "magnitude"):
        need = "needs batches" if calibration is None else "reads none: leave it out"
        raise WeightError(f"calibration: the method {method!r} {need}")
    layers = [(layer, layer.why_not) for layer in layers_of(model)]
    plan = choose(layers, pattern, include, exclude, remainder)
    for text in plan.warnings:
        warnings.warn(text, NMFlowWarning, stacklevel=2)
    params = dict(model.named_parameters(remove_duplicate=False))
    for target in plan:
        _check(target, params[target.name], method)
    if calibration is None:
        whole = [_norm(t, params[t.name]) for t in plan]
        prune_weights({t.name: params[t.name] for t in plan}, plan, {})
        kept = [_norm(t, params[t.name]) / all_ for t, all_ in zip(plan, whole, strict=True)]
        told = [
            PrunedWeight(t.label, str(t.pattern), k, k) for t, k in zip(plan, kept, strict=True)
        ]
        return Pruned(told, plan)
    before = {t.name: params[t.name].detach().clone() for t in plan}
    try:
        with torch.no_grad():
            update = method == "sparsegpt"
            for layer, inputs in Calibration(model, calibration, plan, update).layers():
                for target in layer:
                    if update:
                        _by_update(target, params[target.name], inputs, damping, block)
                    else:
                        _by_score(target, params[target.name], inputs)
    except BaseException:
        for name, was in before.items():
            params[name].data.copy_(was)
        raise
    finally:
        forget_casts()
    return Pruned([_told(t, before[t.name], params[t.name]) for t in plan], plan)


def _check(target: Target, param: Tensor, method: str) -> None:
    if is_owned(param):
        raise FlowError(
            f"'{target.name}' is trained by a recipe, which ends at its pattern: call finalize() "
            "on that flow, or finalize_copy(copy) for a copy of the model"
        )
    if method == "magnitude":
        return
    if sharded(param):
        raise FlowError(
            f"'{target.name}' is sharded, and the method {method!r} reads the inputs of whole "
            "weights: prune before the model is sharded, or by magnitude"
        )
    if param.ndim > 3 or (param.ndim == 3 and not target.stacked):
        raise WeightError(
            f"'{target.name}' is a convolution, whose inputs the method {method!r} does not read: "
            "exclude it, or prune it by magnitude"
        )
    if target.unit:
        raise WeightError(
            f"'{target.name}' holds matrices one after the other along its inputs, which the "
            f"method {method!r} does not take: exclude it, or prune it by magnitude"
        )


@torch.no_grad()
def _norm(target: Target, param: Tensor) -> float:
    """‖W‖² of the pruned rows over all shards, or a tiny number instead of 0."""
    part = region(param, target, target.pattern.m)
    squares = part.of(local(param)).double().square().sum()
    return float(summed(squares, param).clamp_min(torch.finfo(torch.float64).tiny))


def _by_score(target: Target, param: Tensor, inputs: Inputs) -> None:
    """Keep the largest `|w| · ‖x‖`."""
    w = rows_of(param.data, target)
    norms = [
        calibrating.of(target, i, inputs).sqrt()
        for i in range(target.shape[0] if target.stacked else 1)
    ]
    score = wanda_score(w, torch.stack(norms) if target.stacked else norms[0], target.dim)
    kept = mask(score.contiguous(), target.pattern, target.dim, stacked=target.stacked)
    w.copy_(project(w, kept))


def _by_update(target: Target, param: Tensor, inputs: Inputs, damping: float, block: int) -> None:
    """Prune each matrix, as `(out, in)`, by SparseGPT."""
    w = rows_of(param.data, target)
    for i, one in enumerate(w if target.stacked else [w]):
        inner = target.dim - 1 if target.stacked else target.dim
        matrix = one if inner == 1 else one.T
        gram = calibrating.of(target, i, inputs)
        matrix.copy_(sparsegpt(matrix, gram, target.pattern, damping=damping, block=block))


def _told(target: Target, before: Tensor, param: Tensor) -> PrunedWeight:
    was, now = (rows_of(x.detach(), target).double() for x in (before, param))
    total = was.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    kept = torch.where(now != 0, was, 0.0).square().sum() / total
    norm = now.square().sum() / total
    return PrunedWeight(target.label, str(target.pattern), float(kept), float(norm))
