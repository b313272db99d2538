"""SparseGPT's update, against inverses that are computed anew at every column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmflow.errors import PatternError, WeightError
from nmflow.masks import holds, mask
from nmflow.oneshot import sparsegpt
from nmflow.pattern import Pattern

PATTERNS = ["1:2", "2:4", "1:4", "1:8", "4:8", "1:4@2", "2:8@4", "4:4"]


def inputs(count: int, width: int, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=made, dtype=torch.float64)
    return torch.randn(count, width, generator=made, dtype=torch.float64) @ mix


def direct(w: Tensor, gram: Tensor, pattern: str, damping: float) -> Tensor:
    """Optimal brain surgeon, a column at a time, each inverse from scratch."""
    out, p = w.clone(), Pattern(pattern)
    h = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    kept = torch.ones_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % p.m == 0:
            spread = [torch.linalg.inv(h[i:, i:])[0, 0] for i in range(j, j + p.m)]
            score = out[:, j : j + p.m].square() / torch.stack(spread)
            kept[:, j : j + p.m] = mask(score, p)
        free = torch.linalg.inv(h[j:, j:])
        for row in range(w.shape[0]):
            if not kept[row, j]:
                out[row, j:] -= out[row, j] / free[0, 0] * free[0]
                out[row, j] = 0.0
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "tokens"), [(6, 200), (5, 9)])
def test_it_is_the_update_with_every_inverse_from_scratch(pattern: str, rows: int, tokens: int):
    x = inputs(tokens, 16)
    w = torch.randn(rows, 16, dtype=torch.float64)
    found = sparsegpt(w, x.T @ x, pattern, damping=0.01, block=8)
    assert torch.allclose(found, direct(w, x.T @ x, pattern, 0.01), atol=1e-8)
    assert holds(found, pattern)


@pytest.mark.parametrize("pattern", ["1:4", "2:8@4"])
def test_the_block_is_a_matter_of_speed_alone(pattern: str):
    x, w = inputs(100, 64), torch.randn(8, 64, dtype=torch.float64)
    whole = sparsegpt(w, x.T @ x, pattern, block=64)
    for block in (1, 8, 12, 1000):
        assert torch.allclose(sparsegpt(w, x.T @ x, pattern, block=block), whole, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_outputs_change_less_than_by_the_same_mask_without_an_update(seed: int):
    x, w = inputs(300, 32, seed), torch.randn(16, 32, dtype=torch.float64)
    found = sparsegpt(w, x.T @ x, "1:4")

    def error(v: Tensor) -> float:
        return (x @ (v - w).T).square().sum().item()

    assert error(found) < error(w * (found != 0))
    assert error(found) < error(w * mask(w, "1:4"))


def test_uncorrelated_inputs_of_one_size_leave_magnitude_and_the_weights():
    w = torch.randn(8, 32)
    found = sparsegpt(w, 7 * torch.eye(32), "2:8")
    assert torch.allclose(found, w * mask(w, "2:8"))


def test_a_dead_input_loses_its_weights_and_dtypes_are_kept():
    x = inputs(50, 16)
    x[:, [3, 8]] = 0.0
    w = torch.randn(4, 16)
    before = w.clone()
    found = sparsegpt(w.bfloat16(), x.T @ x, "2:4")
    assert found.dtype == torch.float32
    assert (found[:, [3, 8]] == 0).all()
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"w": torch.ones(2, 4, 4)}, WeightError, "give a matrix"),
        ({"w": torch.ones(2, 4, dtype=torch.int32)}, WeightError, "of floats"),
        ({"gram": torch.eye(3)}, WeightError, r"takes \(4, 4\)"),
        ({"pattern": "1:3"}, PatternError, "divides them"),
        ({"w": torch.full((2, 4), float("nan"))}, WeightError, "NaN"),
        ({"gram": torch.full((4, 4), float("inf"))}, WeightError, "NaN"),
        ({"gram": -torch.eye(4)}, WeightError, "cannot be inverted"),
        ({"damping": 0.0}, WeightError, "above 0"),
    ],
)
def test_mistakes_are_one_sentence(change: dict, kind: type, said: str):
    given = {"w": torch.ones(2, 4), "gram": torch.eye(4), "pattern": "1:4", **change}
    with pytest.raises(kind, match=said) as caught:
        sparsegpt(**given)
    assert "\n" not in str(caught.value)
