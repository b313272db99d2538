"""The kernels and ops of training on kept places, against plain torch in double precision."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import nmflow
from nmflow import native
from nmflow.errors import CompressError
from nmflow.kernels import cpu_steps, reference, step_ops
from nmflow.kernels.layout import Shape
from nmflow.kernels.step_ops import kept_linear
from nmflow.masks.kept_values import to_bits

pytestmark = pytest.mark.skipif(
    not native.available() or native.isa() == "portable", reason="no kernels without AVX2"
)

# Rows, inputs, pattern, tokens: whole tiles and spans or not, spans of 15, 14 and 12 inputs, one
# entry or several a span, panels with codes of their own and shared ones, last panels that are
# smaller, one token, and a block of 64 of them more or less one; several blocks of 192 rows; dw
# past 4 MB.
TABLE = [
    (32, 16, "1:4", 5), (4, 32, "1:4", 1), (17, 24, "1:8", 33), (50, 48, "2:4", 65),
    (33, 15, "2:5", 20), (40, 63, "3:7", 129), (21, 36, "1:3", 12), (8, 16, "5:16", 64),
    (20, 64, "1:8@4", 50), (23, 32, "1:4@3", 63), (200, 768, "1:16", 49), (400, 32, "2:16", 70),
    (16, 1600, "1:16", 40), (64, 64, "1:16@16", 100), (72, 96, "2:8@16", 30),
    (128, 192, "1:32@32", 64), (192, 256, "1:16@64", 130), (40, 128, "2:64@48", 10),
    (100, 512, "1:256@32", 17), (1100, 1024, "1:16", 3),
    (33, 64, "1:32", 65), (200, 768, "1:64", 49), (50, 256, "1:128", 1), (48, 512, "3:256", 130),
    (70, 60, "2:20", 33), (21, 96, "5:24@3", 64), (40, 1600, "2:32", 40), (400, 96, "1:32@8", 95),
    (520, 2048, "1:32", 7), (17, 34, "1:17", 12),
]  # fmt: skip


@pytest.fixture(params=["avx2", "avx512"])
def isa(request):
    before = native.isa()
    if native.set_isa(request.param) != request.param:
        native.set_isa(before)
        pytest.skip(f"this machine has no {request.param}")
    yield
    native.set_isa(before)


def made(out: int, inputs: int, pattern: str) -> Any:
    """W̃, its mask and its shape."""
    w = torch.randn(out, inputs)
    kept = nmflow.mask(w, pattern)
    return w * kept, kept, Shape.of(out, inputs, pattern)


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6 * float(want.abs().max()))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("out", "inputs", "pattern", "tokens"), TABLE)
def test_products_are_those_of_the_dense_weight(out, inputs, pattern, tokens, threads):
    torch.set_num_threads(threads)
    w, kept, shape = made(out, inputs, pattern)
    assert cpu_steps.why_not(shape) == ""
    values, codes, fits = cpu_steps.pack(w, None, shape)
    assert fits
    assert torch.equal(reference.dense(values, codes, shape), w)  # which checks every code
    by_mask = cpu_steps.pack(w, to_bits(kept), shape)
    assert torch.equal(values, by_mask[0])
    assert torch.equal(codes, by_mask[1])
    x, dy, bias = torch.randn(tokens, inputs), torch.randn(tokens, out), torch.randn(out)
    one, two = w.double(), (x.double(), dy.double())
    near(cpu_steps.forward(x, values, codes, bias, shape), F.linear(two[0], one, bias.double()))
    near(cpu_steps.input_grad(dy, values, codes, shape), two[1] @ one)
    dw, db = cpu_steps.weight_grad(x, dy, values, codes, shape, True)
    near(dw, two[1].t() @ two[0] * kept)
    assert not dw[~kept].any()
    assert db is not None
    near(db, two[1].sum(0))
    again, none = cpu_steps.weight_grad(x, dy, values, codes, shape, False)
    assert none is None
    torch.set_num_threads(3 - threads)  # the sums of a place have one order
    assert torch.equal(again, cpu_steps.weight_grad(x, dy, values, codes, shape, False)[0])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("pattern", ["2:4", "2:8@4", "3:8@16", "1:3", "3:24", "2:48"])
def test_packing_fills_up_with_the_lowest_and_takes_the_mask_where_it_is_given(pattern):
    w, kept, shape = made(34, 48, pattern)
    gone = torch.rand(w.shape) < 0.4
    thin = w * ~gone
    values, codes, fits = cpu_steps.pack(thin, to_bits(kept), shape)
    assert fits
    ones = reference.dense(torch.ones_like(values), codes, shape)
    assert torch.equal(ones != 0, kept)  # places that hold 0 too
    assert torch.equal(reference.dense(values, codes, shape), thin)
    values, codes, fits = cpu_steps.pack(thin, None, shape)
    assert fits
    places = reference.dense(torch.ones_like(values), codes, shape)
    want = nmflow.mask(thin, pattern)  # whose ties are settled to the lowest too
    assert torch.equal(places != 0, want)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("pattern", ["1:8", "2:16@16", "1:4@4", "1:32"])
def test_a_group_that_keeps_too_many_is_told(pattern):
    w, kept, shape = made(64, 32, pattern)
    w[63, 8:][w[63, 8:] == 0] = 1.0
    values, codes, fits = cpu_steps.pack(w, to_bits(kept), shape)
    assert not fits
    assert not values.any()
    assert not codes.any()


def test_who_has_no_kernel_is_told_why():
    before = native.isa()
    native.set_isa("portable")
    try:
        assert "AVX2" in cpu_steps.why_not(Shape.of(64, 64, "1:16"))
        w, kept, _ = made(64, 64, "1:16")
        step_ops._served.cache_clear()
        _same_as_dense(torch.randn(5, 64), w, None, torch.ones_like(kept), (1, 16, 1))
    finally:
        native.set_isa(before)


def _same_as_dense(x, w, bias, kept, pattern, held=None):
    """The op, forward and backward, beside `F.linear` with its gradient at `kept` alone."""
    leaves = [[t.clone().requires_grad_() for t in (x, w)] for _ in range(2)]
    biases: list[Any] = [None if bias is None else bias.clone().requires_grad_() for _ in range(2)]
    y = kept_linear(leaves[0][0], leaves[0][1], biases[0], held, *pattern)
    want = F.linear(leaves[1][0], leaves[1][1], biases[1])
    for out in (y, want):
        (out.sin() * out).sum().backward()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaves[0][0].grad, leaves[1][0].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaves[0][1].grad, leaves[1][1].grad * kept, rtol=1e-4, atol=1e-4)
    if bias is not None:
        torch.testing.assert_close(biases[0].grad, biases[1].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("m", [8, 32])
def test_the_op_is_linear_with_the_gradient_of_kept_places(m):
    w, kept, _ = made(32, 64, f"1:{m}")
    bias = torch.randn(32)
    for x in (torch.randn(64), torch.randn(3, 5, 64), torch.randn(64, 7).t(), torch.randn(0, 64)):
        _same_as_dense(x, w, bias, kept, (1, m, 1))
        for held in (kept, to_bits(kept)):
            _same_as_dense(x, w, None, kept, (1, m, 1), held)
    _same_as_dense(torch.randn(3, 64), w.t().contiguous().t(), bias, kept, (1, m, 1))
    with torch.no_grad():
        y = kept_linear(torch.ones(2, 64), w, bias, None, 1, m, 1)
    torch.testing.assert_close(y, F.linear(torch.ones(2, 64), w, bias))
    frozen = kept_linear(torch.ones(2, 64, requires_grad=True), w, bias, None, 1, m, 1)
    frozen.sum().backward()


def test_what_does_not_fit_is_computed_dense_with_all_of_its_gradient():
    w, bias = torch.randn(32, 64), torch.randn(32)
    _same_as_dense(torch.randn(3, 64), w, bias, torch.ones(32, 64, dtype=torch.bool), (1, 8, 1))
    double = torch.randn(5, 64, dtype=torch.double)
    assert torch.equal(
        kept_linear(double, w.double(), None, None, 1, 8, 1), F.linear(double, w.double())
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": torch.ones(2, 63)}, "x has 63 features"),
        ({"x": torch.ones(())}, "x has no axis"),
        ({"bias": torch.ones(15)}, r"bias is \(15,\) on cpu.*takes \(16,\)"),
        ({"bias": torch.ones(1, 16)}, r"bias is \(1, 16\)"),
        ({"kept": torch.ones(16, 4).bool()}, r"kept is \(16, 8\).*takes \(16, 16\) bytes of bits"),
        ({"kept": torch.ones(8, 128).bool()}, r"kept is \(8, 16\)"),
        ({"weight": torch.ones(128)}, "the weight has 1 axes"),
    ],
)
def test_what_a_kernel_would_read_past_is_refused(changed, said):
    given = {"x": torch.ones(2, 128), "weight": torch.ones(16, 128), "bias": None, "kept": None}
    with pytest.raises(CompressError, match=said):
        kept_linear(**(given | changed), n=1, m=8, panel=1)


def test_a_call_that_no_kernel_serves_is_that_of_autocast():
    """A float32 weight is rounded to the dtype of x, and has a gradient of its own dtype."""
    w, bias = torch.randn(3, 16).requires_grad_(), torch.randn(3)
    x = torch.randn(5, 16).half()  # which no kernel of a CPU takes
    y = kept_linear(x, w, bias, None, 1, 16, 1)
    assert torch.equal(y, F.linear(x, w.half(), bias.half()))
    y.sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize("fits", [True, False])
def test_opcheck_and_second_derivatives(fits):
    w, kept, _ = made(32, 64, "1:8")
    w = w if fits else torch.randn(32, 64)
    x, bias = torch.randn(3, 64), torch.randn(32)
    leaves: Any = [t.requires_grad_() for t in (x, w, bias)]
    torch.library.opcheck(
        torch.ops.nmflow.kept_linear, (*leaves, to_bits(kept) if fits else None, 1, 8, 1)
    )
    found = []
    for sparse in (True, False):
        if sparse:
            y = kept_linear(*leaves, None, 1, 8, 1)
        else:  # what it is where the kept places are constants
            places = kept.float() if fits else torch.ones_like(w)
            y = F.linear(x, w * places, bias)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = torch.autograd.grad((y.sin() * y).sum(), leaves, create_graph=True)
            penalty = torch.stack([(g * g).sum() for g in first]).sum()
            found.append((*first, *torch.autograd.grad(penalty, leaves)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


def test_a_compiled_call_runs_the_same_kernels():
    w, _, _ = made(32, 64, "1:8")
    leaves: Any = [t.requires_grad_() for t in (torch.randn(3, 64), w)]

    def step(x, w):
        return kept_linear(x, w, None, None, 1, 8, 1).relu().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    one, other = (torch.autograd.grad(f(*leaves), leaves) for f in (step, compiled))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
