"""A weight in canonical form: what files hold of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nmflow.errors import CompressError
from nmflow.kernels.layout import Shape, canonical_from_dense, dense_from_canonical
from nmflow.packed.build import Run
from nmflow.packed.layout import as_matrix, from_matrix


@dataclass
class Stored:
    """A weight in canonical form: its shape, grouped axis, and rows packed run by run.

    Attributes:
        shape: of the parameter.
        axis: the grouped axis.
        dtype: of the parameter.
        run: `"packed"` if a loaded model should run it packed, else `"dense"`.
        parts: (run or None, values and index, or the dense rows), in the order of the rows.
    """

    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    run: str
    parts: list[tuple[int, int, Shape | None, Tensor, Tensor | None]] = field(default_factory=list)

    @classmethod
    def of(cls, w: Tensor, axis: int, runs: list[Run], run: str) -> Stored:
        """Pack a parameter whose rows hold the given runs."""
        matrix = as_matrix(w.detach(), axis)
        stored = cls(tuple(w.shape), axis, w.dtype, run)
        at = 0
        for start, stop, pattern in [*sorted(runs), (matrix.shape[0], matrix.shape[0], None)]:
            if at < start:
                stored.parts.append((at, start, None, matrix[at:start].contiguous(), None))
            if pattern is not None:
                shape = Shape.of(stop - start, matrix.shape[1], pattern)
                values, index = canonical_from_dense(matrix[start:stop], shape)
                stored.parts.append((start, stop, shape, values, index))
            at = stop
        return stored

    @property
    def runs(self) -> list[Run]:
        """The runs that are packed."""
        return [Run(a, b, shape.pattern) for a, b, shape, _, _ in self.parts if shape]

    @property
    def dense_bytes(self) -> int:
        """The bytes that `dense` takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """The bytes of the values: files cannot say more of them than they hold."""
        return sum(values.nbytes for _, _, _, values, _ in self.parts)

    def dense(self) -> Tensor:
        """The parameter, bit by bit; raises `CompressError` where memory does not suffice."""
        try:
            rows = [
                values
                if shape is None or index is None
                else dense_from_canonical(values, index, shape)
                for _, _, shape, values, index in self.parts
            ]
            return from_matrix(torch.cat(rows), self.shape, self.axis)
        except (RuntimeError, MemoryError) as error:
            raise CompressError(
                f"a weight of {self.dense_bytes:,} bytes cannot be rebuilt: {str(error)[:100]}"
            ) from error
