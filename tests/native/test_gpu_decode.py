"""The kernels of packed layers on a GPU, without one.

Their source runs in an emulation of fragments and asynchronous copies, and it is compiled for three
architectures and read as machine code.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated_gpu
from emulated_gpu import Emulated
from nmflow import mask
from nmflow.errors import CompressError
from nmflow.kernels import Call, choose, gpu, gpu_cuts, gpu_driver, gpu_panels, gpu_plan
from nmflow.kernels.gpu_plan import Card, Kernel
from nmflow.kernels.layout import LANES, Shape, canonical_from_dense, tiled_from_canonical
from nmflow.kernels.reference import apply_epilogue

needs_compiler = pytest.mark.skipif(emulated_gpu.COMPILER is None, reason="no g++ to emulate with")
needs_nvrtc = pytest.mark.skipif(
    not gpu_driver.nvrtc_path(), reason="no NVRTC: pip install 'nmflow[gpu-dev]'"
)
# Rows of x and the largest error as a share of sum |x||w| + |b|: sums are float32, y is rounded.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALL = Card(processors=4, shared=232_448)


def packed(
    spec: str, out: int, inputs: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Shape, Tensor, Tensor, Tensor]:
    """A shape, a weight that holds it, and its tiled values and codes by the product's packing."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(out, inputs, generator=draw).to(dtype)
    w = torch.where(mask(w, spec), w, torch.zeros((), dtype=dtype))
    shape = Shape.of(out, inputs, spec)
    return shape, w, *tiled_from_canonical(*canonical_from_dense(w, shape), shape)


def check(
    spec: str, out: int, inputs: int, tokens: int, dtype: torch.dtype = torch.bfloat16,
    epilogue: int = 0, bias: bool = True, card: Card = SMALL, seed: int = 0,
) -> Emulated:  # fmt: skip
    """Multiply in the emulation and compare with float64."""
    shape, w, values, codes = packed(spec, out, inputs, dtype, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, inputs, generator=draw).to(dtype)
    b = torch.randn(out, generator=draw).to(dtype) if bias else None
    emulated = Emulated(card)
    y = gpu.matmul(x, values, codes, b, shape, epilogue, emulated)
    wide = torch.zeros(out, dtype=torch.float64) if b is None else b.double()
    want = apply_epilogue(x.double() @ w.double().t() + wide, epilogue)
    size = x.double().abs() @ w.double().abs().t() + wide.abs()
    assert y.dtype == dtype
    assert y.shape == (tokens, out)
    assert ((y.double() - want).abs() <= TOLERANCE[dtype] * size).all()
    assert emulated.launched
    return emulated


# (pattern, out, inputs, tokens): each compiles a kernel of its own. A tail of rows, of inputs in a
# chunk, of tokens; codes that a quad shares, that lanes own, of bytes; panels.
QUICK = [
    ("1:16", 50, 784, 3),
    ("2:4", 33, 136, 9),
    ("1:8", 16, 264, 1),
    ("1:32", 40, 352, 2),
    ("1:16@16", 56, 832, 20),
]
MORE = [
    ("1:4", 40, 132, 5),
    ("1:2", 16, 70, 3),
    ("1:1", 16, 40, 2),
    ("4:4", 16, 40, 2),
    ("3:4", 20, 92, 3),
    ("2:8", 24, 200, 17),
    ("3:8", 24, 200, 1),
    ("5:16", 24, 208, 4),
    ("4:32", 24, 288, 40),
    ("3:48", 24, 480, 1),
    ("2:64", 24, 448, 8),
    ("8:256", 17, 1280, 2),
    ("1:256", 17, 1280, 2),
    ("1:8@4", 24, 200, 2),  # codes a row
    ("2:4@16", 40, 88, 70),
    ("1:32@48", 100, 384, 11),
    ("1:16@64", 130, 1088, 3),
    ("1:16", 40, 528, 64),
    ("1:4", 40, 1028, 33),
]


@needs_compiler
@pytest.mark.parametrize(("spec", "out", "inputs", "tokens"), QUICK)
def test_products_equal_those_of_float64(spec: str, out: int, inputs: int, tokens: int) -> None:
    check(spec, out, inputs, tokens, epilogue=1)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "out", "inputs", "tokens"), QUICK + MORE)
