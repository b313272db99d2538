"""`nmflow.mask` is exact: for every pattern, dtype, axis and layout, ties and zeros included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nmflow
import reference
from nmflow import masks
from nmflow.errors import NMFlowError, PatternError, WeightError

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))

# Values that tie, that round to ties in 16 bits, and that a careless kernel flushes to 0.
AWKWARD = [0.0, -0.0, 1.0, -1.0, 1.0009765625, 0.1, -0.1, 6e-8, -6e-8, 1e-30, 3.0, 65504.0, -2.0]


def counts(kept: torch.Tensor, m: int, dim: int) -> torch.Tensor:
    return kept.movedim(dim, -1).unflatten(-1, (-1, m)).sum(-1)


def awkward(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor(AWKWARD, dtype=torch.float64)
    picked = table[torch.randint(len(AWKWARD), shape, generator=generator)]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    use = torch.rand(shape, generator=generator) < 0.7
    return torch.where(use, picked, noise).to(dtype)


@dtypes
def test_every_pattern_from_1_2_to_8_256(dtype: torch.dtype) -> None:
    """All 2,012 patterns on ties, zeros, tiny values and noise, against a stable sort."""
    for m in range(2, 257):
        w = awkward((3, 2 * m), m, dtype)
        for n in range(1, min(8, m) + 1):
            kept = nmflow.mask(w, f"{n}:{m}")
            assert kept.dtype == torch.bool
            assert torch.equal(kept, reference.keep(w, n, m)), (n, m)
    for m in (4, 16, 256):  # and the patterns that keep most of a group, which SDGF passes through
        w = awkward((3, 2 * m), m, dtype)
        for n in {1, m // 2, m // 2 + 1, m - 2, m - 1, m}:
            assert torch.equal(nmflow.mask(w, f"{n}:{m}"), reference.keep(w, n, m)), (n, m)


@dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 1e-7])
def test_equal_weights_keep_the_lowest_indices(value: float, dtype: torch.dtype) -> None:
    for n, m in [(1, 2), (1, 4), (2, 4), (3, 4), (1, 16), (5, 8), (7, 8), (8, 256), (4, 4), (1, 3)]:
        kept = nmflow.mask(torch.full((5, 3 * m), value, dtype=dtype), f"{n}:{m}")
        expected = (torch.arange(3 * m) % m < n).expand(5, -1)
        assert torch.equal(kept, expected), (n, m)


@dtypes
def test_the_sign_does_not_matter(dtype: torch.dtype) -> None:
    w = torch.tensor([[-2.0, 2.0, -2.0, 1.0, -0.0, 0.0, -5.0, 5.0]], dtype=dtype)
    kept = nmflow.mask(w, "2:4")
    assert kept.tolist() == [[True, True, False, False, False, False, True, True]]
    assert torch.equal(kept, nmflow.mask(-w, "2:4"))


SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((6, 16), 1),
    ((6, 16), -1),
    ((16, 6), 0),
    ((16, 6), -2),
    ((6, 8, 3), 1),
    ((6, 8, 3, 3), 1),
    ((8, 6, 3, 3), 0),
    ((4, 5, 3, 8), -1),
    ((4, 5, 8, 3), 2),
    ((6, 8, 2, 3, 3), 1),
    ((1, 8), 1),
    ((8,), 0),
    ((8,), -1),
]


@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("pattern", ["1:4", "3:8", "2:2"])
def test_axes(shape: tuple[int, ...], dim: int, pattern: str) -> None:
    n, m, _ = reference.parse(pattern)
    for dtype in FLOATS:
        w = awkward(shape, 3, dtype)
        kept = nmflow.mask(w, pattern, dim=dim)
        assert kept.shape == w.shape
        assert bool((counts(kept, m, dim) == n).all())
        if len(shape) > 1:
            assert torch.equal(kept, reference.keep(w, n, m, dim))


def _transposed(w: torch.Tensor) -> torch.Tensor:
    return w.transpose(0, 1).contiguous().transpose(0, 1)


def _strided(w: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*w.shape[:-1], 2 * w.shape[-1]), 9.0, dtype=w.dtype)
    wide[..., ::2] = w
    return wide[..., ::2]


def _channels_last(w: torch.Tensor) -> torch.Tensor:
    return w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w.flip(-1).flip(-1)


def _offset(w: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones(1, dtype=w.dtype), w.flatten()])[1:].view(w.shape)


def _expanded(w: torch.Tensor) -> torch.Tensor:
    return w[:1].expand_as(w)


@pytest.mark.parametrize(
    "layout", [_transposed, _strided, _channels_last, _offset, _expanded], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("shape", "dim"), [((6, 16), 1), ((8, 6), 0), ((6, 8, 3, 3), 1)], ids=str)
def test_layouts(
    layout: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], dim: int
) -> None:
    """What a weight looks like in memory changes nothing, and the weight is only read."""
    for dtype in FLOATS:
        w = layout(awkward(shape, 5, dtype))
        before = w.clone()
        for pattern in ("1:4", "3:4", "3:8", "1:4@4"):
            n, m, panel = reference.parse(pattern)
            kept = nmflow.mask(w, pattern, dim=dim)
            assert torch.equal(kept, reference.keep(before, n, m, dim, panel)), (dtype, pattern)
        assert torch.equal(w, before)


@pytest.mark.parametrize("panel", [2, 3, 4, 64])
@pytest.mark.parametrize(
    ("shape", "dim"), [((8, 16), 1), ((16, 8), 0), ((7, 8, 3, 3), 1), ((8, 6, 2, 2), 0)], ids=str
)
def test_panels_share_their_columns(shape: tuple[int, ...], dim: int, panel: int) -> None:
    """Whole numbers, so that a sum over rows is exact in every dtype; a last panel may be short."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(-4, 5, shape, generator=generator)
    for dtype in FLOATS:
        for n, m in [(1, 4), (2, 4), (3, 8), (7, 8), (1, 8)]:
            kept = nmflow.mask(whole.to(dtype), f"{n}:{m}@{panel}", dim=dim)
            assert torch.equal(kept, reference.keep(whole, n, m, dim, panel)), (n, m, dtype)
            rows = kept if dim else kept.transpose(0, 1)
            for start in range(0, rows.shape[0], panel):
                assert bool((rows[start : start + panel] == rows[start]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_panels_are_summed_in_more_than_16_bits(dtype: torch.dtype) -> None:
    """512 + 1 rounds to 512 in bfloat16, and sixty of 2,048 pass the largest float16."""
    w = torch.zeros(3, 4, dtype=dtype)
    w[:, 0] = torch.tensor([512.0, 0.5, 0.5])
    w[:, 1] = torch.tensor([512.0, 1.0, 1.0])
    assert nmflow.mask(w, "1:4@3").tolist() == [[False, True, False, False]] * 3
    many = torch.full((64, 2), 2048.0, dtype=dtype)
    many[0, 1] = 4096.0
    assert nmflow.mask(many, "1:2@64")[:, 1].all()


ARRAYS = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 12)).flatmap(
    lambda s: st.tuples(
        st.integers(1, s[2]),
        st.just(s[2]),
        hnp.arrays(
            np.float32,
            (s[0], s[1] * s[2]),
            elements=st.one_of(
                st.sampled_from(AWKWARD[:10]).map(np.float32),
                st.floats(-(2.0**100), 2.0**100, width=32),
            ),
        ),
    )
)


