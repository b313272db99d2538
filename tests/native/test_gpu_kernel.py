"""The GPU's mask kernel: on a GPU where there is one, else in Triton's interpreter ."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from nmflow.pattern import Pattern

pytest.importorskip("triton", reason="Triton is not installed")

from nmflow.masks import Job, Launch, launches_of
from nmflow.masks import triton as gpu

THERE = torch.cuda.is_available()
if not THERE and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
DEVICE = "cuda" if THERE else "cpu"
# The interpreter cuts a float32 to bfloat16 where a GPU rounds it: there the products are exact.
FADED = 0.3 if THERE else 0.25
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = ["1:4", "2:4", "3:4", "4:4", "1:3", "3:6", "1:16", "4:32", "16:256", "1:256", "5:48"]


def weight(shape: tuple[int, ...], dtype: torch.dtype, ties: str = "few", seed: int = 0) -> Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if ties == "many":
        w = (2 * w).round() / 2
    elif ties == "all":
        w = w.sign()
    elif ties == "tiny":  # subnormal in every dtype
        w = w * torch.finfo(dtype).smallest_normal / 8
    return w.to(dtype).to(DEVICE)


def expected(w: Tensor, pattern: Pattern, dim: int) -> Tensor:
    return reference.keep(w, pattern.n, pattern.m, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ties", ["few", "many", "all", "tiny"])
@pytest.mark.parametrize("spec", PATTERNS)
def test_mask_and_projection(spec: str, ties: str, dtype: torch.dtype) -> None:
    if ties == "tiny" and dtype == torch.bfloat16 and not THERE:
        pytest.skip("Triton's interpreter has no subnormal bfloat16")
    pattern = Pattern(spec)
    w = weight((7, 2 * pattern.m if pattern.m > 32 else 24 * pattern.m), dtype, ties)
    mask, out = torch.empty_like(w, dtype=torch.bool), torch.empty_like(w)
    assert bool(gpu.project(w, pattern, 1, FADED, mask=mask, out=out))
    kept = expected(w, pattern, 1)
    assert torch.equal(mask, kept)
    assert torch.equal(out, torch.where(kept, w, w * FADED))
    gpu.project(w, pattern, 1, 0.0, out=out)
    assert torch.equal(out, torch.where(kept, w, 0.0))
    assert not torch.signbit(out[~kept]).any()


SHAPES = {
    "rows": ((9, 48), 1, None),
    "columns": ((48, 9), 0, None),
    "conv": ((5, 48, 3, 3), 1, None),
    "conv, outputs": ((48, 5, 3, 3), 0, None),
    "channels last": ((5, 48, 3, 3), 1, torch.channels_last),
    "channels last, outputs": ((48, 5, 3, 3), 0, torch.channels_last),
    "conv3d": ((3, 48, 2, 1, 5), 1, None),
    "one group": ((1, 48), 1, None),
    "many groups": ((33, 1440), 1, None),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", ["1:4", "2:4", "1:16", "3:48", "1:1"])
def test_axes(shape: str, spec: str) -> None:
    size, dim, form = SHAPES[shape]
    w = weight(size, torch.float32, "many")
    w = w if form is None else w.contiguous(memory_format=form)
    pattern = Pattern(spec)
    mask, out = torch.empty_like(w, dtype=torch.bool), torch.full_like(w, 7.0)
    assert bool(gpu.project(w, pattern, dim, 0.5, mask=mask, out=out))
    kept = expected(w, pattern, dim)
    assert torch.equal(mask, kept)
    assert torch.equal(out, torch.where(kept, w, w * 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["1:4", "2:4", "4:4"])
def test_gradients(spec: str, dtype: torch.dtype) -> None:
    """`values` in place, as a rule on a gradient has it; and SR-STE's term under a loss scale."""
    w, g = weight((8, 64), dtype), weight((8, 64), dtype, seed=1)
    pattern = Pattern(spec)
    kept = expected(w, pattern, 1)
    out = g.clone()
    gpu.project(w, pattern, 1, 0.25, out=out, values=out)
    assert torch.equal(out, torch.where(kept, g, g * 0.25))
    out, scale = g.clone(), torch.tensor(8.0, device=DEVICE)
    gpu.project(w, pattern, 1, 1.0, out=out, values=out, pull=0.5, scale=scale)
    term = torch.where(kept, 0.0, 4.0 * w.float())
    torch.testing.assert_close(out, (g.float() + term).to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["1:4", "2:4", "1:1"])