def test_products_of_every_pattern(
    spec: str, out: int, inputs: int, tokens: int, dtype: torch.dtype
) -> None:
    for epilogue in (0, 1, 2):
        check(spec, out, inputs, tokens, dtype, epilogue, bias=epilogue != 0)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("spec", ["1:16", "2:4", "1:32", "1:8@16"])
def test_every_way_to_cut_the_work_gives_the_same(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warps, slices and row tiles of a block, shares of the inputs, and stages, down to two."""
    shape = Shape.of(72, 1152, spec)
    steps = -(-shape.inputs // gpu_plan.unit(shape))
    for warps, slices, rows, shares, stages in [
        (4, 1, 1, 1, 2), (8, 8, 1, 1, 3), (4, 4, 2, 1, 4), (4, 2, 2, steps, 3), (16, 1, 2, 2, 2),
    ]:  # fmt: skip
        made = gpu_plan.make(shape, False, 12, SMALL, warps, slices, rows, shares, stages)
        assert made is not None
        monkeypatch.setattr(gpu, "_planned", lambda *args, made=made: made)
        ran = check(spec, 72, 1152, 12, epilogue=2)
        assert len(ran.launched) == 1 + (made.shares > 1)


# Warps, slices, row tiles, shares, stages; tails of everything, codes of bytes, panels of four.
OTHERS = [
    ("lookup", "1:16", 50, 768, 1, (8, 2, 1, 1, 4)),
    ("lookup", "2:4", 33, 128, 2, (4, 2, 1, 2, 4)),
    ("lookup", "1:32", 40, 384, 1, (4, 1, 1, 1, 4)),
    ("groups", "1:16", 50, 784, 3, (4, 1, 1, 1, 3)),
    ("groups", "2:4", 33, 136, 9, (8, 2, 1, 1, 2)),
    ("groups", "1:8", 70, 264, 64, (8, 1, 1, 2, 3)),
    ("ready", "1:8", 70, 264, 64, (8, 1, 1, 2, 3)),
    ("ready", "2:4", 33, 136, 9, (8, 2, 1, 1, 2)),
]
MORE_OTHERS = [
    ("lookup", "1:8", 40, 512, 3, (8, 2, 1, 3, 3)),
    ("lookup", "1:4", 40, 160, 8, (8, 2, 1, 1, 4)),
    ("lookup", "1:2", 16, 80, 1, (4, 2, 1, 2, 4)),
    ("lookup", "4:16", 20, 128, 1, (8, 2, 1, 3, 3)),
    ("lookup", "1:8@4", 24, 320, 2, (4, 1, 1, 1, 4)),
    ("lookup", "4:32", 24, 320, 7, (4, 2, 1, 1, 4)),
    ("lookup", "1:256", 17, 2048, 2, (4, 1, 1, 1, 2)),
    ("groups", "1:32", 40, 352, 20, (8, 2, 1, 1, 3)),
    ("groups", "3:16", 24, 208, 4, (8, 1, 1, 2, 3)),
    ("groups", "1:64", 40, 1088, 8, (8, 2, 1, 1, 2)),
    ("groups", "2:8", 200, 200, 17, (16, 2, 1, 1, 3)),
    ("groups", "1:8@4", 24, 200, 33, (16, 4, 1, 1, 3)),
    ("ready", "1:16", 50, 784, 3, (4, 1, 1, 1, 4)),
    ("ready", "1:8", 70, 1160, 64, (8, 1, 2, 2, 2)),
    ("ready", "1:32", 40, 352, 20, (8, 2, 1, 1, 3)),
    ("ready", "2:8", 200, 200, 70, (16, 2, 1, 2, 3)),
    ("ready", "1:8@4", 24, 200, 33, (8, 2, 1, 1, 3)),
]


def by_kind(
    kind: str, spec: str, out: int, inputs: int, tokens: int, numbers: Any, half: bool
) -> Any:
    made = gpu_plan.make(Shape.of(out, inputs, spec), half, tokens, SMALL, *numbers, kind=kind)
    assert made is not None
    assert made.kind == kind
    return lambda *args: made


@needs_compiler
@pytest.mark.parametrize(("kind", "spec", "out", "inputs", "tokens", "numbers"), OTHERS)
def test_products_of_other_kernels(
    kind: str, spec: str, out: int, inputs: int, tokens: int, numbers: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    planned = by_kind(kind, spec, out, inputs, tokens, numbers, False)
    monkeypatch.setattr(gpu, "_planned", planned)
    check(spec, out, inputs, tokens, epilogue=1)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "spec", "out", "inputs", "tokens", "numbers"), OTHERS + MORE_OTHERS
)
def test_every_pattern_by_other_kernels(
    kind: str, spec: str, out: int, inputs: int, tokens: int, numbers: Any, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    planned = by_kind(kind, spec, out, inputs, tokens, numbers, dtype == torch.float16)
    monkeypatch.setattr(gpu, "_planned", planned)
    for epilogue in (0, 2):
        check(spec, out, inputs, tokens, dtype, epilogue, bias=epilogue != 0)


@pytest.mark.parametrize(
    ("kind", "spec", "inputs", "tokens", "numbers"),
    [
        ("lookup", "1:8", 512, 9, (4, 1, 1, 1, 4)),  # too many tokens
        ("lookup", "1:8", 520, 1, (4, 1, 1, 1, 4)),  # no whole words
        ("lookup", "3:16", 512, 1, (4, 1, 1, 1, 4)),  # a span that a word divides
        ("lookup", "1:8@16", 512, 1, (4, 1, 1, 1, 4)),
        ("lookup", "2:4", 512, 1, (4, 1, 1, 1, 3)),  # places whose low byte would change
        ("groups", "1:8@16", 512, 1, (4, 1, 1, 1, 3)),
        ("ready", "1:8@16", 512, 16, (4, 1, 1, 1, 3)),
        ("ready", "1:8", 8192, 64, (16, 4, 1, 1, 4)),  # more of x than a block shares
        ("groups", "1:8", 512, 1, (4, 2, 1, 1, 3)),  # a slice is a warp group
    ],
)
def test_what_other_kernels_do_not_take(
    kind: str, spec: str, inputs: int, tokens: int, numbers: Any
) -> None:
    assert (
        gpu_plan.make(Shape.of(64, inputs, spec), False, tokens, Card(), *numbers, kind=kind)
        is None
    )


def test_cards_without_warp_groups_take_no_plan_of_them() -> None:
    shape, old = Shape.of(64, 512, "1:8"), Card(108, 166_912, groups=False)
    for kind in gpu_plan.OF_GROUPS:
        assert gpu_plan.make(shape, False, 16, old, 8, 1, 1, 1, 3, kind) is None
    for tokens in (1, 4, 16, 64):
        for plan in gpu_cuts.near(shape, False, tokens, old):
            assert plan.kernel.function != "groups"


@needs_compiler
def test_views_and_odd_strides_and_no_tokens() -> None:
    """One kernel, all the ways that x, values and bias may lie in memory."""
    shape, w, values, codes = packed("1:8", 16, 264)
    emulated = Emulated(SMALL)
    wide = torch.randn(1, 300).bfloat16()
    shifted = torch.cat([torch.zeros(1, dtype=torch.bfloat16), values.flatten()])[1:].view_as(
        values
    )
    every = torch.randn(32).bfloat16()
    for x in (wide[:, 3:267], wide[:, :264], wide[:, 4:268].t().contiguous().t(), wide[0, :264]):
        want = x.double() @ w.double().t() + every[::2].double()
        y = gpu.matmul(x, shifted, codes, every[::2], shape, 0, emulated)
        torch.testing.assert_close(y.double(), want, rtol=2**-7, atol=0.05)
    assert gpu.matmul(wide[:0, :264], values, codes, None, shape, 0, emulated).shape == (0, 16)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("spec", "out", "inputs"),
    [
        ("1:2", 16, 32), ("2:4", 33, 36), ("1:16", 50, 1040), ("1:32", 31, 96), ("3:7", 17, 49),
        ("5:12", 16, 36), ("4:32", 20, 64), ("8:256", 9, 512), ("1:16@16", 40, 64),
        ("2:8@32", 70, 64), ("4:8@3", 10, 32), ("1:1", 5, 3), ("1:13@16", 33, 39), ("1:16", 1, 16),
    ],
)  # fmt: skip
def test_expanding_gives_back_every_bit(
    spec: str, out: int, inputs: int, dtype: torch.dtype
) -> None:
    shape, w, values, codes = packed(spec, out, inputs, dtype)
    dense = gpu.expand(values, codes, shape, Emulated())
    assert torch.equal(dense.view(torch.int16), (w + 0.0).view(torch.int16))
    values, codes = (t.repeat_interleave(2, -1)[..., ::2] for t in (values, codes))
    assert torch.equal(gpu.expand(values, codes, shape, Emulated()), dense)


@needs_compiler
def test_damaged_codes_read_and_write_nothing_else() -> None:
    shape, _, values, codes = packed("1:32", 40, 352)
    damaged = torch.full_like(codes, -1)
    for t in (1, 2):
        gpu.matmul(torch.ones(t, 352).bfloat16(), values, damaged, None, shape, 0, Emulated(SMALL))
    gpu.expand(values, damaged, shape, Emulated(SMALL))


@needs_compiler
def test_many_tokens_take_the_dense_matrix() -> None:
    shape, w, values, codes = packed("3:7", 17, 49)
    emulated = Emulated(SMALL)
    x = torch.randn(2, 49).bfloat16()
    y = gpu.matmul(x, values, codes, None, shape, 0, emulated)
    assert torch.equal(y, torch.nn.functional.linear(x, w))
    assert [kernel.function for kernel, _ in emulated.launched] == ["expand"]
    few = Shape.of(64, 64, "1:16")
    for tokens, name in ((1, "rows in registers"), (64, "rows in registers"), (65, "rebuild")):
        assert gpu.kernel(Call(few, torch.bfloat16, "cuda", tokens)).startswith(name)
    assert "M=7 neither divides" in gpu.kernel(Call(shape, torch.bfloat16, "cuda", 1))


# --- plans ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    spec=st.sampled_from(["1:2", "2:4", "1:8", "1:16", "3:16", "1:32", "4:64", "1:256", "1:16@16"]),
    out=st.integers(1, 40_000),
    groups=st.integers(1, 700),
    tokens=st.integers(1, 300),
    # Cards of sm_80 and newer have 99 KiB and more.
    card=st.sampled_from([Card(), Card(108, 166_912), Card(84, 101_376), Card(16, 101_376)]),
)
def test_plans_cover_everything_and_fit(
    spec: str, out: int, groups: int, tokens: int, card: Card
) -> None:
    m = int(spec.split("@")[0].split(":")[1])
    shape = Shape.of(out, m * groups * (4 if "@" in spec else 1), spec)
    plan = gpu_cuts.plan(shape, False, tokens, card)
    if plan is None:
        # 1,024 inputs of 64 tokens, the least that M = 256 can be cut to, are 128 KiB.
        few = tokens <= gpu_plan.most_tokens(shape)
        assert not few or (m == 256 and tokens > 8 and card.shared < 150_000)
        return
    c = {"RT": 1, **dict(plan.kernel.constants)}
    assert plan.shared <= card.shared
    if plan.kernel.function == "lookup":  # chunks are words of codes
        c |= {"NT": 1, "CHUNK": 32 // shape.bits * shape.m // shape.n, "SLICES": c["SLICES"]}
        assert tokens <= c["TOKENS"]
        assert plan.chunks % (2 * c["SLICES"]) == 0
    assert plan.grid[0] * (c["WARPS"] // c["SLICES"] * c["RT"]) >= shape.tiles
    assert plan.grid[1] * plan.chunks * c["CHUNK"] >= shape.inputs
    assert (plan.grid[1] - 1) * plan.chunks * c["CHUNK"] < shape.inputs
    assert plan.grid[2] * c["NT"] * 8 >= tokens
    assert plan.kernel.function == "lookup" or c["CHUNK"] % gpu_plan.unit(shape) == 0
    assert c["WARPS"] % c["SLICES"] == 0
    assert max(plan.grid[1:]) < 65_536


# --- machine code -----------------------------------------------------------------------------


def _disassembler() -> str:
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for found in Path(place).rglob("bin/nvdisasm"):
            return str(found)
    return ""


def machine_code(kernel: Kernel, architecture: int, folder: Path) -> list[str]:
    """The names of the instructions of a kernel's function, in order."""
    path = folder / "kernel.cubin"
    path.write_bytes(gpu_driver.compile_kernel(kernel, architecture))
    command = [_disassembler(), "-c", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    own = text.split(f".text.{kernel.function}:")[1].split("\n.section")[0]
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", own)


# The most instructions from the first product to the last, a block of 16 x 16 weights.
BUDGET = {
    ("1:16", 1): 12,
    ("1:8", 1): 13,
    ("1:4", 1): 15,
    ("2:4", 1): 29,
    ("1:32", 1): 12,
    ("1:16", 16): 13,
    ("1:8", 64): 27,
    ("1:16@16", 1): 16,
}


@needs_nvrtc
@pytest.mark.skipif(not _disassembler(), reason="no nvdisasm: pip install 'nmflow[gpu-dev]'")
@pytest.mark.parametrize(
    "architecture",
    [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("spec", "tokens"), BUDGET)
def test_machine_code_stays_in_registers_and_in_its_budget(
    spec: str, tokens: int, architecture: int, tmp_path: Path
) -> None:
    """A buffer that is indexed by a variable would go to local memory and cost half the speed."""
    numbers = (8, 1, 2, 8, 2) if tokens == 64 else (16, 4, 2, 1, 2)
    plan = gpu_plan.make(Shape.of(11008, 4096, spec), False, tokens, Card(), *numbers)
    assert plan is not None
    names = machine_code(plan.kernel, architecture, tmp_path)
    kinds = Counter(name.split(".")[0] for name in names)
    assert not kinds["STL"] + kinds["LDL"]
    products = [i for i, name in enumerate(names) if name.startswith("HMMA")]
    assert products
    blocks = len(products) / dict(plan.kernel.constants)["NT"]
    assert (products[-1] - products[0] + 1) / blocks <= BUDGET[spec, tokens]


def _loop(names: list[str], what: str) -> list[str]:
    """The instructions from the first of a kind to the last."""
    places = [i for i, name in enumerate(names) if name.startswith(what)]
    return names[places[0] : places[-1] + 1]


# (kind, pattern, tokens, numbers): the most instructions for 16 x 16 weights of a warp group, and
# for 256 kept weights without fragments.
OTHER_BUDGETS = [
    ("groups", "1:16", 1, (16, 1, 1, 1, 3), 9),
    ("groups", "1:8", 16, (8, 1, 1, 1, 3), 9),
    ("groups", "1:8", 64, (16, 1, 1, 1, 3), 10),
    ("groups", "2:4", 64, (8, 1, 1, 1, 3), 18),
    ("ready", "1:8", 64, (16, 1, 1, 1, 3), 10),
    ("ready", "1:8", 32, (16, 1, 1, 1, 4), 10),
    ("ready", "1:16", 64, (16, 1, 2, 1, 2), 10),
    ("lookup", "1:8", 1, (8, 2, 1, 1, 4), 45),
    ("lookup", "2:4", 1, (8, 2, 1, 1, 4), 45),
    ("lookup", "1:16", 4, (16, 2, 1, 2, 4), 68),
]


@needs_nvrtc
@pytest.mark.skipif(not _disassembler(), reason="no nvdisasm: pip install 'nmflow[gpu-dev]'")
@pytest.mark.parametrize(("kind", "spec", "tokens", "numbers", "most"), OTHER_BUDGETS)
def test_machine_code_of_other_kernels(
    kind: str, spec: str, tokens: int, numbers: Any, most: int, tmp_path: Path
) -> None:
    """Products of warp groups follow one another; a compiler that cannot keep them apart waits."""
    shape = Shape.of(11008, 4096, spec)
    plan = gpu_plan.make(shape, False, tokens, Card(), *numbers, kind=kind)
    assert plan is not None
    names = machine_code(plan.kernel, 90, tmp_path)
    assert not any(name.startswith(("LDL", "STL")) for name in names)
    if kind == "lookup":  # from the first look at x to the last word that is fetched
        first = next(i for i, name in enumerate(names) if name.startswith("LDS"))
        last = max(i for i, name in enumerate(names) if name.startswith("LDG.E.NA"))
        assert (last - first) / numbers[-1] <= most
        return
    loop = _loop(names, "HGMMA")
    products = sum(name.startswith("HGMMA") for name in loop)
    waits = sum(name.startswith("WARPGROUP.DEPBAR") for name in loop)
    assert waits < products / 2
    assert len(loop) / products <= most


@needs_nvrtc
@pytest.mark.skipif(not _disassembler(), reason="no nvdisasm: pip install 'nmflow[gpu-dev]'")
@pytest.mark.parametrize(
    "cut", [gpu_panels.Group(64, 256, 1, 32, 3, 3), gpu_panels.Group(128, 256, 2, 32, 4, 1)]
)
def test_machine_code_of_panels(cut: gpu_panels.Group, tmp_path: Path) -> None:
    shape = Shape.of(11008, 4096, "1:16@128")
    names = machine_code(gpu_panels.kernel_of(shape, cut, False, 0), 90, tmp_path)
    assert not any(name.startswith(("LDL", "STL")) for name in names)
    loop = _loop(names, "HGMMA")
    assert sum(name.startswith("HGMMA") for name in loop) == cut.entries / 16
    assert not any(name.startswith("WARPGROUP") for name in loop)


@needs_nvrtc
def test_what_does_not_compile_is_told() -> None:
    assert {80, 90} <= set(gpu_driver.architectures())
    with pytest.raises(CompressError, match=r"NVRTC does not compile decode\.cu.*N"):
        gpu_driver.compile_kernel(Kernel("decode.cu", "decode"), 90)
    with pytest.raises(CompressError, match="no architecture of sm_20"):
        gpu_driver.compile_kernel(Kernel("expand.cu", "expand"), 20)
    ptx = gpu_driver.compile_kernel(Kernel("expand.cu", "expand"), 999)  # newer than the compiler
    assert b".visible .entry expand" in ptx


# --- the driver -------------------------------------------------------------------------------


class FakeCuda:
    """Notes the calls of the driver's library and answers 0, or an error where it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failing = ""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append((name, args))
            if name == "cuDeviceGetAttribute":
                args[0]._obj.value = {16: 132, 97: 232_448}[args[1]]
            if name == "cuModuleGetFunction":
                args[0]._obj.value = 4711
            if name == "cuGetErrorString":
                args[1]._obj.value = b"out of memory"
            return 2 if name == self.failing else 0

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    library = FakeCuda()
    monkeypatch.setattr(gpu_driver, "_cuda", lambda: library)
    monkeypatch.setattr(gpu_driver, "compile_kernel", lambda kernel, architecture: b"code")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77)
    )
    return library


def test_launches_are_loaded_once_and_leave_the_context_as_it_was(fake: FakeCuda) -> None:
    driver = gpu_driver.Driver(0)
    assert driver.card == Card(132, 232_448, groups=True)
    assert driver.architecture == 90
    kernel = Kernel("expand.cu", "expand")
    for _ in range(2):
        driver.launch(kernel, (3, 2, 1), 256, 4096, [ctypes.c_int(5), ctypes.c_void_p(9)])
    names = [name for name, _ in fake.calls]
    assert names.count("cuModuleLoadData") == 1
    launches = [args for name, args in fake.calls if name == "cuLaunchKernel"]
    assert len(launches) == 2
    assert launches[0][0].value == 4711
    assert launches[0][1:8] == (3, 2, 1, 256, 1, 1, 4096)
    assert launches[0][8].value == 77
    assert names.count("cuCtxPushCurrent_v2") == names.count("cuCtxPopCurrent_v2") == 2


def test_a_launch_that_fails_says_why_and_leaves_the_context(fake: FakeCuda) -> None:
    driver = gpu_driver.Driver(0)
    fake.failing = "cuLaunchKernel"
    with pytest.raises(CompressError, match="cuLaunchKernel of expand on GPU 0 failed: out of"):
        driver.launch(Kernel("expand.cu", "expand"), (1, 1, 1), 32, 0, [])
    assert fake.calls[-1][0] != "cuLaunchKernel"
    assert "cuCtxPopCurrent_v2" in [name for name, _ in fake.calls]


@pytest.mark.parametrize(
    ("there", "hip", "capability", "why"),
    [
        (False, None, (9, 0), "torch finds no GPU"),
        (True, "6.2", (9, 0), "built for AMD"),
        (True, None, (7, 0), r"sm_70, and fragments need sm_80 or newer"),
    ],
)
def test_reasons(
    there: bool, hip: str | None, capability: tuple[int, int], why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    gpu_driver.why_not.cache_clear()
    try:
        call = Call(Shape.of(64, 64, "1:16"), torch.bfloat16, "cuda", 1)
        assert re.search(why, gpu.why_not(call) or "")
        choice = choose(call)
        assert choice.backend == "reference"
        assert re.search(why, str(choice))
    finally:
        gpu_driver.why_not.cache_clear()


def test_other_dtypes_are_left_to_the_reference() -> None:
    call = Call(Shape.of(64, 64, "1:16"), torch.float32, "cuda", 1)
    assert "bfloat16 and float16" in (gpu.why_not(call) or "")
    assert gpu.why_not(Call(call.shape, torch.bfloat16, "cpu", 1)) is not None
    assert LANES == 16