@given(ARRAYS, st.sampled_from(FLOATS), st.integers(1, 4))
def test_any_weight_and_pattern(
    drawn: tuple[int, int, np.ndarray], dtype: torch.dtype, panel: int
) -> None:
    n, m, array = drawn
    w = torch.from_numpy(array).to(dtype)
    if not bool(torch.isfinite(w).all()):
        with pytest.raises(WeightError):
            nmflow.mask(w, f"{n}:{m}@{panel}")
        return
    kept = nmflow.mask(w, f"{n}:{m}")
    assert torch.equal(kept, reference.keep(w, n, m))
    assert masks.holds(w * kept, f"{n}:{m}")
    assert torch.equal(nmflow.mask(w.t().contiguous(), f"{n}:{m}", dim=0), kept.t())
    shared = nmflow.mask(w, f"{n}:{m}@{panel}")
    assert bool((counts(shared, m, 1) == n).all())
    assert masks.holds(w * shared, f"{n}:{m}@{panel}")


@given(ARRAYS)
def test_a_mask_is_stable_and_nested(drawn: tuple[int, int, np.ndarray]) -> None:
    """Masking what is masked changes nothing; a weight that n:m keeps, (n+1):m keeps as well."""
    n, m, array = drawn
    w = torch.from_numpy(array)
    kept = nmflow.mask(w, f"{n}:{m}")
    assert torch.equal(w * nmflow.mask(w * kept, f"{n}:{m}"), w * kept)
    if n < m:
        assert bool((nmflow.mask(w, f"{n + 1}:{m}") | ~kept).all())


