"""The kernel for masks that are held, against plain torch: bytes, fingerprints, refusals."""

import pytest
import torch

from nmflow import native
from nmflow.errors import WeightError
from nmflow.flow import gradients
from nmflow.flow.marks import blank, fingerprint
from nmflow.masks import hold, project
from nmflow.masks import native as native_masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of words of 8, 4 and 2 bytes; pieces of 1,024 cut short and not; more than 4 MB.
SHAPES = ((1, 1), (3, 5), (7, 6), (4, 1023), (5, 2052), (3, 4, 6), (33, 64), (1100, 2050))

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())


@pytest.fixture(params=("portable", "avx2", "avx512"))
def isa(request):
    before = native.isa()
    if native.set_isa(request.param) != request.param:
        native.set_isa(before)
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_it_writes_is_what_torch_writes(isa, shape, dtype):
    torch.manual_seed(0)
    w, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    kept = torch.rand(shape) < 0.3
    for delta in (0.0, 0.25, 1.0):
        out, prints = torch.empty_like(w), blank(w)
        assert bool(hold(w, kept, out, delta=delta, prints=prints))
        assert torch.equal(out, project(w, kept, None, delta))
        assert torch.equal(prints[1], fingerprint(out))
    assert not torch.signbit(project(w, kept)[~kept]).any()
    changed = g.clone()
    gradients.masked(changed, kept, None, 0.25)
    assert torch.equal(changed, torch.where(kept, g, (g.float() * 0.25).to(dtype)))
    changed = g.clone()
    gradients.refined(changed, w, kept, 0.125, torch.tensor(2.0))
    pulled = (g.double() + 0.25 * w.double()).float().to(dtype)
    torch.testing.assert_close(changed, torch.where(kept, g, pulled))
    assert torch.equal(changed[kept], g[kept])
    drawn = w.clone()
    gradients.drawn(drawn, project(w, kept, None, 0.5), 0.5, 0.5, kept, 0.5)
    torch.testing.assert_close(drawn, torch.where(kept, w, w * 0.875))
    assert torch.equal(drawn[kept], w[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_not_finite_is_told_wherever_it_is(isa, dtype, threads):
    torch.set_num_threads(threads)
    for shape in ((3, 5), (70, 2050)):
        for place in (0, 7, shape[0] * shape[1] - 1):
            for value in (float("nan"), float("inf"), -float("inf")):
                w = torch.randn(shape).to(dtype)
                kept = torch.rand(shape) < 0.5
                assert native_masks.hold(w, kept, 0.5, torch.empty_like(w))
                w.view(-1)[place] = value
                assert not native_masks.hold(w, kept, 0.5, torch.empty_like(w))
    torch.set_num_threads(1)


def test_refusals():
    w, kept = torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool)
    for wrong in (torch.empty(4, 4), torch.empty(4, 8).double(), torch.empty(8, 4).T):
        with pytest.raises(WeightError, match="out"):
            native_masks.hold(w, kept, 0.0, wrong)
    with pytest.raises(WeightError, match="mask"):
        native_masks.hold(w, kept.byte(), 0.0, w)
    with pytest.raises(WeightError, match="together"):
        native_masks.hold(w, kept, 0.0, w, odd=torch.ones(4, dtype=torch.int64))
    with pytest.raises(WeightError, match="float64"):
        native_masks.hold(w.double(), kept, 0.0, w.double())
    assert native_masks.hold(w[:0], kept[:0], 0.0, w[:0])


def test_without_the_library_it_is_the_same(monkeypatch):
    w, kept, fading = torch.randn(6, 8), torch.rand(6, 8) < 0.5, torch.rand(6, 8) < 0.5
    one, other = torch.empty_like(w), torch.empty_like(w)
    hold(w, kept, one, delta=0.5)
    monkeypatch.setattr(native, "available", lambda: False)
    hold(w, kept, other, delta=0.5)
    assert torch.equal(one, other)
    hold(w, kept, one, fading=fading, delta=0.5)
    assert torch.equal(one, project(w, kept, fading, 0.5))
