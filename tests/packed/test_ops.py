"""Ops: right against float64, registered as torch wants them, and honest about who serves."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import pytest
import torch
import torch.fx
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nmflow import mask, native
from nmflow.errors import CompressError
from nmflow.kernels import Call, choose, cpu, explain, matmul, reference, unpack
from nmflow.kernels.layout import (
    DTYPES,
    Shape,
    canonical_from_dense,
    canonical_from_tiled,
    check_canonical,
    check_tiled,
    dense_from_canonical,
    tiled_from_canonical,
)
from nmflow.packed import compress

# (pattern, out, inputs): tails of rows and entries, spans of several groups, shared codes.
CASES = [
    ("1:2", 16, 32),
    ("2:4", 33, 36),
    ("1:4", 48, 96),
    ("1:8", 17, 64),
    ("1:16", 50, 64),
    ("1:32", 31, 96),
    ("3:7", 17, 49),
    ("5:12", 16, 36),
    ("4:32", 20, 64),
    ("8:256", 9, 512),
    ("1:16@16", 40, 64),
    ("2:8@32", 70, 64),
    ("4:8@3", 10, 32),
    ("1:1", 5, 3),
    ("1:16", 1, 16),
]
# Largest error allowed, as a share of sum |x||w| + |b| of each output.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def sparse(pattern: str, out: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    w = torch.randn(out, inputs).to(dtype)
    return torch.where(mask(w, pattern), w, torch.zeros((), dtype=dtype))


def tiled(w: Tensor, pattern: str) -> tuple[Tensor, Tensor, Shape]:
    shape = Shape.of(w.shape[0], w.shape[1], pattern)
    values, codes = tiled_from_canonical(*canonical_from_dense(w, shape), shape)
    return values, codes, shape


def dims(s: Shape) -> tuple[int, ...]:
    return (s.out, s.inputs, s.n, s.m, s.panel)


def close(y: Tensor, x: Tensor, w: Tensor, b: Tensor | None, epilogue: int = 0) -> None:
    x, w = x.double(), w.double()
    b64 = torch.zeros(w.shape[0], dtype=torch.float64) if b is None else b.double()
    want = reference.apply_epilogue(F.linear(x, w, b64), epilogue)
    scale = F.linear(x.abs(), w.abs(), b64.abs()) + 1e-6
    assert y.shape == want.shape
    assert float(((y.double() - want).abs() / scale).max()) <= TOLERANCE[y.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "out", "inputs"), CASES)
def test_matmul_against_float64(pattern: str, out: int, inputs: int, dtype: torch.dtype) -> None:
    w = sparse(pattern, out, inputs, dtype)
    values, codes, shape = tiled(w, pattern)
    bias = torch.randn(out).to(dtype)
    for lead in [(1,), (7,), (2, 3), (49,), ()]:
        x = torch.randn(*lead, inputs).to(dtype)
        close(matmul(x, values, codes, bias, dims(shape)), x, w, bias)
        for epilogue in (1, 2):
            y = matmul(x, values, codes, None, dims(shape), epilogue)
            close(y, x, w, None, epilogue)
    assert torch.equal(unpack(values, codes, dims(shape)), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_any_stride(dtype: torch.dtype) -> None:
    w = sparse("1:8", 40, 64, dtype)
    values, codes, shape = tiled(w, "1:8")
    bias = torch.randn(80).to(dtype)[::2]
    wide = torch.randn(9, 80).to(dtype)
    for x in (wide[:, 3:67], wide[::2, :64], torch.randn(64, 9).to(dtype).t(), wide[0, :64]):
        close(matmul(x, values, codes, bias, dims(shape)), x, w, bias)
    for x in (
        wide[0, :64].expand(5, 64),
        wide[:, :64].expand(3, 9, 64),
        wide.as_strided((9, 64), (8, 1)),
    ):
        close(matmul(x, values, codes, bias, dims(shape)), x, w, bias)
    for x in (wide[:0, :64], torch.empty(2, 0, 64, dtype=dtype)):
        assert matmul(x, values, codes, bias, dims(shape)).shape == (*x.shape[:-1], 40)


@st.composite
def _weights(draw: st.DrawFn) -> tuple[Tensor, str]:
    m = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16, 17, 32, 64, 256]))
    n = draw(st.integers(1, m))
    panel = draw(st.sampled_from([1, 1, 2, 5, 16, 32]))
    out, groups = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 99)))
    w = torch.randn(out, groups * m).to(draw(st.sampled_from(DTYPES)))
    # Coarse values: ties, and zeros among the kept.
    w = (w * 2).round() / 2
    pattern = f"{n}:{m}@{panel}"
    return torch.where(mask(w, pattern), w, torch.zeros((), dtype=w.dtype)), pattern


@given(_weights())
def test_layouts_round_trip(case: tuple[Tensor, str]) -> None:
    w, pattern = case
    shape = Shape.of(w.shape[0], w.shape[1], pattern)
    values, index = canonical_from_dense(w, shape)
    check_canonical(values, index, shape)
    assert torch.equal(dense_from_canonical(values, index, shape), w)
    tile, codes = tiled_from_canonical(values, index, shape)
    check_tiled(tile, codes, shape)
    again = canonical_from_tiled(tile, codes, shape)
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], index)


def tiled_by_the_letter(w: Tensor, index: Tensor, s: Shape) -> tuple[list[int], list[int]]:
    """The bits of both buffers as csrc/common/nmflow.h states them, entry by entry."""
    bits = w.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[w.itemsize]).tolist()
    pairs = w.itemsize == 2
    held = s.entries + s.entries % 2 if pairs else s.entries
    span = 16 // s.m * s.m if s.m <= 16 else s.m
    width, per = (4, 8) if s.m <= 16 else (8, 4)
    words = -(-s.entries // per)
    values, codes = [0] * (s.tiles * held * 16), [0] * (s.tiles * words * 16)
    shared = s.panel > 1 and s.panel % 16 == 0
    if shared:
        codes = [0] * (s.lists * s.entries)
    for row in range(s.out):
        for e in range(s.entries):
            column = e // s.n * s.m + int(index[row // s.panel, e])
            lane = e // 2 * 32 + row % 16 * 2 + e % 2 if pairs else e * 16 + row % 16
            values[row // 16 * held * 16 + lane] = bits[row][column]
            code = column - e // (span // s.m * s.n) * span
            if shared:
                codes[row // s.panel * s.entries + e] = code
            else:
                codes[(row // 16 * words + e // per) * 16 + row % 16] |= code << e % per * width
    return values, codes


@given(_weights())
def test_the_tiled_layout_is_the_stated_one(case: tuple[Tensor, str]) -> None:
    w, pattern = case
    values, codes, shape = tiled(w, pattern)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.itemsize]
    stated = tiled_by_the_letter(w, canonical_from_dense(w, shape)[1], shape)
    assert values.view(kind).flatten().tolist() == stated[0]
    mask32 = 0xFF if shape.shared else 0xFFFFFFFF
    assert [code & mask32 for code in codes.flatten().tolist()] == stated[1]
    if w.dtype in native.DTYPES and native.available():
        cpu.validate(values, codes, shape)


def test_minus_zero_and_nan_payloads_survive() -> None:
    w = torch.zeros(2, 16)
    w[0, 3], w[1, 5] = float("nan"), float("inf")
    w.view(torch.int32)[0, 3] += 77
    values, codes, shape = tiled(w, "1:16")
    back = unpack(values, codes, dims(shape))
    assert torch.equal(back.view(torch.int32), w.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["1:16", "1:16@16"])
def test_opcheck(pattern: str, dtype: torch.dtype) -> None:
    values, codes, shape = tiled(sparse(pattern, 40, 64, dtype), pattern)
    for x in (torch.randn(3, 64).to(dtype), torch.randn(2, 3, 64).to(dtype)):
        for bias in (None, torch.randn(40).to(dtype)):
            args = (x, values, codes, bias, *dims(shape), 0)
            torch.library.opcheck(torch.ops.nmflow.matmul.default, args)
    torch.library.opcheck(torch.ops.nmflow.unpack.default, (values, codes, *dims(shape)))


def test_gradients_of_input_and_bias() -> None:
    w = sparse("1:4", 12, 16, torch.float64)
    values, codes, shape = tiled(w, "1:4")
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    for epilogue in (0, 1, 2):
        assert torch.autograd.gradcheck(
            lambda x, b, e=epilogue: matmul(x, values, codes, b, dims(shape), e), (x, bias)
        )
    only = matmul(x.detach(), values, codes, bias, dims(shape)).sum()
    only.backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((12,), 10.0, dtype=torch.float64))


@pytest.mark.parametrize("epilogue", [0, 1, 2])
@pytest.mark.parametrize(
    ("x_dim", "bias_dim"), [(0, None), (1, None), (-1, None), (None, 0), (1, 1), (0, 0)]
)
def test_vmap(epilogue: int, x_dim: int | None, bias_dim: int | None) -> None:
    w = sparse("1:4", 12, 16)
    values, codes, shape = tiled(w, "1:4")
    x, bias = torch.randn(3, 5, 16), torch.randn(3, 12)
    xs = x[0] if x_dim is None else x.movedim(0, x_dim)
    biases = bias[0] if bias_dim is None else bias.movedim(0, bias_dim)
    expected = [
        matmul(x[0 if x_dim is None else i], values, codes, bias[0 if bias_dim is None else i],
               dims(shape), epilogue) for i in range(3)
    ]  # fmt: skip
    for grad in (False, True):  # as the op itself, and as a function with gradients
        got = torch.vmap(
            lambda x, b: matmul(x, values, codes, b, dims(shape), epilogue),
            in_dims=(x_dim, bias_dim),
        )(xs.clone().requires_grad_(grad), biases)
        torch.testing.assert_close(got, torch.stack(expected))
    with pytest.raises(CompressError, match="in_dims"):
        torch.vmap(lambda v: matmul(x[0], v, codes, None, dims(shape)))(
            values.expand(2, *values.shape)
        )


def test_function_transforms() -> None:
    model = _network()
    packed = compress(model, measure=False)
    x = torch.randn(4, 64)

    def loss(network: Any) -> Any:
        return lambda row: network(row).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        got = torch.vmap(transform(loss(packed)))(x)
        torch.testing.assert_close(got, torch.vmap(transform(loss(model)))(x))


def test_a_graph_of_fx_holds_one_call_a_layer() -> None:
    packed = compress(_network(), measure=False)
    graph = torch.fx.symbolic_trace(packed)
    assert sum(node.target is matmul for node in graph.graph.nodes) == 2
    x = torch.randn(4, 64)
    assert torch.equal(graph(x), packed(x))


def _network() -> Any:
    layer, second = nn.Linear(64, 48), nn.Linear(48, 32)
    model = cast(Any, nn.Sequential(layer, nn.GELU(), second).eval())
    for one in (layer, second):
        one.weight.data *= mask(one.weight, "1:16")
    return model


def test_compile_is_one_graph_with_a_dynamic_batch() -> None:
    model = _network()
    packed = compress(model, measure=False)
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (1, 3, 50):
            x = torch.randn(batch, 64)
            torch.testing.assert_close(compiled(x), model(x))
    x = torch.randn(4, 64, requires_grad=True)
    compiled(x).sum().backward()
    got = x.grad
    x.grad = None
    model(x).sum().backward()
    torch.testing.assert_close(got, x.grad)
    torch._dynamo.reset()


def test_weight_dtype_may_be_read_in_a_compiled_forward() -> None:
    """T5 compares `wo.weight.dtype` with its input's: no dense weight may be built for that."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wo = compress(_network(), measure=False, fuse=False)[0]  # pyright: ignore

        def forward(self, x: Tensor) -> Tensor:
            return self.wo(x.to(self.wo.weight.dtype))

    model = Asks()
    program = torch.export.export(model, (torch.randn(2, 64),), strict=False)
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "nmflow.matmul.default" in ops
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graph.graph.eliminate_dead_code()
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 64))
    assert not [op for op in seen if "unpack" in op]
    torch._dynamo.reset()


