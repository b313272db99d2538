"""Packed layers of float32 networks that multiply in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.kernels import matmul
from nmflow.kernels.layout import Shape
from nmflow.packed.modules import PackedLinear, plain
from nmflow.packed.rounded import each_linear, output_error


def product(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, dims: tuple[int, ...],
    epilogue: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`epilogue(x Wᵀ + bias)` in the dtype of the values, for x and y of `dtype`.

    Under autocast x may be any float, and y has autocast's dtype, as with every packed layer.
    """
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    if x.dtype is not dtype and not autocast:
        raise CompressError(
            f"x is {x.dtype} and the packed layer {dtype}: convert one of them, for instance "
            "packed.to(dtype) or x.to(dtype)"
        )
    own = values.dtype
    y = matmul(x.to(own), values, codes, None if bias is None else bias.to(own), dims, epilogue)
    return y if autocast else y.to(dtype)


# A graph of `torch.fx` holds the product as one call.
torch.fx.wrap("product")


class BFloat16Linear(PackedLinear):
    """`y = x Wᵀ + b` in bfloat16, W `(out, in)` packed under N:M, for a layer of another dtype.

    The kept values are stored in bfloat16. x and b are rounded at each call, sums are float32, and
    y is rounded to bfloat16 and widened, as by a dense bfloat16 layer between two conversions. Ties
    round to even.

    Args:
        values: canonical values `(out, S)`, bfloat16, or rounded to it.
        index: canonical index `(lists, S)` uint8.
        shape: sizes and pattern.
        bias: `(out,)` or None.
        stored: as for `PackedLinear`.
        dtype: the dtype of the layer it stands for, and of x and y.

    Raises:
        CompressError: sizes, dtypes or an index that are wrong.

    Example:
        >>> w = torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        >>> layer = BFloat16Linear.of(PackedLinear.pack(w, "1:4"))
        >>> layer(torch.ones(1, 4)), layer.values.dtype
        (tensor([[3., 1.]]), torch.bfloat16)
    """

    def __init__(
        self,
        values: Tensor,
        index: Tensor,
        shape: Shape,
        bias: nn.Parameter | None = None,
        stored: str = "Linear",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(values.bfloat16(), index, shape, bias, stored)
        self.dtype = dtype

    @classmethod
    def of(cls, linear: PackedLinear) -> PackedLinear:
        """Round the values of a packed float32 layer; one of bfloat16 is returned as it is.

        Raises:
            CompressError: the dtype is another one, or a value is too large for bfloat16.
        """
        dtype = linear.like.dtype
        if dtype == torch.bfloat16 or isinstance(linear, BFloat16Linear):
            return linear
        if dtype != torch.float32:
            raise CompressError(f"a weight of {dtype} is not rounded to bfloat16")
        values, index = linear.canonical()
        if bool((values.bfloat16().isinf() & values.isfinite()).any()):
            raise CompressError("a value is too large for bfloat16")
        made = cls(values, index, linear.shape, linear.bias, linear.stored, dtype)
        made.epilogue = linear.epilogue
        made.error = output_error(
            linear,
            lambda x: product(x, made.values, made.codes, None, made.dims, 0, torch.float32),
        )
        return made.train(linear.training)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of the weight it stands for."""
        return self.values.new_empty(0, dtype=self.dtype)

    @property
    def how(self) -> tuple[Any, ...]:
        """Everything except the buffers that decides its product."""
        return self.epilogue, self.dtype

    def dense(self) -> Tensor:
        """The weight, rebuilt: the values that bfloat16 holds, in the layer's dtype."""
        return super().dense().to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Its own product, `(..., in)` to `(..., out)`, whatever it is computed together with."""
        held = self.values, self.codes, self.bias, self.dims
        return product(x, *held, self.epilogue, self.dtype)

    def at_once(self, x: Tensor) -> Tensor:
        """The same: the conversions are calls of torch anyway."""
        return self.product(x)

    def extra_repr(self) -> str:
        """Sizes, pattern, dtype and what it multiplies in."""
        return f"{super().extra_repr()}, multiplies in bfloat16"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BFloat16Linear:
        # As whole numbers the values move with the rest, and no change of dtype touches them.
        self.dtype = fn(self.like).dtype
        self.values = self.values.view(torch.int16)
        nn.Module._apply(self, fn, recurse)
        self.values, self.codes = plain(self.values.view(torch.bfloat16)), plain(self.codes)
        return self


def with_bfloat16(module: nn.Module) -> nn.Module:
    """A packed module whose packed float32 layers multiply in bfloat16.

    Raises:
        CompressError: as `BFloat16Linear.of`.
    """
    return each_linear(module, BFloat16Linear.of)
