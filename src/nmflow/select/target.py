"""`Target` and `Plan`: weights that are cut into groups, and those that are left out."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from nmflow.pattern import Pattern
from nmflow.text_table import table


def out_dim(dim: int, stacked: bool = False) -> int:
    """The axis of the output rows of a weight whose groups run along `dim`."""
    if stacked:
        return 3 - dim
    return 0 if dim else 1


@dataclass(frozen=True)
class Target:
    """A weight, or some of its output rows, that a recipe cuts into groups.

    Attributes:
        name: the parameter's name in `model.named_parameters()`.
        shape: the parameter's shape; the global shape if it is sharded.
        dim: the grouped axis: 1, the inputs, or 0 for HF's `Conv1D`, stored (in, out), and for
            transposed convolutions.
        pattern: the final pattern N:M.
        rows: output rows (start, stop), half open, of a fused projection; None takes all.
        note: a remark for the table.
        stacked: whether axis 0 of a three-dimensional weight counts matrices, such as experts':
            then `dim` is 2 for (experts, out, in) and 1 for (experts, in, out).
        unit: the length of one matrix, if several lie one after the other along the grouped axis;
            0 otherwise.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    pattern: Pattern
    rows: tuple[int, int] | None = None
    note: str = ""
    stacked: bool = False
    unit: int = 0

    @functools.cached_property
    def label(self) -> str:
        """The name, with the rows if it is not all of them: `qkv.weight[0:64]`."""
        return labelled(self.name, self.rows)

    @property
    def length(self) -> int:
        """The length of the grouped axis, of one matrix."""
        return self.unit or self.shape[self.dim]

    @property
    def out_dim(self) -> int:
        """The axis of the output rows, along which panels run."""
        return out_dim(self.dim, self.stacked)

    @property
    def numel(self) -> int:
        """The number of weights."""
        count = math.prod(self.shape)
        if self.rows is None:
            return count
        return count // self.shape[self.out_dim] * (self.rows[1] - self.rows[0])


@dataclass(frozen=True)
class LeftOut:
    """A weight, or some of its output rows, that is not a target, with the reason.

    Attributes:
        name: the parameter's name.
        reason: why it is not.
        rows: output rows (start, stop), half open; None stands for all.
    """

    name: str
    reason: str
    rows: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """The name, with the rows if it is not all of them."""
        return labelled(self.name, self.rows)


def labelled(name: str, rows: tuple[int, int] | None) -> str:
    """A weight's name, with the rows if it is not all of them: `qkv.weight[0:64]`."""
    return name if rows is None else f"{name}[{rows[0]}:{rows[1]}]"


class Plan(list[Target]):
    """The targets, in the model's order; as `str`, a table that also says what was left out.

    Attributes:
        others: every other weight of at least two dimensions, or its other rows.
        warnings: a sentence for each weight of a preset's role that the preset could not take.
    """

    def __init__(
        self,
        targets: Iterable[Target] = (),
        others: Iterable[LeftOut] = (),
        warnings: Iterable[str] = (),
    ) -> None:
        super().__init__(targets)
        self.others: list[LeftOut] = list(others)
        self.warnings: list[str] = list(warnings)

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """(name or label, reason) of `others`."""
        return [(other.label, other.reason) for other in self.others]

    def to_dict(self) -> dict[str, Any]:
        """The targets and what was left out, as plain types for JSON."""
        targets = [{**asdict(t), "label": t.label, "pattern": str(t.pattern)} for t in self]
        left_out = [{"name": name, "reason": reason} for name, reason in self.left_out]
        return {"targets": targets, "left_out": left_out}

    def __str__(self) -> str:
        head = ("weight", "shape", "axis", "pattern", "kept", "note")
        rows = [
            (
                target.label,
                "x".join(map(str, target.shape)),
                f"{target.dim} ({target.length})",
                str(target.pattern),
                f"{target.pattern.density:.2%}",
                target.note,
            )
            for target in self
        ]
        lines = [table([head, *rows])]
        total = sum(target.numel for target in self)
        kept = sum(target.numel * target.pattern.n // target.pattern.m for target in self)
        lines.append(f"{len(self)} targets, {total:,} weights, of which {kept:,} are kept")
        lines += [f"warning: {text}" for text in self.warnings]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            reasons.setdefault(reason, []).append(name)
        if reasons:
            lines += ["", "left out:"]
            lines += [f"  {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)


def by_name(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """The targets of each parameter, in their order."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(target.name, []).append(target)
    return found


def rows_of(weight: Tensor, target: Target) -> Tensor:
    """The output rows of a target, as a view of its weight."""
    if target.rows is None:
        return weight
    start, stop = target.rows
    return weight.narrow(target.out_dim, start, stop - start)
