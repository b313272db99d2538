"""Where the buffers of a packed layer lie, and how, never matters: it equals the dense layer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nmflow import mask
from nmflow.errors import CompressError
from nmflow.kernels import cpu, matmul
from nmflow.kernels.layout import Shape
from nmflow.packed.modules import PackedLinear
from nmflow.packed.onednn import OneDNNLinear
from nmflow.pattern import Pattern

# Largest error allowed, as a share of sum |x||w| + |b| of each output.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = [("1:16", 32, 64), ("1:12", 17, 36), ("2:4", 33, 36), ("1:16@16", 40, 64), ("4:32", 9, 64),
         ("1:2", 1, 2), ("3:7", 20, 21)]  # fmt: skip


@dataclass
class Pair:
    """A packed layer and the dense weight and bias that it must stand for."""

    layer: PackedLinear
    w: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> None:
        self.layer.to(dtype)
        self.w = self.w.to(dtype)
        self.bias = None if self.bias is None else self.bias.to(dtype)


def pair(size: tuple[Any, ...], dtype: torch.dtype, bias: bool) -> Pair:
    pattern, out, inputs = size
    w = torch.randn(out, inputs).to(dtype)
    w = torch.where(mask(w, pattern), w, torch.zeros((), dtype=dtype))
    b = torch.randn(out).to(dtype) if bias else None
    return Pair(PackedLinear.pack(w, pattern, None if b is None else nn.Parameter(b)), w, b)


def agrees(got: Tensor, x: Tensor, p: Pair) -> None:
    x64, w = x.detach().double(), p.w.double()
    b = torch.zeros(len(w), dtype=torch.float64) if p.bias is None else p.bias.double()
    want, scale = F.linear(x64, w, b), F.linear(x64.abs(), w.abs(), b.abs()) + 1e-6
    assert got.shape == want.shape
    assert got.dtype == x.dtype
    assert (
        not want.numel() or float(((got.detach() - want).abs() / scale).max()) <= TOLERANCE[x.dtype]
    )


def _buffers(p: Pair, change: Callable[[Tensor], Tensor]) -> None:
    p.layer.values, p.layer.codes = change(p.layer.values), change(p.layer.codes)


def _transposed(t: Tensor) -> Tensor:
    """The same elements, the last axis outermost in memory."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _spread(t: Tensor) -> Tensor:
    """Every second element of a wider tensor, from an offset on."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), 77, dtype=t.dtype)
    wide[..., 3::2] = t
    return wide[..., 3::2]


def _offset(t: Tensor) -> Tensor:
    wide = torch.full((t.numel() + 5,), 77, dtype=t.dtype)
    wide[5:] = t.reshape(-1)
    return wide[5:].view(t.shape)


def _misaligned(t: Tensor) -> Tensor:
    """The same bytes, one further than their size allows."""
    data = bytearray(1) + t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(data, dtype=t.dtype, count=t.numel(), offset=1).view(t.shape)


def _saved(p: Pair, assign: bool) -> None:
    state = {k: v.clone() for k, v in p.layer.state_dict().items()}
    if assign:
        state["values"], state["codes"] = _transposed(state["values"]), _spread(state["codes"])
    other = pair((str(p.layer.pattern), *p.w.shape), p.w.dtype, p.bias is not None)
    other.layer(torch.randn(2, p.w.shape[1]).to(p.w.dtype))  # so that its old addresses are known
    other.layer.load_state_dict(state, assign=assign)
    p.layer = other.layer


def _whole(p: Pair) -> None:
    file = io.BytesIO()
    torch.save(p.layer, file)
    file.seek(0)
    p.layer = torch.load(file, weights_only=False)


def _away(p: Pair) -> None:
    state = copy.deepcopy(p.layer.state_dict())
    p.layer.to("meta").to_empty(device="cpu").load_state_dict(state)


def _negated(p: Pair) -> None:
    p.layer.values.neg_()
    p.w = -p.w


def _doubled(p: Pair) -> None:
    p.layer.values.data.mul_(2)
    p.w = p.w * 2


def _copied_into(p: Pair) -> None:
    other = pair((str(p.layer.pattern), *p.w.shape), p.w.dtype, False)
    p.layer.values.copy_(other.layer.values)
    p.layer.codes.copy_(other.layer.codes)
    p.w = other.w


def _replaced(p: Pair) -> None:
    """Other buffers at the old addresses' place, or wherever the allocator puts them."""
    other = pair((str(p.layer.pattern), *p.w.shape), p.w.dtype, False)
    p.layer.values = p.layer.codes = torch.empty(0)
    p.layer.values, p.layer.codes = other.layer.values.clone(), other.layer.codes.clone()
    p.w = other.w


def _round_trip(dtype: torch.dtype) -> Callable[[Pair], None]:
    def go(p: Pair) -> None:
        before = p.w.dtype
        p.to(dtype)
        p.to(before)

    return go


