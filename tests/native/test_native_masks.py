"""The compiled mask kernel, swept: every N:M, axis and panel against a stable sort, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from nmflow import native
from nmflow.errors import PatternError
from nmflow.masks import native as native_masks
from nmflow.masks import project, select
from nmflow.pattern import Pattern

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))

KINDS = ("normal", "few values", "one value", "awkward", "mostly zeros", "mostly equal")
# Zeros of both signs, subnormals of fp32 and of fp16, and the ends of the ranges.
AWKWARD = [0.0, -0.0, 1e-40, -1e-40, 6e-8, -6e-8, 1.0, -1.0, 6e4, -6e4]


@pytest.fixture(params=native.ISAS[:3])  # tiles: test_tiles.py
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    if native.set_isa(request.param) != request.param:
        native.set_isa(before)
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_isa(before)


def weight(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> torch.Tensor:
    if kind == "few values":
        w = torch.randint(-2, 3, shape).float()
    elif kind == "one value":
        w = torch.full(shape, random.choice(AWKWARD))
    elif kind == "awkward":
        w = torch.tensor(AWKWARD)[torch.randint(len(AWKWARD), shape)]
    else:
        w = torch.randn(shape)
        if kind == "mostly zeros":
            w = w * (torch.rand(shape) < 0.1)
        if kind == "mostly equal":
            w = torch.where(torch.rand(shape) < 0.5, w, torch.tensor(-1.0))
    return w.to(dtype)


def ranks(w: torch.Tensor, m: int, dim: int = -1, panel: int = 1) -> torch.Tensor:
    """Each element's place in its group when sorted stably, largest first: kept if below N."""
    size = w.float().abs().numpy()
    rows = []
    for start in range(0, size.shape[0], panel) if panel > 1 else (0,):
        part = size[start : start + panel] if panel > 1 else size
        if panel > 1:
            total = part[0].copy()
            for row in part[1:]:
                total += row
            part = np.broadcast_to(total, part.shape)
        moved = np.moveaxis(part, dim, -1)
        groups = moved.reshape(*moved.shape[:-1], -1, m)
        order = np.argsort(-groups, axis=-1, kind="stable")
        rank = np.argsort(order, axis=-1, kind="stable").reshape(moved.shape)
        rows.append(np.moveaxis(rank, -1, dim))
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(rows)))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(BITS[a.dtype]), b.contiguous().view(BITS[a.dtype]))


def check(
    w: torch.Tensor,
    n: int,
    m: int,
    delta: float,
    kept: torch.Tensor,
    dim: int = -1,
    panel: int = 1,
) -> None:
    """Any of the outputs, or the weight in place, are what torch makes of the mask."""
    expected = project(w, kept, delta=delta)
    dense, out, mask = torch.empty_like(w), torch.empty_like(w), torch.empty_like(kept)
    inside = w.clone()
    case = random.randrange(4)
    told = (n, m, delta, tuple(w.shape), dim, panel, case)
    if case == 0:
        assert native_masks.project(w, n, m, delta, dense, mask, out, dim=dim, panel=panel), told
        assert torch.equal(mask, kept), told
        assert same(dense, w), told
        assert same(out, expected), told
    elif case == 1:
        assert native_masks.project(w, n, m, delta, out=out, dim=dim, panel=panel), told
        assert same(out, expected), told
    elif case == 2:
        assert native_masks.project(w, n, m, delta, mask=mask, dim=dim, panel=panel), told
        assert torch.equal(mask, kept), told
    else:
        assert native_masks.project(
            inside, n, m, delta, dense=dense, out=inside, dim=dim, panel=panel
        ), told
        assert same(inside, expected), told
        assert same(dense, w), told


