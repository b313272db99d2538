"""A weight as presets and globs see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nmflow.select.target import out_dim


class Part(NamedTuple):
    """Output rows `start` to `stop` of a weight, and what they do."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layer:
    """A weight of at least two dimensions.

    Attributes:
        name: the parameter's name.
        shape: its shape; the global shape if it is sharded.
        dim: the axis along which its groups run.
        parts: its output rows by role.
        paths: every text that a glob may match: names and module paths.
        why_not: why it cannot be grouped; empty if it can.
        frozen: whether no gradient reaches it.
        note: a remark for the plan's table.
        stacked: whether axis 0 counts matrices, as for `Target`.
        unit: as for `Target`.
        is_matrix: whether it multiplies like a matrix, so that a preset which leaves it out says
            so. Tables, and convolutions with one input channel per output, do not.
    """

    name: str
    shape: tuple[int, ...]
    dim: int = 1
    parts: tuple[Part, ...] = ()
    paths: tuple[str, ...] = ()
    why_not: str = ""
    frozen: bool = False
    note: str = ""
    stacked: bool = False
    unit: int = 0
    is_matrix: bool = True

    @property
    def out_dim(self) -> int:
        """The axis of the output rows."""
        return out_dim(self.dim, self.stacked)

    @property
    def out(self) -> int:
        """The number of output rows, of one matrix."""
        return self.shape[self.out_dim] if self.shape else 0
