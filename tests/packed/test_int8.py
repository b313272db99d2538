"""`values="int8"`: rounding, files, every kind of module, and what a packed module must survive."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nmflow import mask
from nmflow.errors import CompressError, FileFormatError
from nmflow.kernels import explain, int8, int8_ops
from nmflow.kernels.layout import Shape, canonical_from_dense, dense_from_canonical
from nmflow.packed import compress, decompress, export_program, load, load_state, report_of, save
from nmflow.packed.int8 import Int8Linear
from nmflow.packed.rounded import refuse_device
from pruned import prune
from rounded import MODULES, edit, first, net

ACTIVATIONS = int8.ACTIVATIONS


@st.composite
def _values(draw: st.DrawFn) -> tuple[Tensor, Tensor, Shape]:
    m = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 32, 256]))
    n = draw(st.integers(1, min(m, 9)))
    panel = draw(st.sampled_from([1, 1, 2, 5, 16]))
    shape = Shape.of(draw(st.integers(1, 40)), m * draw(st.integers(1, 5)), f"{n}:{m}@{panel}")
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    w = torch.randn(shape.out, shape.inputs) * 10.0 ** draw(st.integers(-20, 20))
    w = torch.where(mask(w, str(shape.pattern)), w, 0.0)
    return *canonical_from_dense(w, shape), shape


@given(_values())
def test_layouts_lose_nothing_and_rounding_is_exact_and_settled(case) -> None:
    values, index, shape = case
    q, scale = int8.round_values(values)
    assert float((values - int8.float_values(q, scale)).abs().max()) <= float(scale.max()) / 2
    # Exact in float32, so that rounding what came out gives the same again.
    assert torch.equal(int8.float_values(q, scale).double(), q.double() * scale[:, None].double())
    again = int8.round_values(int8.float_values(q, scale))
    assert torch.equal(again[0], q)
    assert torch.equal(again[1], scale)
    stream = int8.stream_from_canonical(q, scale, index, shape)
    int8.check_stream(stream, shape)
    for a, b in zip(int8.canonical_from_stream(stream, shape), (q, scale, index), strict=True):
        assert torch.equal(a, b)
    want = dense_from_canonical(int8.float_values(q, scale), index, shape)
    assert torch.equal(int8.dense(stream, shape), want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_have_no_scale(bad: float) -> None:
    model = net()
    model[0].weight.data[0, model[0].weight[0].nonzero()[0]] = bad
    report = report_of(compress(model, values="int8", measure=False))
    assert "NaN or an infinity" in report[0].why
    q, scale = int8.round_values(torch.tensor([[0.0, 0.0], [1e-31, 0.0]]))
    assert not q.any()
    assert not scale.any()


@pytest.mark.parametrize("dtype", int8.DTYPES, ids=str)
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", MODULES)
def test_modules_beside_their_dense_selves(
    name: str, activations: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    model = prune(nn.Sequential(make()).to(dtype))
    packed = compress(model, measure=False, values="int8", activations=activations)
    assert report_of(packed).packed
    assert all(row.error and 0 < row.error < 0.02 for row in report_of(packed).packed)
    assert "error" in str(report_of(packed))
    x = torch.randn(shape).to(dtype)
    dense = decompress(packed)
    with torch.no_grad():
        y, want, exact = (first(m(x)).double() for m in (packed, dense, model))
        near = 0.1 if activations == "int8" else {torch.float32: 1e-5}.get(dtype, 2e-2)
        assert float((y - want).abs().max() / want.abs().max()) < near
        assert float((y - exact).norm() / exact.norm()) < 0.1
        save(packed, tmp_path)
        again = load(tmp_path, nn.Sequential(make()))
        assert torch.equal(first(again(x)), first(packed(x)))
    held = dict(dense.named_parameters())
    state = load_state(tmp_path)
    assert state.keys() == held.keys()
    assert all(torch.equal(state[n], p) for n, p in held.items())
    streams = [m.stream for m in packed.modules() if isinstance(m, Int8Linear)]
    found = [m.stream for m in again.modules() if isinstance(m, Int8Linear)]
    assert all(torch.equal(a, b) for a, b in zip(streams, found, strict=True))


def test_what_a_packed_module_survives() -> None:
    packed = compress(net(), measure=False, values="int8", activations="int8")
    x = torch.randn(5, 32)
    with torch.no_grad():
        y = packed(x)
        for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
            assert torch.equal(twin(x), y)
        fresh = compress(net(), measure=False, values="int8", activations="int8")
        fresh.load_state_dict(packed.state_dict())
        assert torch.equal(fresh(x), y)
        half = copy.deepcopy(packed).bfloat16()
        assert half[0].weight.dtype == torch.bfloat16
        assert torch.equal(half.float()[0].stream, packed[0].stream)
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(x).dtype == torch.bfloat16
        moved = copy.deepcopy(packed).to("meta")
        assert moved(x.to("meta")).shape == (5, 32)
    assert packed[0].weight.shape == (48, 32)
    assert torch.equal(packed[0].weight + 0, decompress(packed)[0].weight)
    state = packed.state_dict()
    state["0.stream"] = state["0.stream"][:1]
    with pytest.raises(RuntimeError, match="stream"):
        packed.load_state_dict(state)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_gradients_compilers_and_exports(activations: str) -> None:
    packed = compress(net(), measure=False, values="int8", activations=activations, fuse=False)
    x = torch.randn(5, 32, requires_grad=True)
    packed(x).sum().backward()
    got, x.grad = x.grad, None
    decompress(packed)(x).sum().backward()
    assert got is not None
    assert x.grad is not None
    near = 1e-5 if activations == "float" else 0.1
    assert float((got - x.grad).norm() / x.grad.norm()) < near
    with torch.no_grad():
        y = packed(x)
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), y)
        program = export_program(packed, x.detach(), packed=True)
        assert "matmul_int8" in str(program.graph)
        torch.testing.assert_close(program.module()(torch.cat([x, x]))[:5], y)
    layer = packed[0]
    rounds = ACTIVATIONS.index(activations)
    torch.library.opcheck(
        torch.ops.nmflow.matmul_int8.default,
        (x.detach(), layer.stream, layer.bias.detach(), *layer.dims, rounds, 0),
    )
    torch.library.opcheck(torch.ops.nmflow.unpack_int8.default, (layer.stream, *layer.dims))
    said = str(explain(packed, x.detach()))
    assert "(int8, activations too)" in said if activations == "int8" else "(int8)" in said


def test_what_compress_refuses() -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"values": "int4"}, "values is 'int4'"),
        ({"values": "int8", "activations": "int4"}, "activations is 'int4'"),
        ({"activations": "int8"}, "pass values='int8' too"),
    )
    for arguments, said in refused:
        with pytest.raises(CompressError, match=said):
            compress(net(), measure=False, **arguments)
    double = report_of(compress(net().double(), measure=False, values="int8"))
    assert "float64" in double[0].why


def test_the_op_refuses_what_does_not_fit() -> None:
    layer = compress(net(), measure=False, values="int8")[0]
    for x, bias in (
        (torch.randn(2, 31), None),
        (torch.randn(2, 32), torch.randn(47)),
        (torch.randn(2, 32).bfloat16(), torch.randn(48)),
    ):
        with pytest.raises(CompressError):
            int8_ops.matmul_int8(x, layer.stream, bias, layer.dims)
    with pytest.raises(CompressError, match="pack it again"):
        int8_ops.matmul_int8(torch.randn(2, 32), layer.stream[:2], None, layer.dims)
    y = int8_ops.matmul_int8(torch.randn(2, 32).double(), layer.stream, None, layer.dims)
    assert y.dtype == torch.float64  # by the reference


def test_a_batch_by_vmap() -> None:
    layer = compress(net(), measure=False, values="int8", fuse=False)[0]
    x, bias = torch.randn(4, 3, 32), torch.randn(4, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
        many = torch.vmap(lambda a, b: int8_ops.matmul_int8(a, layer.stream, b, layer.dims))
        one = torch.stack([layer(a) - layer.bias + b for a, b in zip(x, bias, strict=True)])
        torch.testing.assert_close(many(x, bias), one)
    grads = torch.vmap(torch.func.grad(lambda a: layer(a).sum()))(x)
    torch.testing.assert_close(grads, torch.func.grad(lambda a: layer(a).sum())(x))
    with pytest.raises(CompressError, match="keep the weight out of in_dims"):
        torch.vmap(lambda s: int8_ops.matmul_int8(x[0], s, None, layer.dims))(
            layer.stream.expand(2, *layer.stream.shape)
        )


def test_a_stream_that_was_written_is_bound_anew() -> None:
    layer = compress(net(), measure=False, values="int8")[0]
    x = torch.randn(2, 32)
    before = layer(x)
    layer.stream[0, 128] = 255
    with pytest.raises(CompressError, match="its buffer was written"):
        layer(x)
    layer.stream = compress(net(), measure=False, values="int8")[0].stream
    assert torch.equal(layer(x), before)


def test_the_choice_is_measured_against_rounded_ways() -> None:
    torch.manual_seed(0)
    layer = prune(nn.Sequential(nn.Linear(256, 256)), "1:16")
    report = report_of(compress(layer, values="int8", tokens=(16,)))
    _, _, way = report[0].times[16]
    assert way in ("F.linear", "oneDNN", "oneDNN packed", "oneDNN bfloat16", "int8 dynamic")


EDITS: dict[str, tuple[str, Callable[[dict, dict], None]]] = {
    "the version of files without": ("layout version", lambda h, d: h.update(layout=1)),
    "no activations": ("'activations'", lambda h, d: h["weights"]["0.weight"].pop("activations")),
    "other activations": (
        "activations or a dtype",
        lambda h, d: h["weights"]["0.weight"].update(activations="int4"),
    ),
    "another kind": (
        "of an impossible kind",
        lambda h, d: h["weights"]["0.weight"]["parts"][0].update(values="int4"),
    ),
    "no kind": (
        "of another dtype",
        lambda h, d: h["weights"]["0.weight"]["parts"][0].pop("values"),
    ),
    "a value of -128": ("-128", lambda h, d: d["0.weight#0.values"].view(-1)[:1].fill_(-128)),
    "a scale of NaN": ("scale", lambda h, d: d["0.weight#0.scale"][:1].fill_(torch.nan)),
    "a negative scale": ("scale", lambda h, d: d["0.weight#0.scale"][:1].fill_(-1)),
    "too few scales": (
        "scales are",
        lambda h, d: d.update({"0.weight#0.scale": d["0.weight#0.scale"][1:]}),
    ),
    "no scales": ("are missing", lambda h, d: d.pop("0.weight#0.scale")),
}


@pytest.mark.parametrize("name", EDITS)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    said, change = EDITS[name]
    save(compress(net(), measure=False, values="int8"), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(FileFormatError, match=said):
        load(tmp_path, net())


def test_sizes_in_bits_a_dense_weight() -> None:
    """1:8 takes 1.5 bits a dense weight, 1:16 0.75, 1:4 2.5; and 8 bytes a row."""
    for spec, bits in (("1:4", 2.5), ("1:8", 1.5), ("1:16", 0.75)):
        model = prune(nn.Sequential(nn.Linear(1024, 256)), spec)
        row = report_of(compress(model, measure=False, values="int8"))[0]
        assert row.bytes == 256 * 1024 * bits / 8 + 8 * 256


def test_devices_without_kernels_are_refused() -> None:
    for kind in ("mps", "xpu"):
        said = rf"values is 'int8' and the model is on {kind}.*leave values out, or move the model"
        with pytest.raises(CompressError, match=said):
            refuse_device("int8", "float", torch.device(kind))
    with pytest.raises(CompressError, match=r"activations is 'int8' and the model is on cuda:0"):
        refuse_device("int8", "int8", torch.device("cuda:0"))
    refuse_device("int8", "float", torch.device("cuda:0"))
    refuse_device("int8", "int8", torch.device("cpu"))
