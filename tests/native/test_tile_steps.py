"""Training on kept places in bfloat16, on tiles and by conversion, beside plain torch."""

from __future__ import annotations

import pytest
import torch
from test_tiles import TILES, _use
from torch import nn
from torch.nn import functional as F

import nmflow
from nmflow import native
from nmflow.kernels import cpu_steps, reference, step_ops
from nmflow.kernels.layout import Shape
from nmflow.kernels.step_ops import kept_linear

# Rows, inputs, pattern, tokens: one tile of entries and several, over 64 entries of a panel; two
# panels of 16 rows that share the turning of dy, or one alone; pairs of tiles, whole and not; last
# panels that are smaller; blocks of 64 and of 128 tokens more or less one; an odd number of rows.
TABLE = [
    (16, 16, "1:16@16", 1), (32, 64, "1:4@16", 63), (48, 256, "1:16@16", 65),
    (37, 96, "2:8@16", 30), (128, 192, "1:32@32", 64), (72, 1040, "1:4@32", 129),
    (100, 512, "1:256@32", 17), (48, 128, "2:64@48", 127), (192, 256, "1:16@64", 130),
    (200, 80, "3:10@80", 257), (16, 1600, "1:16@16", 40),
]  # fmt: skip


@pytest.fixture(params=TILES)
def tiles(request):
    before = native.isa() if native.available() else ""
    if why := _use(request.param):
        pytest.skip(why)
    step_ops._halves.cache_clear()
    yield request.param
    native.emulate_tiles(False)
    native.set_isa(before)
    step_ops._halves.cache_clear()


def _made(out: int, inputs: int, pattern: str) -> tuple[torch.Tensor, torch.Tensor, Shape]:
    w = torch.randn(out, inputs)
    kept = nmflow.mask(w, pattern)
    return w * kept, kept, Shape.of(out, inputs, pattern)


def _near(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor, rounding: float) -> None:
    """Within a share of the sum of magnitudes."""
    assert float(((got.double() - want).abs() / (scale + 1e-30)).max()) <= rounding


@pytest.mark.parametrize(("out", "inputs", "pattern", "tokens"), TABLE)
def test_gradients_of_panels_are_those_of_the_dense_weight(tiles, out, inputs, pattern, tokens):
    w, kept, shape = _made(out, inputs, pattern)
    assert cpu_steps.halves(shape)
    values, codes, fits = cpu_steps.pack(w, None, shape)
    values = cpu_steps.halved(values, shape)
    assert fits
    assert torch.equal(reference.dense(values, codes, shape), w.bfloat16())
    x, dy = torch.randn(tokens, inputs).bfloat16(), torch.randn(tokens, out).bfloat16()
    one, rows, wide = w.bfloat16().double(), dy.double(), x.double()
    dx = cpu_steps.input_grad(dy, values, codes, shape)
    _near(dx, rows @ one, rows.abs() @ one.abs(), 2.0**-8)
    for threads in (1, 2):  # the sums of a place have one order
        torch.set_num_threads(threads)
        dw, db = cpu_steps.weight_grad(x, dy, values, codes, shape, True)
        assert dw.dtype == torch.float32
        _near(dw, rows.t() @ wide * kept, rows.abs().t() @ wide.abs(), 1e-5)
        assert not dw[~kept].any()
        assert db is not None
        _near(db, rows.sum(0), rows.abs().sum(0), 1e-5)
        assert torch.equal(cpu_steps.input_grad(dy, values, codes, shape), dx)
        if threads == 1:
            first = dw
    assert torch.equal(first, dw)


