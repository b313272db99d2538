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
text = ptx(panels, {**rows, "codes_ptr": "*u8"}, {"tokens": "i32", "out": "i32"}, block,
           wide=("tokens", "out"), num_warps=4, num_stages=4)
check(text, "wgmma.mma_async", "cp.async")

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
