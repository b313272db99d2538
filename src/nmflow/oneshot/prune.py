"""`prune`: a network to N:M without training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.errors import FlowError, PlanError, WeightError
from nmflow.flow.owners import is_owned
from nmflow.flow.sharding import sharded
from nmflow.masks import mask, project, wanda_score
from nmflow.oneshot import calibration as calibrating
from nmflow.oneshot.calibration import Calibration, Inputs
from nmflow.oneshot.sparsegpt import BLOCK, DAMPING, sparsegpt
from nmflow.select.plan import Names, Patterns, Target, plan, rows_of
from nmflow.text_table import table

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class PrunedWeight:
    """One weight.

    Attributes:
        label: its name, with the rows where only some were pruned.
        pattern: N:M.
        kept: the share of ‖W‖² that the weights which stay had before.
        norm: ‖W̃‖² as a share of ‖W‖²; SparseGPT's update makes it differ from `kept`.
    """

    label: str
    pattern: str
    kept: float
    norm: float


class Pruned(list[PrunedWeight]):
    """The weights that were pruned; as `str`, a table."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {"weights": [asdict(one) for one in self]}

    def __str__(self) -> str:
        rows = [(w.label, w.pattern, f"{w.kept:.1%}", f"{w.norm:.1%}") for w in self]
        return table([("weight", "pattern", "kept of ‖W‖²", "‖W̃‖² of it"), *rows])


def prune(
    model: nn.Module,
    pattern: Patterns,
    calibration: Iterable[Any] | None = None,
    method: str = "magnitude",
    include: Names = "all",
    exclude: Names = (),
    *,
    remainder: str = "auto",
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Pruned:
    r"""Prune a network to N:M in place, in one shot: for whoever cannot train, or to start from.

    * `"magnitude"` keeps the largest `|w|`, and needs no data.
    * `"wanda"` keeps the largest `|w| · ‖x‖`, see `nmflow.masks.wanda_score`.
    * `"sparsegpt"` lets the weights that stay make up for the others, see
      `nmflow.oneshot.sparsegpt`.

    The last two read calibration batches and go layer by layer: each layer (such as `layers.3`) is
    judged by the inputs that it gets from the pruned layers before it. That takes one forward pass
    over the batches for each layer, which ends after it; for a layer's weights at a time 4 bytes
    an input (`wanda`) or 4 · in² bytes a matrix (`sparsegpt`); and a copy of the weights, so that
    an error leaves the network as it was. Weights of `nn.Linear`, `Conv1D` and stacks of experts
    are found where torch multiplies them; of others, such as convolutions, an error says why not.
    Tokens whose `attention_mask` is 0 do not count.

    Training, if you can, is far better at N:M: see the [comparison](../howto/pretrained.md).

    Args:
        model: the network, on one device; batches have to be there, too.
        pattern: a pattern, or patterns by glob or preset, as for `nmflow.plan`.
        calibration: batches, such as a list or a `DataLoader`: mappings of keyword arguments,
            tuples of positional ones, or tensors.
        method: one of the three.
        include: presets or globs of the weights, see `nmflow.plan`.
        exclude: presets or globs to leave out.
        remainder: as for `nmflow.plan`.
        damping: of SparseGPT.
        block: of SparseGPT.

    Returns:
        What was pruned, with the share of its norm that was kept.

    Raises:
        PlanError: an unknown method; nothing to prune.
        WeightError: no calibration where one is needed, or one where none is; a weight that saw no
            input; values that are not finite. The network is then as it was.
        FlowError: a weight under a recipe, or sharded.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 2))
        >>> batches = [torch.randn(32, 16) for _ in range(4)]
        >>> pruned = prune(model, "2:4", batches, method="sparsegpt", include="0.*")
        >>> pruned[0].label, int((model[0].weight != 0).sum())
        ('0.weight', 64)

    References:
        Sun et al., arXiv 2306.11695 (Wanda); Frantar and Alistarh, arXiv 2301.00774 (SparseGPT).
    """
    if method not in METHODS:
        raise PlanError(f"method is {method!r}: choose from {', '.join(METHODS)}")
    if (calibration is None) != (method == "magnitude"):
        need = "needs batches" if calibration is None else "reads none: leave it out"
        raise WeightError(f"calibration: the method {method!r} {need}")
    targets = list(plan(model, pattern, include, exclude, remainder))
    params = dict(model.named_parameters())
    for target in targets:
        _check(target, params[target.name], method)
    before = {t.name: params[t.name].detach().clone() for t in targets}
    try:
        with torch.no_grad():
            if calibration is None:
                for target in targets:
                    _by_score(target, params[target.name], None)
            else:
                whole = method == "sparsegpt"
                for layer, inputs in Calibration(model, calibration, targets, whole).layers():
                    for target in layer:
                        if whole:
                            _by_update(target, params[target.name], inputs, damping, block)
                        else:
                            _by_score(target, params[target.name], inputs)
    except BaseException:
        for name, was in before.items():
            params[name].data.copy_(was)
        raise
    return Pruned(_told(t, before[t.name], params[t.name]) for t in targets)


def _check(target: Target, param: Tensor, method: str) -> None:
    if is_owned(param):
        raise FlowError(
            f"'{target.name}' is under a recipe: call flow.finalize() or flow.detach() first"
        )
    if sharded(param):
        raise FlowError(f"'{target.name}' is sharded: prune before the model is sharded")
    if method != "magnitude" and (param.ndim > 3 or (param.ndim == 3 and not target.stacked)):
        raise WeightError(
            f"'{target.name}' is a convolution, whose inputs the method {method!r} does not read: "
            "exclude it, or prune it by magnitude"
        )
    if method != "magnitude" and target.unit:
        raise WeightError(
            f"'{target.name}' holds matrices one after the other along its inputs, which the "
            f"method {method!r} does not take: exclude it, or prune it by magnitude"
        )


def _by_score(target: Target, param: Tensor, inputs: Inputs | None) -> None:
    """Keep the largest `|w|`, or `|w| · ‖x‖`."""
    w, score = rows_of(param.data, target), rows_of(param.data, target)
    if inputs is not None:
        norms = [
            calibrating.of(target, i, inputs).sqrt()
            for i in range(target.shape[0] if target.stacked else 1)
        ]
        score = wanda_score(w, torch.stack(norms) if target.stacked else norms[0], target.dim)
    kept = mask(score.contiguous(), target.pattern, target.dim, target.stacked)
    w.copy_(project(w, kept))


def _by_update(target: Target, param: Tensor, inputs: Inputs, damping: float, block: int) -> None:
    """Prune each matrix, as `(out, in)`, by SparseGPT."""
    w = rows_of(param.data, target)
    for i, one in enumerate(w if target.stacked else [w]):
        inner = target.dim - 1 if target.stacked else target.dim
        matrix = one if inner == 1 else one.T
        gram = calibrating.of(target, i, inputs)
        matrix.copy_(sparsegpt(matrix, gram, target.pattern, damping, block))


def _told(target: Target, before: Tensor, param: Tensor) -> PrunedWeight:
    was, now = (rows_of(x.detach(), target).double() for x in (before, param))
    total = was.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    kept = torch.where(now != 0, was, 0.0).square().sum() / total
    norm = now.square().sum() / total
    return PrunedWeight(target.label, str(target.pattern), float(kept), float(norm))