def _inference(p: Pair) -> None:
    with torch.inference_mode():
        p.layer.to(torch.float64).to(p.w.dtype)


CHANGES: dict[str, Callable[[Pair], None]] = {
    "channels last": lambda p: p.layer.to(memory_format=torch.channels_last) and None,  # pyright: ignore
    "buffers channels last": lambda p: _buffers(
        p, lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
    "transposed": lambda p: _buffers(p, _transposed),
    "spread": lambda p: _buffers(p, _spread),
    "offset": lambda p: _buffers(p, _offset),
    "misaligned": lambda p: _buffers(p, _misaligned),
    "half": lambda p: p.to(torch.float16),
    "bfloat16": lambda p: p.to(torch.bfloat16),
    "float": lambda p: p.to(torch.float32),
    "double": lambda p: p.to(torch.float64),
    "there and back": _round_trip(torch.float64),
    "meta and back": _away,
    "shared": lambda p: p.layer.share_memory() and None,
    "deepcopy": lambda p: setattr(p, "layer", copy.deepcopy(p.layer)),
    "pickle": lambda p: setattr(p, "layer", pickle.loads(pickle.dumps(p.layer))),
    "saved whole": _whole,
    "state": lambda p: _saved(p, False),
    "state assigned": lambda p: _saved(p, True),
    "written": _negated,
    "written by data": _doubled,
    "copied into": _copied_into,
    "replaced": _replaced,
    "inference": _inference,
}

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "columns": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "rows": lambda x: x[::2],
    "expanded": lambda x: x[:1].expand(5, -1),
    "expanded 3-D": lambda x: x.expand(2, *x.shape),
    "overlapping": lambda x: x.reshape(-1).as_strided((3, x.shape[1]), (1, 1)),
    "constant": lambda x: x[:, :1].expand(-1, x.shape[1]),
    "offset": lambda x: _offset(x),
    "misaligned": _misaligned,
    "one row": lambda x: x[0],
    "channels last": lambda x: x.expand(2, 3, *x.shape).contiguous(
        memory_format=torch.channels_last
    ),
    "no tokens": lambda x: x[:0],
    "no batch": lambda x: x.new_empty(2, 0, x.shape[1]),
    "gradient": lambda x: x.detach().clone().requires_grad_(),
    "inference": lambda x: _inferred(x),
}


def _inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


