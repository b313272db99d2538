"""A weight in canonical form: what files hold of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.kernels.int8 import float_values
from nmflow.kernels.layout import Shape, canonical_from_dense, dense_from_canonical
from nmflow.packed.build import Run
from nmflow.packed.int8 import Int8Linear
from nmflow.packed.layout import as_matrix, from_matrix
from nmflow.packed.modules import PackedLinear
from nmflow.packed.parts import Part


@dataclass
class Stored:
    """A weight in canonical form: its shape, grouped axis, and rows packed run by run.

    Attributes:
        shape: of the parameter.
        axis: the grouped axis.
        dtype: of the parameter.
        run: `"packed"` if a loaded model should run it packed, else `"dense"`.
        parts: in the order of the rows.
        activations: `"float"` or `"int8"`; of parts with 8-bit values.
    """

    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    run: str
    parts: list[Part] = field(default_factory=list)
    activations: str = "float"

    @classmethod
    def of(cls, w: Tensor, axis: int, runs: list[Run], run: str) -> Stored:
        """Pack a parameter whose rows hold the given runs."""
        matrix = as_matrix(w.detach(), axis)
        stored = cls(tuple(w.shape), axis, w.dtype, run)
        at = 0
        for start, stop, pattern in [*sorted(runs), (matrix.shape[0], matrix.shape[0], None)]:
            if at < start:
                stored.parts.append(Part(at, start, None, matrix[at:start].contiguous()))
            if pattern is not None:
                shape = Shape.of(stop - start, matrix.shape[1], pattern)
                found = canonical_from_dense(matrix[start:stop], shape)
                stored.parts.append(Part(start, stop, shape, *found))
            at = stop
        return stored

    @classmethod
    def of_layers(cls, w: Tensor, axis: int, layers: Sequence[nn.Module]) -> Stored:
        """The weight that the rows of linear layers are, packed as they are; `w` is it, dense."""
        stored = cls(tuple(w.shape), axis, w.dtype, "packed")
        at = 0
        for layer in layers:
            stop = at + int(layer.out_features)  # pyright: ignore[reportArgumentType]
            if isinstance(layer, Int8Linear):
                q, scale, index = layer.quantized()
                stored.parts.append(Part(at, stop, layer.shape, q, index, scale))
                stored.activations = layer.activations
            elif isinstance(layer, PackedLinear):
                stored.parts.append(Part(at, stop, layer.shape, *layer.canonical()))
            else:
                stored.parts.append(Part(at, stop, None, layer.get_parameter("weight").detach()))
            at = stop
        return stored

    @property
    def runs(self) -> list[Run]:
        """The runs that are packed."""
        return [Run(p.start, p.stop, p.shape.pattern) for p in self.parts if p.shape]

    @property
    def is_int8(self) -> bool:
        """Whether some of it has 8-bit values."""
        return any(part.scale is not None for part in self.parts)

    @property
    def is_bfloat16(self) -> bool:
        """Whether some of it has values that were rounded to bfloat16."""
        return any(self.rounds(part) for part in self.parts)

    def rounds(self, part: Part) -> bool:
        """Whether a part has values of bfloat16 that stand for another dtype."""
        return part.shape is not None and part.scale is None and part.values.dtype != self.dtype

    @property
    def dense_bytes(self) -> int:
        """The bytes that `dense` takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """The bytes of the values: files cannot say more of them than they hold."""
        return sum(part.values.nbytes for part in self.parts)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter, bit by bit; raises `CompressError` where memory does not suffice.

        8-bit values are exact in float32, and rounded once to the parameter's dtype, or to `dtype`.
        """
        try:
            rows = [_rows(part).to(dtype or self.dtype) for part in self.parts]
            return from_matrix(torch.cat(rows), self.shape, self.axis)
        except (RuntimeError, MemoryError) as error:
            raise CompressError(
                f"a weight of {self.dense_bytes:,} bytes cannot be rebuilt: {str(error)[:100]}"
            ) from error


def _rows(part: Part) -> Tensor:
    index = part.index
    if part.shape is None or index is None:
        return part.values
    values = part.values if part.scale is None else float_values(part.values, part.scale)
    return dense_from_canonical(values, index, part.shape)
