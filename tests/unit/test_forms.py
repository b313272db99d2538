"""What kept weights become: laws of S-STE's projection and of MaxQ's soft mask."""

from __future__ import annotations

import pytest
import torch

from nmflow.masks import importance, largest_groups, least_squares, mask, soft_threshold
from nmflow.pattern import Pattern

SHAPES = [  # with the grouped axis, and whether it is a stack
    ((6, 16), 1, False),
    ((16, 6), 0, False),
    ((4, 16, 3, 3), 1, False),
    ((3, 5, 16), 2, True),
    ((3, 16, 5), 1, True),
]
PATTERNS = ["2:4", "1:4", "3:8", "1:16", "1:4@2"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("shape", "dim", "stacked"), SHAPES, ids=str)
def test_soft_threshold_is_continuous(
    shape: tuple[int, ...], dim: int, stacked: bool, pattern: str
) -> None:
    """On a path between two weights it never jumps, though masks change on the way."""
    if "@" in pattern:
        pytest.skip("a panel's mask may jump: its rows have thresholds of their own")
    torch.manual_seed(0)
    p, steps = Pattern(pattern), 4000
    a, b = torch.randn(shape).double(), torch.randn(shape).double()
    last, changes, kept_last = None, 0, None
    for i in range(0, steps, 1):
        w = a + (b - a) * i / steps if i < 40 or i % 97 == 0 else None
        if w is None:
            last = None
            continue
        kept = mask(w, p, dim, stacked=stacked)
        s = soft_threshold(w, kept, p, dim, stacked=stacked)
        if last is not None:
            assert float((s - last).abs().max()) <= 3 * float((b - a).abs().max()) / steps
        if kept_last is not None:
            changes += int(not torch.equal(kept, kept_last))
        last, kept_last = s, kept
    assert changes


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("shape", "dim", "stacked"), SHAPES, ids=str)
def test_soft_threshold_of_each_group(
    shape: tuple[int, ...], dim: int, stacked: bool, pattern: str
) -> None:
    """|w| less the largest |w| of its group that is not kept: group by group, in plain Python."""
    torch.manual_seed(1)
    p, w = Pattern(pattern), torch.randn(shape).double()
    kept = mask(w, p, dim, stacked=stacked)
    s = soft_threshold(w, kept, p, dim, stacked=stacked)
    groups = [x.movedim(dim, -1).reshape(-1, p.m).tolist() for x in (w, kept, s)]
    for values, keeps, made in zip(*groups, strict=True):
        t = max(abs(v) for v, k in zip(values, keeps, strict=True) if not k)
        for v, k, m in zip(values, keeps, made, strict=True):
            assert m == pytest.approx((1 if v > 0 else -1) * max(abs(v) - t, 0.0) if k else 0.0)


def test_the_least_squares_factor() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 16)
    s = soft_threshold(w, mask(w, "2:4"), Pattern("2:4"))
    beta = least_squares(w, s)
    errors = [float((w - f * beta * s).square().sum()) for f in (0.99, 1.0, 1.01)]
    assert errors[1] < min(errors[0], errors[2])
    assert least_squares(w, torch.zeros_like(w)) == 1.0


@pytest.mark.parametrize(("shape", "dim", "stacked"), SHAPES, ids=str)
def test_importance_looks_along_output_rows(
    shape: tuple[int, ...], dim: int, stacked: bool
) -> None:
    """A row is enhanced as it is alone, whatever the others hold, by one half at the threshold."""
    torch.manual_seed(0)
    p, w = Pattern("1:4"), torch.randn(shape).double()
    q = importance(w, p, dim, stacked=stacked, tau=0.1)
    assert q.shape == w.shape
    assert float(q.min()) == 0.0
    assert float(q.max()) <= (2.0 if w.ndim == 4 else 1.0)
    if w.ndim == 4:
        return
    out = 3 - dim if stacked else 1 - dim
    rows, found = (x.movedim(out, -2).reshape(-1, 16) for x in (w, q))
    for row, one in zip(rows, found, strict=True):
        size = row.abs().sort(descending=True).values
        t = (size[3] + size[4]) / 2
        expected = torch.where(row.abs() >= size[3], torch.sigmoid((row.abs() - t) / 0.1), 0.0)
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:4@2"])
def test_largest_groups_are_as_many_as_asked_and_whole(pattern: str, share: float) -> None:
    torch.manual_seed(0)
    p, w = Pattern(pattern), torch.randn(6, 16)
    some = largest_groups(w, p, 1, share)
    panels = some.reshape(6 // p.panel, p.panel, -1, p.m)
    assert bool((panels.any(-1).any(1) == panels.all(-1).all(1)).all())
    sums = w.abs().reshape(6 // p.panel, p.panel, -1, p.m).sum((1, 3)).flatten()
    chosen = panels.any(-1).any(1).flatten()
    assert int(chosen.sum()) == int(share * len(sums))
    if 0 < share < 1:
        assert float(sums[chosen].min()) >= float(sums[~chosen].max())
    assert torch.equal(
        largest_groups(torch.ones(1, 8), Pattern("1:4"), 1, 0.5)[0, :4],
        torch.ones(4, dtype=torch.bool),
    )
