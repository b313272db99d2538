"""Convolutions on a packed weight."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmflow.packed.layout import from_matrix
from nmflow.packed.modules import PackedLinear
from nmflow.packed.stands_for import LazyWeight, StandsFor


class PackedConv(StandsFor):
    """A convolution of one to three dimensions on a packed weight.

    The windows of a channels-last input become the rows of a matrix, kernel positions before
    channels, and one packed product does the rest. A 1×1 convolution needs no windows.
    """

    def __init__(self, conv: nn.modules.conv._ConvNd, linear: PackedLinear) -> None:
        super().__init__()
        self.linear = linear
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode, self.groups = conv.padding, conv.padding_mode, conv.groups
        # Pairs from the last axis backwards, as F.pad takes them; right also for "same".
        self.pads = [int(p) for p in conv._reversed_padding_repeated_twice]
        self._plain = all(k == 1 for k in self.kernel_size) and not any(self.pads)

    @property
    def weight(self) -> Tensor:
        """The weight `(out, in, ...)`: its shape, dtype and device cost nothing."""
        if torch.compiler.is_compiling():
            return self.dense()
        size = (self.out_channels, self.in_channels, *self.kernel_size)
        return LazyWeight(self.dense, size, self.linear.like)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias."""
        return self.linear.bias

    def dense(self) -> Tensor:
        """The weight `(out, in, ...)`, rebuilt."""
        size = (self.out_channels, self.in_channels, *self.kernel_size)
        return from_matrix(self.linear.dense(), size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, in, ...)` or `(in, ...)` to `(batch, out, ...)` or `(out, ...)`."""
        spatial = len(self.kernel_size)
        if any(self.pads):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self.pads, mode=mode)
        x = x.movedim(-spatial - 1, -1)  # channels last
        if self._plain:
            steps = tuple(slice(None, None, s) for s in self.stride)
            rows = x[(..., *steps, slice(None))]
        else:
            # One transposition here, not one for every position of the kernel.
            rows = self._windows(x.contiguous())
        return self.linear(rows).movedim(-1, -spatial - 1)

    def _windows(self, x: Tensor) -> Tensor:
        """`(..., *outputs, positions * channels)` from a padded channels-last input.

        Stops count from the end, so that no size of the input is read: `torch.fx` has none.
        """
        along = [
            [slice(i * d, -d * (k - 1 - i) or None, s) for i in range(k)]
            for k, s, d in zip(self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        return torch.cat([x[(..., *at, slice(None))] for at in itertools.product(*along)], -1)

    def extra_repr(self) -> str:
        """Channels, kernel, stride and padding."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )
