"""Modules whose weight is stored as kept values and their columns, for inference.

They take the place of `nn.Linear`, HF `Conv1D`, convolutions and `nn.MultiheadAttention`. Biases
and inputs still get gradients; the packed weight is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.kernels import matmul, unpack
from nmflow.kernels.layout import (
    Shape,
    canonical_from_dense,
    canonical_from_tiled,
    check_canonical,
    check_tiled,
    tiled_from_canonical,
)
from nmflow.kernels.ops import matmul_cpu
from nmflow.packed.stands_for import LazyWeight, StandsFor
from nmflow.pattern import Pattern

# A graph of `torch.fx` holds the product as one call.
torch.fx.wrap("matmul")


class PackedLinear(StandsFor):
    """`y = x Wᵀ + b` with W `(out, in)` packed under N:M.

    Buffers `values` and `codes` hold the tiled layout of `nmflow.kernels.layout`, the same on
    every machine; `bias` is the parameter of the layer it stands for.

    Args:
        values: canonical values `(out, S)`, `S = in / M * N`.
        index: canonical index `(lists, S)` uint8.
        shape: sizes and pattern.
        bias: `(out,)` or None.
        stored: `"Linear"`, or `"Conv1D"` where the weight was stored `(in, out)`.

    Raises:
        CompressError: sizes, dtypes or an index that are wrong.

    Example:
        >>> w = torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        >>> layer = PackedLinear.pack(w, "1:4")
        >>> layer(torch.ones(1, 4)).tolist()
        [[3.0, 1.0]]
    """

    values: Tensor
    codes: Tensor
    bias: nn.Parameter | None
    rounding = ""  # `Call.values` of its products
    error: float | None = None  # of its outputs, where values were rounded and it was measured
    computed_with: Any = None  # the layers that are computed in one call with it, see together.py

    def __init__(
        self,
        values: Tensor,
        index: Tensor,
        shape: Shape,
        bias: nn.Parameter | None = None,
        stored: str = "Linear",
    ) -> None:
        super().__init__()
        check_canonical(values, index, shape)
        self._describe(shape, stored)
        tiled, codes = tiled_from_canonical(values.detach(), index, shape)
        self.register_buffer("values", plain(tiled))
        self.register_buffer("codes", plain(codes))
        self.register_parameter("bias", bias)

    def _describe(self, shape: Shape, stored: str) -> None:
        self.shape = shape
        # Plain ints, so that the op call and torch.compile see no attribute look-ups.
        self.dims = (shape.out, shape.inputs, shape.n, shape.m, shape.panel)
        self.in_features, self.out_features = shape.inputs, shape.out
        self.stored = stored
        self.epilogue = 0  # of `reference.EPILOGUES`: an activation that it applies, see fuse.py

    @classmethod
    def pack(
        cls,
        matrix: Tensor,
        pattern: str | Pattern,
        bias: nn.Parameter | None = None,
        stored: str = "Linear",
    ) -> PackedLinear:
        """Pack a dense matrix `(out, in)` that holds the pattern."""
        shape = Shape.of(matrix.shape[0], matrix.shape[1], pattern)
        return cls(*canonical_from_dense(matrix.detach(), shape), shape, bias, stored)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of the weight it stands for."""
        return self.values

    @property
    def computes(self) -> torch.dtype:
        """The dtype of its products."""
        return self.values.dtype

    @property
    def how(self) -> tuple[Any, ...]:
        """Everything that decides its product except buffers: joined layers must agree on it."""
        return (self.epilogue,)

    @property
    def pattern(self) -> Pattern:
        """The pattern of the weight."""
        return self.shape.pattern

    @property
    def weight(self) -> Tensor:
        """The weight of the layer it stands for: its shape, dtype and device cost nothing.

        Networks ask a layer for `weight.dtype` in their forward pass, so the values are rebuilt
        only by an op that reads them.
        """
        if torch.compiler.is_compiling():  # an op in the graph, removed where nobody reads it
            return self.dense()
        o, i = self.out_features, self.in_features
        return LazyWeight(self.dense, (i, o) if self.stored == "Conv1D" else (o, i), self.like)

    def dense(self) -> Tensor:
        """The weight, rebuilt: `(out, in)`, or `(in, out)` for a `Conv1D`."""
        matrix = unpack(self.values, self.codes, self.dims)
        return matrix.t().contiguous() if self.stored == "Conv1D" else matrix

    def canonical(self) -> tuple[Tensor, Tensor]:
        """Canonical values `(out, S)` and index `(lists, S)`; an error if the codes are invalid."""
        values, index = canonical_from_tiled(self.values, self.codes, self.shape)
        check_canonical(values, index, self.shape)
        return values, index

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return self.product(x) if self.computed_with is None else self.computed_with.run(self, x)

    def product(self, x: Tensor) -> Tensor:
        """Its own product, `(..., in)` to `(..., out)`, whatever it is computed together with."""
        held = self._buffers  # past nn.Module's look-ups, which cost half a microsecond each
        bias = self._parameters["bias"]
        return matmul(x, held["values"], held["codes"], bias, self.dims, self.epilogue)  # pyright: ignore[reportArgumentType]

    def at_once(self, x: Tensor) -> Tensor:
        """Its own product on a CPU, of a call that needs no gradient and that nobody looks at."""
        held = self._buffers
        bias = self._parameters["bias"]
        return matmul_cpu(x, held["values"], held["codes"], bias, *self.dims, self.epilogue)  # pyright: ignore[reportArgumentType]

    def extra_repr(self) -> str:
        """Sizes, pattern and dtype."""
        dtype = str(self.like.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pattern={self.pattern}, dtype={dtype}, bias={self.bias is not None}"
            + ("", ", then GELU", ", then ReLU", ", then SiLU", ", then GELU (tanh)")[self.epilogue]
            + ("" if self.computed_with is None else f", {self.computed_with.role(self)}")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # Two-byte values are tiled otherwise than four-byte ones: convert row by row.
        probe = fn(self.values.new_empty(0))
        if probe.dtype == self.values.dtype:
            super()._apply(fn, recurse)
            self.values, self.codes = plain(self.values), plain(self.codes)
            return self
        values, index = canonical_from_tiled(self.values, self.codes, self.shape)
        super()._apply(fn, recurse)
        tiled, codes = tiled_from_canonical(fn(values), index.to(probe.device), self.shape)
        self.values, self.codes = plain(tiled), plain(codes)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        values, codes = state_dict.get(prefix + "values"), state_dict.get(prefix + "codes")
        if isinstance(values, Tensor) and isinstance(codes, Tensor):
            try:
                check_tiled(values, codes, self.shape)
                index = canonical_from_tiled(values, codes, self.shape)
                if not (values.is_meta or codes.is_meta):
                    check_canonical(*index, self.shape)
            except CompressError as error:
                error_msgs.append(f"{prefix}values, {prefix}codes: {error}")
                return
            if values.dtype.itemsize == self.values.dtype.itemsize:
                pass
            elif local_metadata.get("assign_to_params_buffers", False):
                self.values = values
            else:  # two-byte values are tiled otherwise than four-byte ones
                own = tiled_from_canonical(index[0].to(self.values.dtype), index[1], self.shape)
                state_dict = {**state_dict, prefix + "values": own[0]}
        elif (values is None) != (codes is None):
            error_msgs.append(f"{prefix}values and {prefix}codes are only right together")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.values, self.codes = plain(self.values), plain(self.codes)


def plain(buffer: Tensor) -> Tensor:
    """The buffer as kernels read it, in order, whatever memory format the module was moved to.

    One that was made in inference mode becomes a normal one, since gradients flow past it.
    """
    if not buffer.is_inference():
        return buffer.contiguous()
    with torch.inference_mode(False):
        return buffer.clone(memory_format=torch.contiguous_format)


class FusedLinear(StandsFor):
    """Several runs of output rows, each packed or dense, one after the other: a fused `qkv`."""

    def __init__(self, parts: list[PackedLinear | nn.Linear], stored: str = "Linear") -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features = parts[0].in_features
        self.out_features = sum(p.out_features for p in parts)
        self.stored = stored

    @property
    def weight(self) -> Tensor:
        """The whole weight: its shape, dtype and device cost nothing."""
        if torch.compiler.is_compiling():
            return self.dense()
        o, i = self.out_features, self.in_features
        like = next(part for part in self.parts if isinstance(part, PackedLinear)).like
        return LazyWeight(self.dense, (i, o) if self.stored == "Conv1D" else (o, i), like)

    @property
    def bias(self) -> Tensor | None:
        """The whole bias."""
        biases = [p.bias for p in self.parts]
        if any(b is None for b in biases):
            return None
        return torch.cat(biases)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def dense(self) -> Tensor:
        """The weight, rebuilt: `(out, in)`, or `(in, out)` for a `Conv1D`."""
        rows = [p.dense() if isinstance(p, PackedLinear) else p.weight for p in self.parts]
        matrix = torch.cat(rows)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return matrix.t().contiguous() if self.stored == "Conv1D" else matrix

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return torch.cat([part(x) for part in self.parts], -1)