def test_what_nobody_keeps_and_tokens_that_are_not_there_stay_out(tiles):
    w, kept, shape = _made(40, 64, "1:8@16")
    values, codes, _ = cpu_steps.pack(w, None, shape)
    values = cpu_steps.halved(values, shape)
    x, dy = torch.randn(33, 64).bfloat16(), torch.randn(33, 40).bfloat16()
    x[:, ~kept.any(0)] = float("nan")
    dw, _ = cpu_steps.weight_grad(x, dy, values, codes, shape, False)
    assert bool(dw.isfinite().all())
    none = cpu_steps.weight_grad(x[:0], dy[:0], values, codes, shape, True)
    assert none[1] is not None
    assert not none[0].any()
    assert not none[1].any()
    assert cpu_steps.input_grad(dy[:0], values, codes, shape).shape == (0, 64)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["1:8", "1:32", "1:8@4", "1:16@16", "2:8@32", "1:16@64"])
def test_the_op_in_bfloat16_is_linear_with_the_gradient_of_kept_places(tiles, pattern, kind):
    """Rows by float32 kernels and panels by tiles, of weights of both dtypes, and dense ones."""
    p = nmflow.Pattern(pattern)
    w, kept, _ = _made(64, 128, pattern)
    w, bias = w.to(kind), torch.randn(64).to(kind)
    for weight, places in [(w, kept), (torch.randn(64, 128).to(kind), torch.ones_like(kept))]:
        x = torch.randn(3, 20, 128).bfloat16()
        leaves = [[t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2)]
        y = kept_linear(leaves[0][0], leaves[0][1], leaves[0][2], None, p.n, p.m, p.panel)
        want = F.linear(*(t.double() for t in leaves[1]))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=1e-1)
        dy = torch.randn(3, 20, 64).bfloat16()
        y.backward(dy)
        want.backward(dy.double())
        wanted = [torch.zeros(()) if t.grad is None else t.grad for t in leaves[1]]
        wanted[1] = wanted[1] * places
        for got, grad, like in zip(leaves[0], wanted, (x, weight, bias), strict=True):
            assert got.grad is not None
            assert got.grad.dtype == like.dtype
            torch.testing.assert_close(got.grad.double(), grad.double(), rtol=2e-2, atol=2e-1)


def test_opcheck_and_compiling_of_halves(tiles):
    w, kept, _ = _made(32, 64, "1:8@16")
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    held = nmflow.masks.kept_values.to_bits(kept)
    args = (x, w.requires_grad_(), torch.randn(32, requires_grad=True), held, 1, 8, 16)
    torch.library.opcheck(torch.ops.nmflow.kept_linear, args)


@pytest.mark.parametrize("pattern", ["1:8", "1:16@16"])
def test_layers_under_autocast_and_of_bfloat16_train_on_kept_places(tiles, pattern):
    """Beside the same run with dense products: losses within what bfloat16 rounds."""
    losses = {}
    for mode in ("off", "on"):
        for half in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            model = model.bfloat16() if half else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            recipe = nmflow.OneShot(dense=0)
            flow = nmflow.attach(
                model, optimizer, recipe, pattern, include="*", total_steps=10, sparse_steps=mode
            )
            x = torch.randn(40, 64)
            for _ in range(4):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=not half):
                    loss = (model(x.bfloat16() if half else x).float() - x).square().mean()
                loss.backward()
                optimizer.step()
            losses[mode, half] = loss.item()
            if mode == "on":
                assert [layer.sparse for layer in flow.explain().layers] == [True, True]
                grad = model[0].weight.grad
                assert grad is not None
                assert grad.dtype == (torch.bfloat16 if half else torch.float32)
    for half in (False, True):
        assert losses["on", half] == pytest.approx(losses["off", half], rel=2e-2)


def test_other_autocasts_are_dense_and_say_so(tiles):
    model = nn.Sequential(nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = nmflow.attach(
        model, optimizer, nmflow.OneShot(dense=0), "1:8", include="*", total_steps=9,
        sparse_steps="on",
    )  # fmt: skip
    with torch.autocast("cpu", torch.float16):
        model(torch.randn(4, 64)).sum().backward()
    assert "float16" in str(flow.explain())