def test_what_is_not_finite_is_found(spec: str, dtype: torch.dtype, value: float) -> None:
    for at in (0, 1234, 2047):
        w = weight((32, 64), dtype)
        w.view(-1)[at] = value
        assert not bool(gpu.project(w, Pattern(spec), 1, out=torch.empty_like(w)))
    largest = torch.full((4, 8), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    assert bool(gpu.project(largest, Pattern(spec), 1, out=torch.empty_like(largest)))


@settings(max_examples=12 if THERE else 40)  # a GPU compiles each pattern
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    outer=st.integers(1, 5),
    groups=st.integers(1, 6),
    inner=st.sampled_from([1, 1, 2, 9, 17]),
    levels=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_any_pattern_any_axis(
    m: int, n: int, outer: int, groups: int, inner: int, levels: int, seed: int
) -> None:
    pattern = Pattern(f"{min(n, m)}:{m}")
    draw = torch.Generator().manual_seed(seed)
    w = torch.randint(-levels, levels + 1, (outer, groups * m, inner), generator=draw)
    w = w.float().to(DEVICE)
    mask = torch.empty_like(w, dtype=torch.bool)
    gpu.project(w, pattern, 1, mask=mask)
    assert torch.equal(mask, expected(w, pattern, 1))


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: torch.randn(4, 8).double(), "float64"),
        (lambda: torch.randn(8, 4).t(), "not in the order of its memory"),
        (lambda: torch.empty(0, 8), "empty"),
    ],
)
def test_what_it_leaves_to_torch(made: Callable[[], Any], why: str) -> None:
    assert not gpu.serves(made().to(DEVICE), Pattern("1:4")), why
    assert not gpu.serves(torch.randn(4, 8, device=DEVICE), Pattern("1:4@2"))
    assert gpu.serves(torch.randn(4, 8, device=DEVICE), Pattern("1:4")) == THERE


