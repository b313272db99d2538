"""The Triton kernel of panels; imported by `nmflow.kernels.gpu_panels` alone, where Triton is."""

# Types here are of Triton's language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def panels(
    xt_ptr,
    values_ptr,
    codes_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    out,
    stride,  # of xt
    V: tl.constexpr,  # rows of a panel
    ENTRIES: tl.constexpr,  # kept in a row; constant, since Triton's interpreter needs it to be
    PER_SPAN: tl.constexpr,  # kept in the inputs that a code reaches over
    SPAN: tl.constexpr,  # those inputs
    BV: tl.constexpr,  # rows of a block, a share of a panel
    BK: tl.constexpr,  # entries of a step
    BT: tl.constexpr,  # tokens of a block
    BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,  # 0 none, 1 GELU (erf), 2 ReLU
):
    """A block of rows and tokens: kept values (BV, BK) by those rows (BK, BT) of xᵀ."""
    row = tl.program_id(0) * BV + tl.arange(0, BV)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    there, k = token < tokens, tl.arange(0, BK)
    kept = row < (out + 15) // 16 * 16  # tiles are padded with zeros
    pairs = (ENTRIES + 1) // 2
    tile = (row // 16).to(tl.int64) * pairs
    list_ptr = codes_ptr + (tl.program_id(0) * BV // V).to(tl.int64) * ENTRIES
    sums = tl.zeros((BV, BT), tl.float32)
    for first in range(0, ENTRIES, BK):
        e = first + k
        live = e < ENTRIES
        code = tl.load(list_ptr + e, mask=live, other=0).to(tl.int32)
        column = (e // PER_SPAN * SPAN + code).to(tl.int64)
        at = (tile[:, None] + e[None, :] // 2) * 32 + (row % 16)[:, None] * 2 + e[None, :] % 2
        a = tl.load(values_ptr + at, mask=kept[:, None] & live[None, :], other=0.0)
        b_at = column[:, None] * stride + token[None, :]
        b = tl.load(xt_ptr + b_at, mask=live[:, None] & there[None, :], other=0.0)
        sums = tl.dot(a, b, sums)
    real = row < out
    if BIAS:
        sums += tl.load(bias_ptr + row, mask=real, other=0.0).to(tl.float32)[:, None]
    if EPILOGUE == 1:
        sums = 0.5 * sums * (1.0 + tl.erf(sums * 0.70710678118654752))
    if EPILOGUE == 2:
        sums = tl.where(sums < 0.0, 0.0, sums)  # a NaN stays one
    y_at = token.to(tl.int64)[None, :] * out + row[:, None]
    value = sums.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_at, value, mask=real[:, None] & there[None, :])
