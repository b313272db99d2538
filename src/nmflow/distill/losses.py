"""Distillation losses: pure functions of a student's and a teacher's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nmflow.errors import DistillError


def logit_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    r"""Kullback-Leibler divergence of softened predictions, times T².

    `T² · mean over i of Σ_c p_c · (log p_c - log q_c)`, where `p = softmax(teacher / T)`,
    `q = softmax(student / T)` and i runs over the positions that `mask` keeps. It is computed in
    float32. T² keeps the size of the gradient, whatever T is.

    Args:
        student: logits `(..., classes)`.
        teacher: logits of the same shape; they receive no gradient.
        temperature: T, above 0.
        mask: bool or numbers, `(...)`: the positions that count; None takes all.

    Returns:
        A scalar; 0 where the mask keeps nothing.

    Raises:
        DistillError: the shapes differ, or T is not above 0.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> round(logit_loss(student, teacher, temperature=1.0).item(), 4)
        0.3278

    References:
        Hinton, Vinyals and Dean, arXiv 1503.02531.
    """
    if not temperature > 0:
        raise DistillError(f"temperature is {temperature}: give a number above 0")
    _check_shapes(student, teacher)
    q = torch.log_softmax(student.float() / temperature, -1)
    p = torch.log_softmax(teacher.detach().float() / temperature, -1)
    # A class that the teacher rules out counts 0, where 0 times an infinity would be NaN.
    each = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
    return temperature**2 * _mean(each, mask)


def multilabel_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    r"""`logit_loss` of labels that are independent of one another: each is a yes or a no.

    `T² · mean over i and c of KL(p_c ‖ q_c)`, where `p_c = σ(teacher_c / T)` and
    `q_c = σ(student_c / T)` are chances of yes.

    Args:
        student: logits `(..., labels)`.
        teacher: logits of the same shape; they receive no gradient.
        temperature: T, above 0.
        mask: bool or numbers, `(...)`: the positions that count; None takes all.

    Returns:
        A scalar; 0 where the mask keeps nothing.

    Raises:
        DistillError: as `logit_loss`.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> round(multilabel_loss(student, teacher, temperature=1.0).item(), 4)
        0.3278
    """
    _check_shapes(student, teacher)
    pairs = [torch.stack([x, torch.zeros_like(x)], -1) for x in (student, teacher)]
    each = None if mask is None else mask.unsqueeze(-1).expand(student.shape)
    return logit_loss(pairs[0], pairs[1], temperature=temperature, mask=each)


def regression_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean of `(student - teacher)²` in float32, for outputs that are values.

    Args:
        student: values `(..., values)`.
        teacher: values of the same shape; they receive no gradient.
        mask: bool or numbers, `(...)`: the positions that count; None takes all.

    Returns:
        A scalar; 0 where the mask keeps nothing.

    Raises:
        DistillError: the shapes differ.

    Example:
        >>> import torch
        >>> regression_loss(torch.zeros(1, 1), torch.tensor([[2.0]])).item()
        4.0
    """
    _check_shapes(student, teacher)
    return _mean((student.float() - teacher.detach().float()).square().mean(-1), mask)


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None = None
) -> Tensor:
    r"""Squared distance of hidden states, normalised by the teacher's: SquareHead.

    `mean over layers of Σ ‖h - h_T‖² / Σ ‖h_T‖²`, in float32, over the positions that `mask` keeps.
    The first state is the embedding. A student of a k-th of the layers is compared with every k-th
    state of the teacher.

    Args:
        student: hidden states `(batch, ..., width)`: the embedding, then a layer each.
        teacher: hidden states of the same shapes, of as many layers or a multiple; they receive no
            gradient.
        mask: bool or numbers of the leading axes, such as an attention mask; None takes all.

    Returns:
        A scalar.

    Raises:
        DistillError: the teacher's layers are no multiple of the student's, the shapes differ, or
            there is no state.

    Example:
        >>> import torch
        >>> hidden_loss([torch.zeros(1, 2)], [torch.ones(1, 2)]).item()
        1.0

    References:
        SquareHead: Kurtic et al., arXiv 2310.06927.
    """
    for given, who in ((student, "student"), (teacher, "teacher")):
        if isinstance(given, Tensor) or not isinstance(given, Sequence):
            raise DistillError(
                f"the {who}'s hidden states are a {type(given).__name__}: give a list of tensors"
            )
    matching = _matching(student, teacher)
    if not matching:
        raise DistillError(
            f"the student has {len(student)} hidden states and the teacher {len(teacher)}: take a "
            "teacher with as many layers or a multiple, or set hidden=0"
        )
    total = student[0].new_zeros((), dtype=torch.float32)
    for h, h_t in zip(student, matching, strict=True):
        if h.shape != h_t.shape:
            raise DistillError(
                f"a hidden state of the student is {tuple(h.shape)} and of the teacher "
                f"{tuple(h_t.shape)}: take a teacher of the same width, or set hidden=0"
            )
        h, h_t = h.float(), h_t.detach().float()
        if mask is not None:
            kept = mask.to(h.dtype).reshape(*mask.shape, *(1,) * (h.ndim - mask.ndim))
            # `where`, not a product: a position that does not count may hold a NaN.
            h, h_t = torch.where(kept > 0, h, 0.0), torch.where(kept > 0, h_t, 0.0)
        distance, size = (h - h_t).square(), h_t.square()
        if mask is not None:
            distance, size = distance * kept, size * kept
        total = total + distance.sum() / size.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return total / len(student)


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise DistillError(
            f"the student's logits are {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}: take a teacher with the same classes and the same inputs"
        )


def _matching(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Sequence[Tensor]:
    """The teacher's states that the student's stand for; none where there are none."""
    if len(student) == len(teacher):
        return teacher
    layers, taught = len(student) - 1, len(teacher) - 1
    return teacher[:: taught // layers] if 0 < layers < taught and taught % layers == 0 else ()


def _mean(each: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return each.mean()
    if mask.shape != each.shape:
        raise DistillError(
            f"mask is {tuple(mask.shape)}: it must have the leading shape of the logits, "
            f"{tuple(each.shape)}"
        )
    kept = mask.to(each.dtype)
    # `where`, not a product: a position that does not count may hold an infinity.
    return torch.where(kept > 0, each * kept, 0.0).sum() / kept.sum().clamp_min(1.0)
