"""Packed layers under autocast take and give the dtypes that dense ones do."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmflow import mask
from nmflow.errors import CompressError
from nmflow.packed import compress, load, save
from nmflow.packed.modules import PackedLinear
from nmflow.packed.onednn import OneDNNLinear
from pruned import NETWORKS, prune

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEAR = {torch.float64: 1e-9, torch.float32: 3e-2, torch.bfloat16: 4e-2, torch.float16: 4e-2}


def same(got: Any, want: Any) -> None:
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=NEAR[b.dtype], rtol=NEAR[b.dtype])


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", FLOATS, ids=str)
@pytest.mark.parametrize("given", FLOATS, ids=str)
def test_a_layer_does_as_linear_does(
    given: torch.dtype, held: torch.dtype, to: torch.dtype
) -> None:
    w = torch.randn(24, 32)
    layer = nn.Linear(32, 24)
    layer.weight.data = w * mask(w, "1:8")
    packed = compress(nn.Sequential(copy.deepcopy(layer)), measure=False)[0].to(held)
    layer.to(held)
    x = (torch.randn(2, 5, 32) / 4).to(given)
    with torch.no_grad():
        for enabled in (True, False):
            with torch.autocast("cpu", to, enabled=enabled):
                try:
                    want = layer(x)
                except RuntimeError:
                    with pytest.raises(CompressError, match="convert one of them"):
                        packed(x)
                else:
                    same(packed(x), want)


@pytest.mark.parametrize("held", FLOATS[:3], ids=str)
def test_gradients_flow_as_in_a_dense_layer(held: torch.dtype) -> None:
    model = prune(nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8))).to(held)
    packed = compress(model, measure=False)
    grads = []
    start = torch.randn(4, 32)
    for net in (model, packed):
        x = start.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        y.float().square().sum().backward()
        grads.append((x.grad, net[0].bias.grad))
    assert [g.dtype for g in grads[0]] == [g.dtype for g in grads[1]]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, atol=0.15, rtol=0.1)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 8, 1)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


class Mixed(nn.Module):
    """Packed after dense, dense after packed, and a projection of several patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Linear(7, 32), nn.Linear(32, 96), nn.Linear(32, 5)
        self.norm = nn.LayerNorm(32)
        w = self.qkv.weight.data
        w[:32] *= mask(w[:32], "1:16")
        w[32:64] *= mask(w[32:64], "1:4")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(self.stem(x))).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


ALL: dict[str, tuple[Any, tuple[int, ...]]] = {
    "convolutions": (lambda: prune(Convs()), (2, 16, 6, 6)),
    "mixed": (lambda: Mixed().eval(), (2, 3, 7)),
    "fused": (
        lambda: prune(nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 16), nn.ReLU())),
        (5, 32),
    ),
    "encoder": (
        lambda: prune(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)), (2, 5, 32)
    ),
}  # fmt: skip


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_modules(name: str, to: torch.dtype) -> None:
    make, shape = ALL[name]
    model = make()
    packed = compress(model, measure=False)
    x = torch.randn(shape)
    with torch.autocast("cpu", to):
        # With gradients torch leaves its fused encoder, whose dtypes under autocast are its own.
        want = model(x.requires_grad_()).detach()
        with torch.no_grad():
            same(packed(x), want)


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("extras", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_attention(need: bool, masked: torch.dtype | None, extras: dict[str, bool]) -> None:
    model = prune(nn.MultiheadAttention(32, 4, batch_first=True, **extras))
    packed = compress(model, measure=False)
    x = torch.randn(2, 5, 32)
    where = None if masked is None else torch.ones(5, 5).triu(1).to(masked)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(x, x, x, attn_mask=where, need_weights=need)
        got = packed(x, x, x, attn_mask=where, need_weights=need)
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got[0], want[0], atol=4e-2, rtol=4e-2)
    assert (got[1] is None) == (want[1] is None)
    if want[1] is not None:
        torch.testing.assert_close(got[1].float(), want[1].float(), atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    make, inputs, at = NETWORKS[name]
    model = prune(make())
    packed = compress(model, measure=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same(packed(**inputs)[at], model(**inputs)[at])


def test_onednn_and_compiled_networks_and_exports(tmp_path: Any) -> None:
    layer = nn.Linear(32, 24)
    x = torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same(OneDNNLinear.of(layer, 3)(x), layer(x))
    model = prune(nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8)))
    packed = compress(model, measure=False)
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same(compiled(x), model(x))
    torch._dynamo.reset()
    save(packed, tmp_path)
    again = load(tmp_path, nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same(again(x), model(x))


def test_trainer_leaves_an_autocast_forward_behind() -> None:
    """As accelerate's `prepare_model` does with `mixed_precision="bf16"`."""
    from types import MethodType

    from accelerate.utils import convert_outputs_to_fp32

    model = cast(Any, prune(nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))))
    inner = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(convert_outputs_to_fp32(MethodType(inner, model).__func__), model)
    x = torch.randn(3, 32)
    with torch.no_grad():
        packed = compress(model, measure=False, example_inputs=x)
        same(packed(x), model(x))
        for layer in (model[0], model[2]):
            layer.weight.zero_()
        assert packed(x).abs().sum() > 0
    assert isinstance(packed[0], PackedLinear)
