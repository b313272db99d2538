"""The kernels of a GPU on 8-bit values, without one: emulated, and read as machine code."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_decode import (
    SMALL,
    TOLERANCE,
    _disassembler,
    machine_code,
    needs_compiler,
    needs_nvrtc,
)
from torch import Tensor

from emulated_gpu import Emulated
from nmflow import mask
from nmflow.errors import CompressError
from nmflow.kernels import (
    Call,
    gpu,
    gpu_cuts,
    gpu_driver,
    gpu_panels,
    gpu_plan,
    int8,
    int8_ops,
    ops,
)
from nmflow.kernels.gpu_plan import Card
from nmflow.kernels.layout import Shape, canonical_from_dense, tiled_from_canonical
from nmflow.kernels.reference import apply_epilogue


def streamed(spec: str, out: int, inputs: int) -> tuple[Shape, Tensor, Tensor]:
    """A shape, a weight that holds it with 8-bit values, and its stream as packing gives it."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(out, inputs, generator=draw)
    shape = Shape.of(out, inputs, spec)
    values, index = canonical_from_dense(w * mask(w, spec), shape)
    q, scale = int8.round_values(values)
    stream = int8.stream_from_canonical(q, scale, index, shape)
    return shape, int8.dense(stream, shape), stream


def check(
    spec: str, out: int, inputs: int, tokens: int, dtype: torch.dtype, epilogue: int = 1,
    roundings: int = 1,
) -> Emulated:  # fmt: skip
    """Multiply in the emulation and compare with float64; y is rounded, and in some ways W too."""
    shape, w, stream = streamed(spec, out, inputs)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, inputs, generator=draw).to(dtype)
    b = torch.randn(out, generator=draw).to(dtype)
    emulated = Emulated(SMALL)
    y = gpu.matmul_int8(x, stream, b, shape, epilogue, emulated)
    want = apply_epilogue(x.double() @ w.double().t() + b.double(), epilogue)
    size = x.double().abs() @ w.double().abs().t() + b.double().abs()
    assert y.dtype == dtype
    assert y.shape == (tokens, out)
    assert ((y.double() - want).abs() <= roundings * TOLERANCE[dtype] * size).all()
    return emulated


# Kernel, pattern, out, inputs, tokens; warps, slices, row tiles, shares, stages. Codes of 2, 4 and
# 8 bits, in each place of a piece; tails of rows, of inputs in a chunk, of tokens; panels.
QUICK = [
    ("lookup", "1:8", 40, 512, 1, (4, 1, 1, 1, 4)),
    ("lookup", "2:4", 33, 256, 2, (4, 2, 1, 2, 4)),
    ("decode", "1:16", 50, 784, 9, (4, 2, 2, 1, 2)),
    ("decode", "2:4", 33, 136, 3, (4, 1, 1, 1, 3)),
    ("decode", "1:32@48", 100, 384, 11, (4, 1, 1, 1, 3)),
]
MORE = [
    ("lookup", "1:16", 33, 768, 2, (8, 2, 1, 1, 4)),
    ("lookup", "1:4", 40, 320, 8, (8, 2, 1, 1, 4)),
    ("lookup", "1:32", 40, 384, 3, (4, 1, 1, 1, 4)),
    ("lookup", "1:16@16", 50, 768, 3, (4, 1, 1, 1, 4)),
    ("lookup", "4:16", 20, 128, 1, (8, 2, 1, 3, 4)),
    ("lookup", "1:256", 17, 2048, 2, (4, 1, 1, 1, 2)),
    ("decode", "1:8", 40, 264, 9, (4, 1, 1, 1, 3)),
    ("decode", "1:4", 40, 1028, 33, (4, 1, 1, 1, 3)),
    ("decode", "1:32", 40, 352, 2, (4, 1, 1, 1, 3)),
    ("decode", "3:8", 24, 200, 1, (4, 1, 1, 1, 3)),
    ("decode", "3:4", 20, 92, 3, (4, 1, 1, 1, 3)),
    ("decode", "1:1", 16, 40, 2, (4, 1, 1, 1, 3)),
    ("decode", "1:2", 16, 70, 3, (4, 1, 1, 1, 3)),
    ("decode", "4:4", 16, 40, 2, (4, 1, 1, 1, 3)),
    ("decode", "2:8", 24, 200, 17, (4, 1, 1, 1, 3)),
    ("decode", "5:16", 24, 208, 4, (4, 1, 1, 1, 3)),
    ("decode", "3:48", 24, 480, 1, (4, 1, 1, 1, 3)),
    ("decode", "8:256", 17, 1280, 2, (4, 1, 1, 1, 2)),
    ("decode", "1:8@4", 24, 200, 2, (4, 1, 1, 1, 3)),
    ("decode", "1:16@16", 56, 832, 20, (4, 1, 2, 1, 3)),
    ("decode", "2:4@16", 40, 88, 70, (4, 1, 1, 1, 3)),
    ("decode", "1:8", 40, 264, 64, (4, 1, 2, 3, 2)),
]