@pytest.mark.slow
def test_inductor_and_aot_inductor(tmp_path) -> None:
    model = _network()
    packed = compress(model, measure=False)
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, dynamic=True)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(packed, (torch.randn(3, 64),), dynamic_shapes=({0: batch},))
    file = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "packed.pt2")
    )
    loaded = torch._inductor.aoti_load_package(file)
    with torch.no_grad():
        for size in (1, 3, 50):
            x = torch.randn(size, 64)
            torch.testing.assert_close(compiled(x), model(x))
            torch.testing.assert_close(loaded(x), model(x))
    torch._dynamo.reset()


def test_fake_kernels_refuse_what_the_real_ones_do() -> None:
    values, codes, shape = tiled(sparse("1:16", 40, 64), "1:16")
    away = (values.to("meta"), codes.to("meta"))
    with pytest.raises(CompressError, match=r"on cpu and the packed weight .* on meta"):
        matmul(torch.randn(3, 64), *away, None, dims(shape))
    with pytest.raises(RuntimeError, match="another last axis"):
        matmul(torch.randn(3, 48, device="meta"), *away, None, dims(shape))
    assert matmul(torch.randn(3, 64, device="meta"), *away, None, dims(shape)).shape == (3, 40)


BAD = {
    "features": (lambda x, v, c, b: (x[:, :48], v, c, b), "48 features"),
    "dtype": (lambda x, v, c, b: (x.bfloat16(), v, c, b), "bfloat16"),
    "bias dtype": (lambda x, v, c, b: (x, v, c, b.half()), "float16"),
    "short bias": (lambda x, v, c, b: (x, v, c, b[:-1]), r"\(39,\)"),
    "short values": (lambda x, v, c, b: (x, v[:-1], c, b), "packed buffers"),
    "short codes": (lambda x, v, c, b: (x, v, c[:-1], b), "packed buffers"),
    "other codes": (lambda x, v, c, b: (x, v, c.to(torch.int64), b), "packed buffers"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused(name: str) -> None:
    change, said = BAD[name]
    values, codes, shape = tiled(sparse("1:16", 40, 64), "1:16")
    x, bias = torch.randn(3, 64), torch.randn(40)
    matmul(x, values, codes, bias, dims(shape))
    x, v, c, b = change(x, values, codes, bias)
    with pytest.raises(CompressError, match=said):
        matmul(x, v, c, b, dims(shape))


@pytest.mark.parametrize(
    "numbers", [(0, 64, 1, 16, 1), (40, 60, 1, 16, 1), (40, 512, 1, 512, 1), (-1, 64, 1, 16, 1)]
)
def test_wrong_shapes_are_refused(numbers: tuple[int, ...]) -> None:
    values, codes, _ = tiled(sparse("1:16", 40, 64), "1:16")
    with pytest.raises(CompressError):
        matmul(torch.randn(3, numbers[1]), values, codes, None, numbers)
    with pytest.raises(CompressError):
        unpack(values, codes, numbers)


def test_choose_says_why() -> None:
    shape = Shape.of(40, 64, "1:16")
    choice = choose(Call(shape, torch.float64, "cpu", 3))
    assert choice.backend == "reference"
    assert choice.refused[0][0] == "cpu"
    assert "float64" in str(choice) or "native" in str(choice)
    assert choose(Call(shape, torch.float32, "cuda", 3)).backend == "reference"


def test_what_the_kernels_cannot_hold_goes_to_the_reference() -> None:
    call = Call(Shape.of(4, 2**25, "1:16"), torch.float32, "cpu", 1)
    assert choose(call).backend == "reference"
    if native.available():
        assert "overflows" in str(choose(call))


def test_explain_names_module_and_kernel() -> None:
    packed = compress(_network(), measure=False)
    found = explain(packed, torch.randn(7, 64))
    assert [path for path, _ in found] == ["0", "2"]
    assert [choice.call.tokens for _, choice in found] == [7, 7]
    expected = "cpu" if native.available() else "reference"
    assert {choice.backend for _, choice in found} == {expected}
    assert "1:16 (48, 64) float32 on cpu with 7 tokens" in str(found)
    for module in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))):
        module.report = "its own"  # pyright: ignore[reportArgumentType]
        with pytest.raises(CompressError, match=r"no packed product.*report_of"):
            explain(module, torch.randn(1, 4))


def test_without_the_library_the_reference_serves_and_says_so_once() -> None:
    code = """
import torch, nmflow
from torch import nn
from nmflow.kernels import explain
from nmflow.packed import compress
layer = nn.Linear(64, 48)
layer.weight.data *= nmflow.mask(layer.weight, "1:16")
packed = compress(nn.Sequential(layer), measure=False)
x = torch.randn(3, 64)
torch.testing.assert_close(packed(x), layer(x))
packed(x)
print(explain(packed, x))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={"NMFLOW_NATIVE": "0", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr.count("slow reference kernels") == 1
    assert "NMFLOW_NATIVE=0 is set" in ran.stderr
    assert "reference" in ran.stdout
    assert "not cpu: the native library is not available" in ran.stdout
