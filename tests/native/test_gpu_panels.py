"""The Triton kernel of panels: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from emulated_gpu import COMPILER, Emulated
from nmflow import mask
from nmflow.kernels.layout import Shape, canonical_from_dense, tiled_from_canonical
from nmflow.kernels.reference import apply_epilogue

pytest.importorskip("triton", reason="Triton is not installed")

from nmflow.kernels import gpu_driver, gpu_panels
from nmflow.kernels.gpu_panels import Block, Group

THERE = torch.cuda.is_available()
if not THERE and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
DEVICE = "cuda" if THERE else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float16, torch.bfloat16] if THERE else [torch.float16]


# Tails of rows (also within a tile), of entries and of tokens; spans of several groups and of one.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spec", "out", "inputs", "tokens", "cut"),
    [
        ("1:16@64", 64, 528, 70, None),
        ("1:16@64", 150, 272, 33, Block(64, 16, 32, 4, 2)),
        ("1:8@128", 200, 136, 17, Block(128, 16, 16, 4, 2)),
        ("1:4@64", 128, 88, 40, Block(64, 16, 32, 4, 2)),
        ("2:32@64", 70, 320, 16, Block(64, 16, 16, 4, 2)),
        ("1:12@192", 192, 144, 16, Block(64, 16, 16, 4, 2)),
    ],
)
@pytest.mark.parametrize("epilogue", [0, 1, 2])
def test_products(
    spec: str, out: int, inputs: int, tokens: int, cut: Block | None, epilogue: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(out, inputs, generator=draw).to(dtype)
    w = torch.where(mask(w, spec), w, torch.zeros((), dtype=dtype))
    shape = Shape.of(out, inputs, spec)
    values, codes = tiled_from_canonical(*canonical_from_dense(w, shape), shape)
    x = torch.randn(tokens, inputs, generator=draw).to(dtype)
    b = torch.randn(out, generator=draw).to(dtype) if epilogue else None
    y = gpu_panels.matmul(
        x.to(DEVICE), values.to(DEVICE), codes.to(DEVICE), None if b is None else b.to(DEVICE),
        shape, epilogue, cut,
    )  # fmt: skip
    wide = torch.zeros(out).double() if b is None else b.double()
    want = apply_epilogue(x.double() @ w.double().t() + wide, epilogue)
    size = x.double().abs() @ w.double().abs().t() + wide.abs()
    tolerance = 2**-10 if dtype == torch.float16 else 2**-7
    assert ((y.cpu().double() - want).abs() <= tolerance * size).all()


@pytest.mark.skipif(not THERE and COMPILER is None, reason="no GPU, and no g++ to emulate one with")
@pytest.mark.parametrize(("rows", "columns", "stride"), [(1, 1, 1), (70, 130, 130), (64, 128, 200)])
def test_turned(rows: int, columns: int, stride: int) -> None:
    x = torch.randn(rows, stride).to(DTYPES[-1]).to(DEVICE)[:, :columns]
    for one in (x, x.t().contiguous().t()):
        y = gpu_panels.turned(one, None if THERE else Emulated())
        assert y.stride(1) == 1
        assert y.stride(0) % 8 == 0
        assert torch.equal(y, one.t())


# ROWS, TOKENS, ACROSS, BK, STAGES; tails of rows, of entries and of tokens.
GROUPS = [
    ("1:16@64", 64, 528, 70, Group(64, 64, 1, 32, 3, 1)),
    ("1:16@64", 150, 272, 136, Group(64, 128, 2, 32, 4, 1)),
    ("1:8@128", 200, 136, 64, Group(128, 128, 2, 32, 3, 1)),
    ("2:32@64", 70, 320, 33, Group(64, 64, 1, 16, 4, 2)),
    ("1:12@192", 192, 144, 16, Group(64, 64, 1, 16, 4, 2)),
    ("1:4@64", 128, 264, 130, Group(64, 128, 1, 32, 2, 1)),
]


@pytest.mark.skipif(THERE or COMPILER is None, reason="a GPU is there, or no g++ to emulate with")
@pytest.mark.parametrize(("spec", "out", "inputs", "tokens", "cut"), GROUPS)
def test_products_by_warp_groups(spec: str, out: int, inputs: int, tokens: int, cut: Group) -> None:
    """x as it comes is turned; x whose tokens lie side by side is taken as it is."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(out, inputs, generator=draw).bfloat16()
    w = torch.where(mask(w, spec), w, torch.zeros((), dtype=w.dtype))
    shape = Shape.of(out, inputs, spec)
    values, codes = tiled_from_canonical(*canonical_from_dense(w, shape), shape)
    x = torch.randn(tokens, inputs, generator=draw).bfloat16()
    b = torch.randn(out, generator=draw).bfloat16()
    side = torch.nn.functional.pad(x.t(), (0, -tokens % 8)).contiguous()[:, :tokens].t()
    size = x.double().abs() @ w.double().abs().t() + b.double().abs()
    for one, epilogue, names in ((x, 0, ["turn", "panels"]), (side, 1, ["panels"])):
        emulated = Emulated()
        y = gpu_panels.matmul(one, values, codes, b, shape, epilogue, cut, emulated)
        assert [kernel.function for kernel, _ in emulated.launched] == names
        want = apply_epilogue(x.double() @ w.double().t() + b.double(), epilogue)
        assert ((y.double() - want).abs() <= 2**-8 * size).all()


def test_which_panels_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from nmflow.masks import triton as masks_triton

    monkeypatch.setattr(gpu_driver, "groups", lambda: False)
    monkeypatch.setattr(masks_triton, "why_not", lambda: "")
    assert gpu_panels.serves(Shape.of(128, 64, "1:16@64"))
    assert gpu_panels.serves(Shape.of(128, 64, "1:4@128"))
    assert not gpu_panels.serves(Shape.of(128, 64, "2:4@64"))  # a dense product is as fast
    assert not gpu_panels.serves(Shape.of(128, 64, "1:16@32"))
    assert not gpu_panels.serves(Shape.of(128, 64, "1:16"))
    monkeypatch.setattr(masks_triton, "why_not", lambda: "no Triton")
    assert not gpu_panels.serves(Shape.of(128, 64, "1:16@64"))
    monkeypatch.setattr(gpu_driver, "groups", lambda: True)
    assert gpu_panels.serves(Shape.of(128, 64, "1:16@64"))
