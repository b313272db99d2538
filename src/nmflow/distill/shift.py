"""Whether a label belongs to the logits one position before it, as in causal language models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.distill.outputs import IGNORED
from nmflow.select.modules import inside


@torch.no_grad()
def shift_of(
    teacher: nn.Module, logits: Tensor, given: Mapping[str, Any], labels: Tensor
) -> bool | None:
    """Whether a network shifts its labels, by its own loss; None if that does not tell.

    The first label of a row has no logits before it. So where labels are shifted, the loss is the
    same whatever the first one is; else it grows by all that the first logits say against it.

    Args:
        teacher: the network, in evaluation mode.
        logits: what it says, `(..., positions, classes)`, at two positions or more.
        given: its keyword arguments without labels.
        labels: `(..., positions)`.
    """
    first = logits[..., 0, :].float()
    likely, other = first.argmax(-1), first.argmin(-1)
    gap = float((first.amax(-1) - first.amin(-1)).mean())
    found = []
    for label in (likely, other):
        asked = torch.full_like(labels, IGNORED)
        asked[..., 0], asked[..., 1] = label, likely
        loss = _loss(teacher, {**given, "labels": asked})
        if loss is None or not gap > 0:
            return None
        found.append(loss)
    return abs(found[0] - found[1]) < 0.01 * gap


def named_causal(teacher: nn.Module) -> bool:
    """Whether the class of a network is named like a causal language model of transformers."""
    return type(inside(teacher)).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _loss(teacher: nn.Module, given: Mapping[str, Any]) -> float | None:
    try:
        inspect.signature(teacher.forward, follow_wrapped=False).bind(**given)
    except TypeError:
        return None
    loss = teacher(**given).get("loss")
    return float(loss.mean()) if isinstance(loss, Tensor) else None
