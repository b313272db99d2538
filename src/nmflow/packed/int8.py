"""Packed layers whose kept values are 8-bit whole numbers, with one scale a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.kernels import int8, matmul_int8, unpack_int8
from nmflow.kernels.int8_ops import matmul_int8_cpu
from nmflow.kernels.layout import Shape
from nmflow.packed.modules import PackedLinear, plain
from nmflow.packed.rounded import each_linear, output_error
from nmflow.packed.stands_for import StandsFor


class Int8Linear(PackedLinear):
    """`y = x Wᵀ + b` with W `(out, in)` packed under N:M, `W[o] = scale[o] * q[o]`, q of 8 bits.

    The buffer `stream` holds q, the scales and the columns in the layout of `nmflow.kernels.int8`.

    Args:
        q: canonical values `(out, S)` int8.
        scale: `(out,)` float32.
        index: canonical index `(lists, S)` uint8.
        shape: sizes and pattern.
        bias: `(out,)` or None.
        stored: as for `PackedLinear`.
        activations: `"float"`, or `"int8"`: each token is rounded to 8 bits, and whole numbers are
            multiplied.
        dtype: the dtype of the layer it stands for.

    Raises:
        CompressError: sizes, dtypes, values or an index that are wrong.

    Example:
        >>> w = torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        >>> layer = Int8Linear.of(PackedLinear.pack(w, "1:4"))
        >>> layer(torch.ones(1, 4)).round().tolist()
        [[3.0, 1.0]]
    """

    stream: Tensor

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        index: Tensor,
        shape: Shape,
        bias: nn.Parameter | None = None,
        stored: str = "Linear",
        activations: str = "float",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        StandsFor.__init__(self)
        if activations not in int8.ACTIVATIONS:
            raise CompressError(f"activations is {activations!r}: it must be 'float' or 'int8'")
        int8.check_canonical(q, scale, index, shape)
        self._describe(shape, stored)
        self.activations, self.dtype = activations, dtype
        self.rounding = "int8, activations too" if activations == "int8" else "int8"
        stream = int8.stream_from_canonical(q.detach(), scale.detach(), index, shape)
        self.register_buffer("stream", plain(stream))
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, linear: PackedLinear, activations: str = "float") -> Int8Linear:
        """Round the values of a packed layer.

        Its `error` is the root mean square error of outputs without bias, relative to theirs, on
        32 tokens of normal inputs.

        Raises:
            CompressError: the dtype is float64, a value is NaN or infinite, or a row keeps more
                than 131,072.
        """
        if why := int8.why_not(linear.shape):
            raise CompressError(f"the weight cannot have 8-bit values: {why}")
        if linear.like.dtype not in int8.DTYPES:
            raise CompressError(f"a weight of {linear.like.dtype} cannot have 8-bit values")
        values, index = linear.canonical()
        q, scale = int8.round_values(values)
        made = cls(
            q, scale, index, linear.shape, linear.bias, linear.stored, activations, values.dtype
        )
        made.epilogue = linear.epilogue
        rounds = 1 if activations == "int8" else 0
        made.error = output_error(
            linear, lambda x: matmul_int8(x, made.stream, None, made.dims, rounds)
        )
        return made.train(linear.training)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of the weight it stands for."""
        return self.stream.new_empty(0, dtype=self.dtype)

    @property
    def computes(self) -> torch.dtype:
        """The dtype of its inputs and outputs."""
        return self.dtype

    @property
    def how(self) -> tuple[Any, ...]:
        """Everything except the buffers that decides its product."""
        return self.epilogue, self.activations, self.dtype

    def dense(self) -> Tensor:
        """The weight, rebuilt: `scale * q`, exact in float32, rounded once to the layer's dtype."""
        matrix = unpack_int8(self.stream, self.dims).to(self.dtype)
        return matrix.t().contiguous() if self.stored == "Conv1D" else matrix

    def quantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """`q (out, S)`, `scale (out,)` and the index `(lists, S)`; an error if they are invalid."""
        found = int8.canonical_from_stream(self.stream, self.shape)
        int8.check_canonical(*found, self.shape)
        return found

    def canonical(self) -> tuple[Tensor, Tensor]:
        """Canonical values `scale * q (out, S)` float32, exact, and the index."""
        q, scale, index = self.quantized()
        return int8.float_values(q, scale), index

    def product(self, x: Tensor) -> Tensor:
        """Its own product, `(..., in)` to `(..., out)`, whatever it is computed together with."""
        rounds = 1 if self.activations == "int8" else 0
        stream, bias = self._buffers["stream"], self._parameters["bias"]  # as in PackedLinear
        return matmul_int8(x, stream, bias, self.dims, rounds, self.epilogue)  # pyright: ignore[reportArgumentType]

    def at_once(self, x: Tensor) -> Tensor:
        """Its own product on a CPU, of a call that needs no gradient and that nobody looks at."""
        rounds = 1 if self.activations == "int8" else 0
        stream, bias = self._buffers["stream"], self._parameters["bias"]
        return matmul_int8_cpu(x, stream, bias, *self.dims, rounds, self.epilogue)  # pyright: ignore[reportArgumentType]

    def extra_repr(self) -> str:
        """Sizes, pattern, dtype and activations."""
        return f"{super().extra_repr()}, values=int8, activations={self.activations}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        # The stream is bytes, which no change of dtype touches; it moves with the rest.
        self.dtype = fn(self.like).dtype
        nn.Module._apply(self, fn, recurse)
        self.stream = plain(self.stream)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        stream = state_dict.get(prefix + "stream")
        if isinstance(stream, Tensor):
            try:
                int8.check_stream(stream, self.shape)
                if not stream.is_meta:
                    found = int8.canonical_from_stream(stream, self.shape)
                    int8.check_canonical(*found, self.shape)
            except CompressError as error:
                error_msgs.append(f"{prefix}stream: {error}")
                return
        StandsFor._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
            error_msgs,
        )  # fmt: skip
        self.stream = plain(self.stream)


def with_int8(module: nn.Module, activations: str) -> nn.Module:
    """A packed module whose packed values are rounded to 8 bits; other modules in it are kept.

    Raises:
        CompressError: as `Int8Linear.of`.
    """
    return each_linear(
        module, lambda m: m if isinstance(m, Int8Linear) else Int8Linear.of(m, activations)
    )
