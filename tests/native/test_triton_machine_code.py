"""The Triton kernels compiled for an H100, without one: what Triton's interpreter cannot show."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow

# In a process of its own, since the interpreter is chosen when Triton is imported.
CODE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nmflow.kernels import gpu_steps_kernel as steps
from nmflow.kernels.gpu_panels_kernel import panels
from nmflow.masks.triton_kernel import hold_all, project_all

def ptx(kernel, pointers, numbers, constants, **options):
    signature = {**pointers, **numbers, **{name: "constexpr" for name in constants}}
    names = [name for name in kernel.arg_names]
    signature = {name: signature[name] for name in names}
    at = {(names.index(name),): value for name, value in constants.items()}
    known = (*pointers, *options.pop("wide", ()))
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in known}
    source = ASTSource(kernel, signature=signature, constexprs=at, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

def check(text, *wanted):
    assert ".local" not in text, "local memory"
    for some in wanted:
        assert some in text, some

rows = {name: "*bf16" for name in ("xt_ptr", "values_ptr", "bias_ptr", "y_ptr")}
block = dict(V=64, ENTRIES=256, PER_SPAN=1, SPAN=16, BV=64, BK=64, BT=128, BIAS=True, EPILOGUE=1)
numbers = ("tokens", "out", "stride")
text = ptx(panels, {**rows, "codes_ptr": "*u8"}, {name: "i32" for name in numbers}, block,
           wide=numbers, num_warps=4, num_stages=4)
check(text, "wgmma.mma_async", "cp.async")


def step(kernel, pointers, numbers, constants, wide=(), *wanted, **options):
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    kinds = {name: "i32" for name in numbers}
    check(ptx(kernel, signature, kinds, constants, wide=wide, **options), *wanted)

own = dict(V=128, ENTRIES=256, PER_SPAN=1, SPAN=16)
for held in (False, True):
    step(steps.pack, dict(weight_ptr="fp32", kept_ptr="u8", values_ptr="bf16", codes_ptr="u8",
         fits_ptr="i32"), ("out", "inputs", "bits_stride"),
         dict(N=1, M=16, WIDE=16, V=128, REACH=1, HELD=held, G=4, R=64), ("inputs",), num_warps=8)
step(steps.weight_grad, dict(dy_ptr="bf16", xt_ptr="bf16", codes_ptr="u8", sums_ptr="fp32"),
     ("tokens", "out", "xt_stride", "each"), dict(**own, BV=128, BK=64, BT=64),
     ("tokens", "out", "xt_stride", "each"), "wgmma.mma_async", "cp.async",
     num_warps=8, num_stages=3)
step(steps.spread, dict(sums_ptr="fp32", codes_ptr="u8", dw_ptr="fp32"),
     ("out", "inputs", "shares"), dict(**own, BV=128, BK=64))
step(steps.list_entries, dict(codes_ptr="u8", table_ptr="i32", count_ptr="i32"),
     ("inputs", "lists"), dict(N=1, M=16, REACH=1, BC=64, BL=32))
step(steps.entry_sums, dict(dy_ptr="bf16", values_ptr="bf16", sums_ptr="fp32"),
     ("begin", "tokens", "out", "stride"), dict(V=128, ENTRIES=256, BV=64, BK=64, BT=128),
     ("out", "stride"), "wgmma.mma_async", num_warps=4)
step(steps.input_grad, dict(sums_ptr="fp32", table_ptr="i32", count_ptr="i32", dx_ptr="bf16"),
     ("begin", "tokens", "inputs", "lists", "stride"), dict(BC=32, BT=128),
     ("inputs", "stride"), "ld.global.v4", num_warps=8)
step(steps.mend, dict(a_ptr="bf16", b_ptr="fp32", bias_ptr="bf16", c_ptr="bf16", fits_ptr="i32"),
     ("rows", "columns", "depth", "a_row", "a_depth", "b_depth", "b_column"),
     dict(BIAS=True, BM=64, BN=64, BK=32), num_warps=4)

tables = {"jobs_ptr": "*i64", "owner_ptr": "*i32", "like_ptr": "*bf16", "fine_ptr": "*u8"}
shape = dict(M=16, P=16, R=128, AXIS=1, KIND=1, LOWEST=16, ALIGNED=True)
for values in (False, True):
    text = ptx(project_all, tables, {"n": "i32", "delta": "fp32"},
               {**shape, "VALUES": values, "scale_ptr": None, "delta_ptr": None, "pull": None})
    check(text, "ld.global.v4.b32", "st.global.v4.b32")
    text = ptx(hold_all, tables, {"delta": "fp32"},
               {"B": 2048, "ALIGNED": True, "VALUES": values, "scale_ptr": None,
                "delta_ptr": None, "pull": None})
    check(text, "ld.global.v4.b32", "st.global.v4.b32")
print("checked")
"""


def test_no_local_memory_and_wide_loads() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == "checked"