@pytest.mark.parametrize("trouble", ["no Triton", "no C compiler", "no such GPU"])
def test_without_triton_torch_serves_and_says_so_once(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if trouble == "no Triton":
        monkeypatch.setitem(sys.modules, "nmflow.masks.triton_kernel", None)
        monkeypatch.delattr("nmflow.masks.triton_kernel", raising=False)
    else:
        from triton.errors import TritonError

        kind = RuntimeError if trouble == "no C compiler" else TritonError

        def project(*args: Any, **kwargs: Any) -> None:
            raise kind(trouble)

        monkeypatch.setattr(gpu, "project", project)
    gpu._why_not.cache_clear()
    try:
        for _ in range(2):
            assert gpu.why_not()
        (said,) = [r.getMessage() for r in caplog.records]
        assert "Triton does not work here" in said
        assert trouble == "no Triton" or trouble in said
    finally:
        gpu._why_not.cache_clear()


def test_what_fails_in_a_capture_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu._why_not.cache_clear()
    try:
        with monkeypatch.context() as captured:
            for name in ("is_initialized", "is_current_stream_capturing"):
                captured.setattr(torch.cuda, name, lambda: True)
            captured.setattr(gpu, "project", _not_permitted)
            assert "not permitted when stream is capturing" in gpu.why_not()
        assert gpu.why_not() == ""
    finally:
        gpu._why_not.cache_clear()


def _not_permitted(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")


# --- many weights in one launch -------------------------------------------------------------------


def _jobs(dtype: torch.dtype) -> list[Job]:
    """Weights that are cut in several ways; five of them in one, which share a launch."""
    shapes = [
        ((9, 48), 1, "1:16"), ((33, 1440), 1, "1:16"), ((4, 16), 1, "1:16"), ((7, 96), 1, "1:16"),
        ((2, 3, 64), 2, "1:16"), ((48, 9), 0, "1:16"), ((96, 9), 0, "1:16"), ((9, 48), 1, "2:4"),
        ((8, 64), 1, "2:4"), ((8, 64), 1, "4:4"),
    ]  # fmt: skip
    return [
        Job(weight(size, dtype, "many", i), Pattern(spec), dim)
        for i, (size, dim, spec) in enumerate(shapes)
    ]


def _at(launch: Launch, tensors: list[Tensor]) -> list[int]:
    return [tensors[i].data_ptr() for i in launch.members]


def _number(value: float, on_device: bool) -> float | Tensor:
    return torch.tensor(value, device=DEVICE) if on_device else value


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_weights_are_written_as_one_by_one(dtype: torch.dtype, on_device: bool) -> None:
    jobs = _jobs(dtype)
    outs = [torch.full_like(job.w, 7.0) for job in jobs]
    made = launches_of(jobs)
    assert len(made) == 4
    for launch in made:
        assert bool(launch(_at(launch, outs), delta=_number(0.25, on_device)))
    for job, out in zip(jobs, outs, strict=True):
        want = torch.empty_like(job.w)
        gpu.project(job.w, job.pattern, job.dim, 0.25, out=want)
        assert torch.equal(out, want)
    assert launches_of([]) == []


@pytest.mark.parametrize("held", [False, True])
def test_many_gradients_in_place_under_a_loss_scale(held: bool) -> None:
    scale, pattern = torch.tensor(8.0, device=DEVICE), Pattern("1:4")
    ws = [weight((8, 64), torch.float32, seed=seed) for seed in range(3)]
    gs = [weight((8, 64), torch.float32, seed=9 + seed) for seed in range(3)]
    masks = [expected(w, pattern, 1) for w in ws]
    jobs = [Job(w, pattern, 1, m if held else None) for w, m in zip(ws, masks, strict=True)]
    want = [g.clone() for g in gs]
    for w, out in zip(ws, want, strict=True):
        gpu.project(w, pattern, 1, 1.0, out=out, values=out, pull=0.5, scale=scale)
    (launch,) = launches_of(jobs)
    at = _at(launch, gs)
    assert bool(launch(at, at, delta=1.0, pull=0.5, scale=scale))
    for g, out in zip(gs, want, strict=True):
        assert torch.equal(g, out)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_weights_by_masks_that_are_held(dtype: torch.dtype, on_device: bool) -> None:
    """Any mask at all, of any shape: weights, then gradients in place, then the pull."""
    sizes = [(9, 48), (33, 1440), (5,), (2, 3, 7)]
    ws = [weight(size, dtype, seed=i) for i, size in enumerate(sizes)]
    masks = [weight(w.shape, torch.float32, seed=50) > 0.3 for w in ws]
    gs = [weight(w.shape, dtype, seed=70) for w in ws]
    outs = [torch.full_like(w, 7.0) for w in ws]
    (launch,) = launches_of([Job(w, Pattern("1:4"), 0, m) for w, m in zip(ws, masks, strict=True)])
    delta, zero = _number(0.25, on_device), _number(0.0, on_device)
    assert bool(launch(_at(launch, outs), delta=delta))
    for w, m, out in zip(ws, masks, outs, strict=True):
        assert torch.equal(out, torch.where(m, w, w * 0.25))
    before, at = [g.clone() for g in gs], _at(launch, gs)
    launch(at, at, delta=zero)
    for g, m, b in zip(gs, masks, before, strict=True):
        assert torch.equal(g, torch.where(m, b, 0.0))
        assert not torch.signbit(g[~m]).any()
    want = [torch.where(m, w, (w.float() * 0.5).to(dtype)) for w, m in zip(ws, masks, strict=True)]
    launch(delta=1.0, pull=-1.0, scale=torch.tensor(0.5, device=DEVICE))
    for w, out in zip(ws, want, strict=True):
        assert torch.equal(w, out)
    ws[1].view(-1)[40_000] = float("nan")
    assert not bool(launch(_at(launch, outs)))


def test_one_of_many_that_is_not_finite_is_found() -> None:
    jobs = _jobs(torch.float32)
    jobs[1].w.view(-1)[40_000] = float("inf")
    outs = [torch.empty_like(job.w) for job in jobs]
    flags = [bool(launch(_at(launch, outs))) for launch in launches_of(jobs)]
    assert flags == [False, True, True, True]


def test_addresses_that_changed_are_read_anew() -> None:
    """Odd addresses too, which lose nothing but speed; and more of them than tables are kept."""
    ws = [weight((8, 64), torch.float32, seed=seed) for seed in range(2)]
    (launch,) = launches_of([Job(w, Pattern("1:8"), 1) for w in ws])
    for shift in [0, 1, 3, 0, *range(12)]:
        outs = [torch.empty(8 * 64 + shift, device=DEVICE)[shift:].view(8, 64) for _ in ws]
        launch(_at(launch, outs))
        for w, out in zip(ws, outs, strict=True):
            assert torch.equal(out, torch.where(expected(w, Pattern("1:8"), 1), w, 0.0))