@given(ARRAYS, st.floats(0, 1), st.booleans())
def test_projection(drawn: tuple[int, int, np.ndarray], delta: float, limited: bool) -> None:
    """w ⊙ (m + (1 - m) ⊙ m' · δ), and bit-exact where the mask keeps or δ is 0 or 1."""
    n, m, array = drawn
    w = torch.from_numpy(array)
    kept = nmflow.mask(w, f"{n}:{m}")
    fading = nmflow.mask(w, f"{max(n, m - 1)}:{m}") if limited else None
    result = masks.project(w, kept, fading, delta)
    assert result.dtype == w.dtype
    assert torch.equal(result[kept], w[kept])
    allowed = torch.ones_like(kept) if fading is None else fading
    assert not bool(result[~kept & ~allowed].any())
    torch.testing.assert_close(result[~kept & allowed], w[~kept & allowed] * delta)
    assert torch.equal(masks.project(w, kept), w * kept)
    assert torch.equal(masks.project(w, kept, None, 1.0), w)


def test_holds() -> None:
    for shape, dim in SHAPES:
        if len(shape) == 1:
            continue
        w = torch.ones(shape)
        kept = nmflow.mask(w, "1:4", dim=dim)
        assert masks.holds(w * kept, "1:4", dim)
        assert masks.holds(torch.zeros(shape), "1:4", dim)
        assert not masks.holds(w, "1:4", dim)
        assert masks.holds(w, "4:4", dim)
        broken = w * kept
        broken.view(-1)[(~kept).flatten().nonzero()[-1]] = 1e-30
        assert not masks.holds(broken, "1:4", dim)
    own = nmflow.mask(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]), "1:4").float()
    assert masks.holds(own, "1:4")
    assert not masks.holds(own, "1:4@2")
    assert masks.holds(own, "2:4@2")


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4", "3:8", "4:4", "1:4@2", "3:8@5"])
def test_what_is_not_finite_is_refused(pattern: str, bad: float, dtype: torch.dtype) -> None:
    for at in [(0, 0), (3, 5), (5, 15)]:
        w = torch.ones(6, 16, dtype=dtype)
        w[at] = bad
        for one, dim in [(w, 1), (w.t().contiguous(), 0), (_strided(w), 1)]:
            with pytest.raises(WeightError, match=r"(?i)nan|finite|infinit"):
                nmflow.mask(one, pattern, dim=dim)


@pytest.mark.parametrize("w", [torch.ones(4, 4, dtype=torch.int64), torch.ones(4, 4) > 0, [[1.0]]])
def test_what_is_no_float_tensor_is_refused(w: Any) -> None:
    with pytest.raises(WeightError):
        nmflow.mask(w, "1:4")


@pytest.mark.parametrize(
    ("shape", "pattern", "dim"),
    [((4, 6), "1:4", 1), ((4, 6), "1:4", -1), ((6, 4), "1:4", 0), ((4, 4), "1:8", 1)],
    ids=str,
)
def test_what_does_not_divide_is_refused(shape: tuple[int, ...], pattern: str, dim: int) -> None:
    with pytest.raises(PatternError) as caught:
        nmflow.mask(torch.ones(shape), pattern, dim=dim)
    assert pattern in str(caught.value)
    assert str(shape[dim]) in str(caught.value)


@pytest.mark.parametrize("dim", [2, -3, 7])
def test_a_missing_axis_is_refused(dim: int) -> None:
    with pytest.raises(NMFlowError, match=str(dim)):
        nmflow.mask(torch.ones(4, 4), "1:4", dim=dim)


def test_masks_do_not_enter_autograd() -> None:
    w = torch.randn(4, 8, requires_grad=True)
    kept = nmflow.mask(w, "1:4")
    assert not kept.requires_grad
    (w * kept).sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad, kept.float())


def test_a_mask_does_not_depend_on_threads_or_size() -> None:
    """Rows are independent: a large weight is masked as its rows are, on one thread or two."""
    w = awkward((257, 1024), 11, torch.float32)
    whole = nmflow.mask(w, "3:16")
    assert torch.equal(whole, torch.cat([nmflow.mask(row[None], "3:16") for row in w]))
    torch.set_num_threads(2)
    assert torch.equal(whole, nmflow.mask(w, "3:16"))


def test_what_the_reference_spares_lies_where_the_weight_does() -> None:
    """So that it judges runs on a GPU, too; `meta` is a device that is not the CPU."""
    spec = reference.Spec(1)
    w = torch.empty(8, 32, device="meta")
    for panel in (1, 4):
        assert reference.spared(w, 0.5, 4, spec, panel).is_meta
    w = awkward((8, 32), 0, torch.float64)
    sums = w.abs().reshape(64, 4).sum(1)
    want = torch.zeros(64, dtype=torch.bool)
    want[sums.argsort(descending=True, stable=True)[:32]] = True
    assert torch.equal(reference.spared(w, 0.5, 4, spec).reshape(64, 4).all(1), want)