def taken(
    case: tuple[Any, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, int, int, int]:
    """Have the product of a case take its plan."""
    kind, spec, out, inputs, tokens, numbers = case
    shape, half = Shape.of(out, inputs, spec), dtype == torch.float16
    made = gpu_plan.make(shape, half, tokens, SMALL, *numbers, kind=kind, int8=True)
    assert made is not None
    assert made.kernel.function == kind
    monkeypatch.setattr(gpu, "_planned", lambda *args: made)
    return spec, out, inputs, tokens


@needs_compiler
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_products_equal_those_of_the_dequantised_weight(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16
    ran = check(*taken(case, dtype, monkeypatch), dtype)
    assert next(kernel.function for kernel, _ in ran.launched) == case[0]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", QUICK + MORE, ids=str)
def test_every_pattern(
    case: tuple[Any, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = taken(case, dtype, monkeypatch)
    for epilogue, roundings in ((0, 1), (2, 1), (3, 2)):  # SiLU is of a y that was rounded
        check(*planned, dtype, epilogue, roundings)


@needs_compiler
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    ("spec", "out", "inputs"),
    [
        ("1:2", 16, 34), ("2:4", 33, 36), ("1:16", 50, 1040), ("1:32", 31, 96), ("3:7", 17, 49),
        ("8:256", 9, 512), ("1:16@16", 40, 64), ("2:8@32", 70, 64), ("1:8@4", 10, 32),
    ],
)  # fmt: skip
def test_widened_is_what_packing_the_rounded_weight_gives(
    spec: str, out: int, inputs: int, dtype: torch.dtype
) -> None:
    """Bit by bit, codes too, so that all that is proven of two bytes holds for many tokens."""
    shape, _, stream = streamed(spec, out, inputs)
    q, scale, index = int8.canonical_from_stream(stream, shape)
    values = int8.float_values(q, scale).to(dtype)
    found = gpu.widened(stream, shape, dtype, Emulated(SMALL))
    for one, other in zip(found, tiled_from_canonical(values, index, shape), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@needs_compiler
def test_many_tokens_and_other_patterns_take_values_of_two_bytes() -> None:
    for spec, inputs, tokens in (("1:8", 64, 70), ("3:7", 49, 2)):
        ran = check(spec, 17, inputs, tokens, torch.bfloat16, 4, roundings=3)
        assert [kernel.function for kernel, _ in ran.launched] == ["widen", "expand"]
    shape, _, stream = streamed("1:8", 16, 64)
    x = torch.randn(2, 0, 64).bfloat16()
    assert gpu.matmul_int8(x, stream, None, shape, 0, Emulated(SMALL)).shape == (2, 0, 16)


@needs_compiler
def test_views_of_x_and_a_stream_across_sixteen_bytes() -> None:
    shape, w, stream = streamed("1:8", 16, 512)
    wide = torch.randn(3, 600).bfloat16()
    shifted = torch.cat([torch.zeros(4, dtype=torch.uint8), stream.flatten()])[4:].view_as(stream)
    for x in (wide[:, 3:515], wide[:, :512].t().contiguous().t(), wide[0, :512]):
        y = gpu.matmul_int8(x, shifted, None, shape, 0, Emulated(SMALL))
        want = x.double() @ w.double().t()
        torch.testing.assert_close(y.double(), want, rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("size", [(1,), (15,), (17,), (16, 1), ()])
def test_other_devices_refuse_what_a_kernel_would_read_past(size: tuple[int, ...]) -> None:
    """Their ops, called here as the dispatcher calls them there."""
    shape, _, stream = streamed("1:8", 16, 64)
    x, bias = torch.randn(2, 64).bfloat16(), torch.ones(size).bfloat16()
    numbers = 16, 64, 1, 8, 1
    with pytest.raises(CompressError, match=r"the bias .*of the shape \(16,\)"):
        int8_ops._matmul_any(x, stream, bias, *numbers, 0, 0)
    values, codes = gpu_buffers(shape)
    with pytest.raises(CompressError, match=r"bias is .*takes torch.bfloat16 \(16,\)"):
        ops._matmul_elsewhere(x, values, codes, bias, *numbers, 0)


def gpu_buffers(shape: Shape) -> tuple[Tensor, Tensor]:
    sizes = shape.tiled_sizes(torch.bfloat16)
    return torch.zeros(sizes[0]).bfloat16(), torch.zeros(sizes[1], dtype=torch.int32)


@needs_compiler
@pytest.mark.slow
def test_damaged_streams_read_and_write_nothing_else() -> None:
    for spec, tokens in (("1:16", 1), ("1:32", 9), ("1:2", 2)):
        shape, _, stream = streamed(spec, 40, 512)
        damaged = torch.full_like(stream, 255)
        gpu.matmul_int8(torch.ones(tokens, 512).bfloat16(), damaged, None, shape, 0, Emulated())
        codes = gpu.widened(damaged, shape, torch.bfloat16, Emulated())
        gpu.expand(*codes, shape, Emulated())


@pytest.mark.parametrize("tokens", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("spec", ["1:4", "2:4", "1:8", "1:16", "1:32", "1:16@16"])
def test_plans(spec: str, tokens: int) -> None:
    """Look-ups for one token, also of panels; never warp groups, whose registers are full."""
    plan = gpu_cuts.plan(Shape.of(11008, 4096, spec), False, tokens, Card(), True)
    assert plan is not None
    constants = dict(plan.kernel.constants)
    assert constants["INT8"] == 1
    assert plan.kernel.function == "lookup" if tokens == 1 else plan.kernel.function != "groups"
    assert plan.shared <= Card().shared
    numbers = (4, 1, 1, 1, 3)
    shape = Shape.of(64, 512, spec)
    assert gpu_plan.make(shape, False, tokens, Card(), *numbers, kind="groups", int8=True) is None


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_driver, "why_not", lambda: None)
    call = Call(Shape.of(64, 64, "1:16"), torch.bfloat16, "cuda", 1, values="int8")
    assert gpu.why_not(call) is None
    both = Call(call.shape, torch.bfloat16, "cuda", 1, values="int8, activations too")
    assert gpu.why_not(both) == "8-bit inputs have no kernel on GPUs"
    wide = Call(call.shape, torch.float32, "cuda", 1, values="int8")
    assert "bfloat16 and float16" in (gpu.why_not(wide) or "")
    monkeypatch.setattr(gpu_panels, "serves", lambda shape: shape.panel >= 64)
    many = Call(Shape.of(64, 64, "1:16@64"), torch.bfloat16, "cuda", 65, values="int8")
    assert gpu.kernel(many).startswith("panels on gathered")


# (kind, pattern, tokens, numbers): the most instructions from the first product to the last for a
# block of 16 x 16 weights, and of a look-up for 256 kept weights.
BUDGETS = [
    ("decode", "1:16", 1, (16, 4, 2, 1, 2), 14),
    ("decode", "1:8", 1, (16, 4, 2, 1, 2), 13),
    ("decode", "1:4", 1, (16, 4, 2, 1, 2), 18),
    ("decode", "2:4", 1, (16, 4, 2, 1, 2), 36),
    ("decode", "1:32", 1, (16, 4, 2, 1, 2), 13),
    ("decode", "1:8", 16, (16, 1, 2, 2, 2), 16),
    ("decode", "1:8", 64, (8, 1, 2, 8, 2), 27),
    ("decode", "1:16@16", 16, (8, 1, 2, 4, 3), 60),
    ("lookup", "1:8", 1, (16, 4, 1, 1, 2), 50),
    ("lookup", "2:4", 1, (16, 8, 1, 1, 4), 50),
    ("lookup", "1:16", 4, (16, 1, 1, 2, 4), 68),
]


@needs_nvrtc
@pytest.mark.skipif(not _disassembler(), reason="no nvdisasm: pip install 'nmflow[gpu-dev]'")
@pytest.mark.parametrize(
    "architecture",
    [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("kind", "spec", "tokens", "numbers", "most"), BUDGETS)
def test_machine_code(
    kind: str, spec: str, tokens: int, numbers: Any, most: int, architecture: int, tmp_path: Path
) -> None:
    shape = Shape.of(11008, 4096, spec)
    plan = gpu_plan.make(shape, False, tokens, Card(), *numbers, kind=kind, int8=True)
    assert plan is not None
    names = machine_code(plan.kernel, architecture, tmp_path)
    kinds = Counter(name.split(".")[0] for name in names)
    assert not kinds["STL"] + kinds["LDL"]
    constants = dict(plan.kernel.constants)
    if kind == "lookup":
        first = next(i for i, name in enumerate(names) if name.startswith("LDS"))
        last = max(i for i, name in enumerate(names) if name.startswith("LDG.E.NA"))
        kept = int8.Layout.of(shape).per * 4 * 32  # of a warp's words
        assert (last - first) / numbers[-1] * 256 / kept <= most
        return
    products = [i for i, name in enumerate(names) if name.startswith("HMMA")]
    blocks = len(products) / constants["NT"]
    assert (products[-1] - products[0] + 1) / blocks <= most
