"""How far outputs are apart: by their own size, whatever masks put beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nmflow
from nmflow.errors import CompressError
from nmflow.packed.outputs import distance


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.floats(0, 1))
def test_it_is_the_largest_difference_relative_to_the_largest_value(
    seed: int, power: float, by: float
) -> None:
    torch.manual_seed(seed)
    one = torch.randn(40).double() * 2.0**power
    other = one + by * torch.randn(40).double() * one.abs().max()
    a, b = one.numpy(), other.numpy()
    wanted = np.abs(a - b).max() / max(np.abs(a).max(), 1e-6)
    assert distance(one, other) == pytest.approx(wanted, rel=1e-9)


MASKS = [-torch.inf, torch.inf, torch.nan, torch.finfo(torch.float32).min, 1e9]


@pytest.mark.parametrize("value", MASKS)
def test_what_is_masked_hides_no_difference(value: float) -> None:
    one = torch.linspace(1, 2, 20)
    masked = torch.cat([torch.full((5,), value), one])
    other = masked.clone()
    assert distance(masked, other) == 0.0
    other[-1] += 0.5
    assert distance(masked, other) > 1e-4
    other = masked.clone()
    other[0] = 3.0
    assert distance(masked, other) >= 0.99
    assert distance(one, one[:-1]) == torch.inf
    assert distance(one, masked) == torch.inf


class Masked(nn.Module):
    """Computes something else once its layer is packed, and masks its output."""

    def __init__(self, value: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.act, self.value = nn.Linear(16, 16), nn.GELU(), value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        y = y if type(self.fc) is nn.Linear else -y
        return y.masked_fill(torch.arange(16) < 3, self.value)


@pytest.mark.parametrize("value", MASKS)
def test_a_packed_network_that_computes_something_else_is_refused(value: float) -> None:
    model = Masked(value).eval()
    nmflow.prune(model, "1:4", include="*")
    with pytest.raises(CompressError, match="differs from that of the dense one"):
        nmflow.compress(model, include="*", measure=False, example_inputs=torch.randn(4, 16))