@given(
    st.sampled_from(SIZES),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=4),
    st.sampled_from(sorted(INPUTS)),
    st.integers(0, 99),
)
def test_layouts_and_addresses_never_matter(
    size: tuple[str, int, int], dtype: torch.dtype, bias: bool, changes: list[str], given: str,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    p = pair(size, dtype, bias)
    for change in changes:
        CHANGES[change](p)
        base = torch.randn(7, size[2]).to(p.w.dtype)
        x = INPUTS[given](base)
        agrees(p.layer(x), x, p)
        assert torch.equal(p.layer.dense(), p.w)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_after_a_call(change: str, dtype: torch.dtype) -> None:
    p = pair(("1:16", 32, 64), dtype, True)
    x = torch.randn(3, 64).to(dtype)
    agrees(p.layer(x), x, p)
    CHANGES[change](p)
    x = x.to(p.w.dtype)
    agrees(p.layer(x), x, p)
    loss = p.layer(x.clone().requires_grad_()).square().sum()
    assert torch.isfinite(torch.autograd.grad(loss, p.layer.bias)[0]).all()  # pyright: ignore


@given(st.sampled_from(sorted(INPUTS.keys() - {"misaligned"})), st.sampled_from(list(TOLERANCE)))
def test_gradients_for_inputs_of_any_layout(given: str, dtype: torch.dtype) -> None:
    p = pair(("2:4", 33, 36), dtype, True)
    base = torch.randn(7, 36).to(dtype).requires_grad_()
    bias = nn.Parameter(p.bias.clone())  # pyright: ignore[reportOptionalMemberAccess]
    p.layer(INPUTS[given](base)).sum().backward()
    got, base.grad = base.grad, None
    F.linear(INPUTS[given](base), p.w, bias).sum().backward()
    torch.testing.assert_close(p.layer.bias.grad, bias.grad, atol=3e-2, rtol=3e-2)  # pyright: ignore
    if got is None or base.grad is None:  # "gradient" starts anew, and so do copies
        assert got is base.grad
    else:
        torch.testing.assert_close(got, base.grad, atol=3e-2, rtol=3e-2)


def test_written_codes_are_found_out_before_they_are_read() -> None:
    for size in SIZES:
        p = pair(size, torch.float32, False)
        x = torch.randn(2, size[2])
        p.layer(x)
        if Pattern(size[0]).m in (2, 4, 16):  # every code is a column there, but two may be one
            continue
        p.layer.codes.fill_(-1 if p.layer.codes.dtype != torch.uint8 else 255)
        for use in (lambda p=p, x=x: p.layer(x), p.layer.dense, p.layer.canonical):
            with pytest.raises(CompressError, match="index"):
                use()


def test_buffers_of_another_shape_dtype_or_device_are_one_sentence() -> None:
    p = pair(("1:16", 32, 64), torch.float32, True)
    x = torch.randn(2, 64)
    p.layer(x)
    good = p.layer.values, p.layer.codes
    for values, codes in (
        (good[0].reshape(-1), good[1]),  # the same bytes at the same address
        (good[0].view(good[0].shape[1], good[0].shape[0], -1), good[1]),
        (good[0].half(), good[1]),
        (good[0], good[1].long()),
        (good[0].to("meta"), good[1]),
        (good[0], good[1].to("meta")),
    ):
        p.layer.values, p.layer.codes = values, codes
        with pytest.raises(CompressError):
            p.layer(x)
    p.layer.values, p.layer.codes = good
    agrees(p.layer(x), x, p)
    for bad in (x.double(), x.long(), x.to("meta"), x[:, :3], torch.tensor(1.0)):
        with pytest.raises(CompressError):
            p.layer(bad)
    p.layer.bias = nn.Parameter(torch.empty(32, device="meta"))
    with pytest.raises(CompressError, match="on meta"):
        p.layer(x)
    values, codes = torch.zeros(1, 16, 32)[..., ::2], torch.zeros(1, 2, 16, dtype=torch.int32)
    with pytest.raises(CompressError, match="contiguous"):
        cpu.bind(values, codes, Shape.of(1, 32, "1:2"))


def test_a_state_of_another_dtype_is_converted_as_in_a_dense_layer() -> None:
    for a in TOLERANCE:
        for b in TOLERANCE:
            p, q = pair(("1:12", 17, 36), a, True), pair(("1:12", 17, 36), b, True)
            q.layer.load_state_dict(p.layer.state_dict())
            assert torch.equal(q.layer.dense(), p.w.to(b))
            r = pair(("1:12", 17, 36), b, True)
            r.layer.load_state_dict(p.layer.state_dict(), assign=True)
            assert torch.equal(r.layer.dense(), p.w)


def test_threads_share_one_layer() -> None:
    p = pair(("1:16", 48, 64), torch.float32, True)
    xs = [torch.randn(1 + i % 9, 64) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for x, y in zip(xs, pool.map(p.layer, xs), strict=True):
            agrees(y.detach(), x, p)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.add_(1), lambda w: w.detach().mul_(2), lambda w: nn.init.zeros_(w),
        lambda w: w.view(-1).zero_(), lambda w: w.t().zero_(), lambda w: w[0].fill_(1),
        lambda w: setattr(w, "data", torch.zeros(w.shape)), lambda w: w.copy_(torch.zeros(w.shape)),
    ],
)  # fmt: skip
def test_a_write_into_a_packed_weight_is_never_lost_without_a_word(
    write: Callable[[Tensor], Any],
) -> None:
    p = pair(("1:16", 32, 64), torch.float32, True)
    with torch.no_grad(), pytest.raises(CompressError, match="read-only"):
        write(p.layer.weight)
    assert torch.equal(torch.empty(32, 64).copy_(p.layer.weight), p.w)  # reading it is allowed
    assert torch.equal(copy.deepcopy(p.layer.weight), p.w)
    assert p.layer.weight.tolist() == p.w.tolist()
    for value in (nn.Parameter(p.w), p.w):
        with pytest.raises(CompressError, match="read-only"):
            p.layer.weight = value  # pyright: ignore[reportAttributeAccessIssue]


def test_onednn_sees_another_weight_at_an_old_address() -> None:
    layer = nn.Linear(64, 32, bias=False)
    fast = OneDNNLinear.of(layer, 4)
    x = torch.randn(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), F.linear(x, layer.weight))
        for _ in range(5):
            fast.weight = nn.Parameter(torch.randn(32, 64))
            torch.testing.assert_close(fast(x), F.linear(x, fast.weight))
            fast.weight.mul_(2)
            torch.testing.assert_close(fast(x), F.linear(x, fast.weight))
        fast.weight.data = torch.randn(64, 32).t()
        torch.testing.assert_close(fast(x), F.linear(x, fast.weight))


def test_the_op_copies_what_is_not_contiguous() -> None:
    p = pair(("1:16", 32, 64), torch.bfloat16, False)
    values = p.layer.values.to(memory_format=torch.channels_last)
    x = torch.randn(3, 64).bfloat16()
    for _ in range(3):
        agrees(matmul(x, values, _spread(p.layer.codes), None, p.layer.dims), x, p)
