"""Scores that know the activations, against a loop over weights."""

from __future__ import annotations

import itertools

import pytest
import torch

from nmflow.errors import WeightError
from nmflow.masks import holds, mask, wanda_score

SHAPES = [((6, 8), 1), ((8, 6), 0), ((4, 8, 3, 3), 1), ((2, 6, 8), 2), ((2, 8, 6), 1)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", [False, True])
def test_every_score_is_the_product_of_its_weight_and_its_input(shape, dim, dtype, each):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    stacked = len(shape) == 3
    norm = torch.rand((shape[0], 8) if each and stacked else (8,)).double()
    score = wanda_score(w, norm, dim)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for place in itertools.product(*map(range, shape)):
        x = norm[place[0], place[dim]] if norm.ndim == 2 else norm[place[dim]]
        assert score[place].item() == pytest.approx(abs(w[place].item()) * x.item(), rel=1e-6)
    kept = mask(score, "2:8", dim, stacked=stacked)
    assert holds(w * kept, "2:8", dim, stacked=stacked)


def test_equal_inputs_leave_magnitude_and_a_dead_one_is_not_kept():
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mask(wanda_score(w, torch.ones(32)), "1:8"), mask(w, "1:8"))
    dead = torch.ones(32).index_fill(0, torch.tensor([3, 17]), 0.0)
    assert not mask(wanda_score(w, dead), "4:8")[:, [3, 17]].any()


@pytest.mark.parametrize(
    "norm",
    [torch.ones(7), torch.ones(6, 8), torch.tensor([1.0] * 7 + [-1.0]),
     torch.tensor([1.0] * 7 + [float("nan")]), torch.tensor([1.0] * 7 + [float("inf")])],
)  # fmt: skip
def test_norms_that_cannot_be(norm):
    with pytest.raises(WeightError, match="norm"):
        wanda_score(torch.ones(6, 8), norm)