@dtypes
def test_every_pattern_from_1_1_to_8_256(isa: str, dtype: torch.dtype) -> None:
    """And 8:2048, the patterns that keep most of a group, and odd numbers of rows and groups."""
    random.seed(0)
    for m in [*range(1, 257), 512, 1000, 1024, 2048, 5000]:
        w = weight((random.choice([1, 3, 5]), m * random.choice([1, 2, 7])), KINDS[m % 6], dtype)
        rank = ranks(w, m)
        most = {m, m - 1, m - 2, m // 2, m // 2 + 1, m // 4} - {0, -1}
        for n in {*range(1, min(8, m) + 1), *most}:
            check(w, n, m, random.choice([0.0, 0.3, 1.0]), rank < n)


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_cut_short(isa: str, dtype: torch.dtype, kind: str) -> None:
    """Every number of groups around the kernels' blocks of vectors."""
    random.seed(1)
    patterns = [(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (3, 8), (1, 16), (8, 16), (1, 32), (5, 12)]
    for n, m in patterns:
        for groups in (1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257, 513):
            w = weight((groups, m), kind, dtype)
            check(w, n, m, random.choice([0.0, 0.3, -0.5]), ranks(w, m) < n)


@dtypes
def test_axes_and_panels(isa: str, dtype: torch.dtype) -> None:
    """Random shapes, convolutions and `(in, out)` weights among them."""
    random.seed(2)
    for _ in range(250):
        m = random.choice([1, 2, 3, 4, 5, 8, 12, 16, 32, 33, 64])
        n = random.choice([1, m, max(1, m - 1), max(1, m // 2), random.randrange(1, m + 1)])
        length, rows = m * random.choice([1, 2, 5]), random.choice([1, 2, 3, 8, 19])
        inner = random.choice([2, 3, 4, 7, 8, 15, 16, 17, 25, 40])
        shapes = {
            0: [(length, inner), (length,), (length, 3, 3)],
            1: [(rows, length), (rows, length, inner), (rows, length, 3, 3)],
            2: [(rows, 2, length, inner), (rows, 3, length)],
        }
        dim = random.choice([0, 1, 1, 2])
        shape = random.choice(shapes[dim])
        panel = random.choice([1, 2, 3, 4, 16]) if dim else 1
        w = weight(shape, random.choice(KINDS), dtype)
        kept = ranks(w, m, dim, panel) < n
        check(w, n, m, random.choice([0.0, 0.3, 1.0]), kept, dim=dim, panel=panel)


@dtypes
def test_threads_share_a_weight_out(isa: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    for (rows, length, inner), (n, m), panel in [
        ((301, 768, 1), (1, 4), 1),
        ((301, 768, 1), (3, 32), 1),
        ((1, 768, 301), (3, 32), 1),
        ((301, 96, 9), (2, 8), 1),
        ((301, 768, 1), (2, 8), 16),
    ]:
        w = weight((rows, length, inner), "few values", dtype)
        kept = ranks(w, m, 1, panel) < n
        mask = torch.empty_like(kept)
        assert native_masks.project(w, n, m, 0.0, mask=mask, dim=1, panel=panel)
        assert torch.equal(mask, kept)
        w[rows - 1, length - 1, inner - 1] = torch.inf
        assert not native_masks.project(w, n, m, 0.0, mask=mask, dim=1, panel=panel)


@dtypes
def test_torch_agrees_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a panel too: both add row by row in fp32, which rounds as no other order does."""
    random.seed(3)
    shapes = [((37, 64), 1), ((19, 64, 3, 3), 1), ((64, 21), 0), ((37, 2, 64, 5), 2)]
    for shape, dim in shapes:
        for pattern in (Pattern("2:8"), Pattern("5:16@4"), Pattern("1:4@16"), Pattern("15:16@3")):
            if pattern.panel > 1 and dim == 0:
                continue
            for kind in KINDS:
                w = weight(shape, kind, dtype)
                compiled, finite = select(w, pattern, dim)
                with monkeypatch.context() as patch:
                    patch.setattr(native, "available", lambda: False)
                    plain, also = select(w, pattern, dim)
                assert torch.equal(compiled, plain), (shape, str(pattern), kind)
                assert bool(finite)
                assert bool(also)


def test_panels_run_along_axis_0_only() -> None:
    w = torch.ones(8, 4)
    with pytest.raises(PatternError, match="panel is 2"):
        native_masks.project(w, 1, 4, 0.0, dim=0, panel=2)
    with pytest.raises(PatternError, match="panel is 0"):
        native_masks.project(w, 1, 4, 0.0, panel=0)
    with pytest.raises(PatternError, match="dim is 2"):
        native_masks.project(w, 1, 4, 0.0, dim=2)
