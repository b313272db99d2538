"""The terms of a distiller's loss, of a student's and a teacher's outputs on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.distill import outputs as compared
from nmflow.distill.losses import hidden_loss, logit_loss, multilabel_loss, regression_loss
from nmflow.distill.outputs import IGNORED, PROBLEMS
from nmflow.errors import DistillError
from nmflow.select.modules import inside

Outputs = Mapping[str, Any]


def config_of(teacher: nn.Module) -> Any:
    """The config of transformers that a network has; None if it has none."""
    return getattr(inside(teacher), "config", None)


def logits_term(
    student: Outputs,
    told: Outputs,
    batch: Mapping[str, Any],
    teacher: nn.Module,
    *,
    problem: str | None,
    temperature: float,
    shifts: bool,
) -> Tensor:
    """The loss on logits, the mean over the heads."""
    ours, theirs = compared.predictions(student, "student"), compared.predictions(told, "teacher")
    if ours.keys() != theirs.keys():
        raise DistillError(
            f"the student predicts {', '.join(ours)} and the teacher {', '.join(theirs)}: take a "
            "teacher with the same head"
        )
    parts, labels, config = [], batch.get("labels"), config_of(teacher)
    for name, s in ours.items():
        kind = problem
        if kind is None:  # heads of other names are of classes
            kind = compared.problem_of(s, labels, config) if name == "logits" else PROBLEMS[0]
        s, t = (compared.classes_last(x, labels, config) for x in (s, theirs[name]))
        if kind == "regression":
            parts.append(regression_loss(s, t))
            continue
        mask, cut = compared.positions_of(tuple(s.shape[:-1]), batch, shifts, teacher)
        s, t = (x[..., :-1, :] for x in (s, t)) if cut else (s, t)
        loss = logit_loss if kind == PROBLEMS[0] else multilabel_loss
        parts.append(loss(s, t, temperature=temperature, mask=mask))
    return torch.stack(parts).mean()


def hidden_term(
    student: Outputs, told: Outputs, batch: Mapping[str, Any], teacher: nn.Module
) -> Tensor:
    """The loss on hidden states, the mean over encoder and decoder."""
    ours, theirs = (
        compared.hidden_states(student, "student"),
        compared.hidden_states(told, "teacher"),
    )
    parts = []
    for name, states in ours.items():
        mask = compared.state_mask(name, tuple(states[0].shape), batch, teacher)
        parts.append(hidden_loss(states, theirs.get(name, []), mask=mask))
    return torch.stack(parts).mean()


def share_of(batch: Mapping[str, Any], shifts: bool) -> float | Tensor:
    """A batch's share of `num_items_in_batch`, by which the task's own loss is divided."""
    items, labels = batch.get("num_items_in_batch"), batch.get("shift_labels")
    if items is None:
        return 1.0
    if labels is None:
        labels = batch.get("labels")
        labels = labels[..., 1:] if shifts and isinstance(labels, Tensor) else labels
    return (labels != IGNORED).sum() / items if isinstance(labels, Tensor) else 1.0
