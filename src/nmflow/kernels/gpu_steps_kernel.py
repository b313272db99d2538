"""The Triton kernels of training on panels; imported by `nmflow.kernels.gpu_steps` alone."""

# Types here are of Triton's language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def pack(
    weight_ptr,
    kept_ptr,  # bits of a mask, where HELD
    values_ptr,  # tiled, as `nmflow.kernels.layout` has them
    codes_ptr,  # (lists, entries)
    fits_ptr,  # 1; becomes 0 where a group keeps more than N
    out,
    inputs,
    bits_stride,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,  # M, up to a power of two
    V: tl.constexpr,  # rows of a panel
    REACH: tl.constexpr,  # groups that a code reaches over
    HELD: tl.constexpr,
    G: tl.constexpr,  # groups of a block
    R: tl.constexpr,  # rows at a time, a divisor of V
):
    """Choose N columns of each group of a panel, and put its kept weights in tiles."""
    panel, k = tl.program_id(0), tl.arange(0, G * WIDE)
    group, m = tl.program_id(1) * G + k // WIDE, k % WIDE
    groups, entries = inputs // M, inputs // M * N
    column, there = group * M + m, (m < M) & (group < groups)
    used = tl.zeros((G * WIDE,), tl.int32)
    for first in range(0, V, R):
        row = panel * V + first + tl.arange(0, R)
        live = (row < out)[:, None] & there[None, :]
        at = row.to(tl.int64)[:, None] * inputs + column[None, :]
        hit = tl.load(weight_ptr + at, mask=live, other=0.0) != 0.0
        if HELD:
            at = row.to(tl.int64)[:, None] * bits_stride + (column // 8)[None, :]
            bits = tl.load(kept_ptr + at, mask=live, other=0).to(tl.int32)
            hit = hit | ((bits >> (column % 8)[None, :] & 1) != 0)
        used = tl.maximum(used, tl.max((hit & live).to(tl.int32), 0))
    used = tl.reshape(used, (G, WIDE))
    free = tl.reshape(there.to(tl.int32), (G, WIDE)) * (1 - used)
    count = tl.sum(used, 1)
    if tl.max(count) > N:
        tl.atomic_min(fits_ptr, 0)
    filled = free * (tl.cumsum(free, 1) <= (N - count)[:, None]).to(tl.int32)
    chosen = used + filled
    rank = tl.reshape(tl.cumsum(chosen, 1) - 1, (G * WIDE,))
    keep = (tl.reshape(chosen, (G * WIDE,)) != 0) & (rank < N) & there
    entry = group * N + rank
    code = m + group % REACH * M
    tl.store(codes_ptr + panel.to(tl.int64) * entries + entry, code.to(tl.uint8), mask=keep)
    pairs = (entries + 1) // 2
    for first in range(0, V, R):
        row = panel * V + first + tl.arange(0, R)
        at = row.to(tl.int64)[:, None] * inputs + column[None, :]
        live = (row < out)[:, None] & keep[None, :]
        w = tl.load(weight_ptr + at, mask=live, other=0.0)
        tile = (row // 16).to(tl.int64)[:, None] * pairs + (entry // 2)[None, :]
        to = tile * 32 + (row % 16 * 2)[:, None] + (entry % 2)[None, :]
        inside = (row < (out + 15) // 16 * 16)[:, None] & keep[None, :]
        tl.store(values_ptr + to, w.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weight_grad(
    dy_ptr,
    xt_ptr,
    codes_ptr,
    sums_ptr,  # (shares, out, entries)
    tokens,
    out,
    xt_stride,
    each,  # tokens of a share, a multiple of BT
    V: tl.constexpr,
    ENTRIES: tl.constexpr,
    PER_SPAN: tl.constexpr,
    SPAN: tl.constexpr,
    BV: tl.constexpr,  # rows of a block, a share of a panel
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """Rows (BV, BT) of dyᵀ by what a panel keeps (BT, BK) of x, for a share of the tokens."""
    row = tl.program_id(0) * BV + tl.arange(0, BV)
    e = tl.program_id(1) * BK + tl.arange(0, BK)
    live, real = e < ENTRIES, row < out
    list_ptr = codes_ptr + (tl.program_id(0) * BV // V).to(tl.int64) * ENTRIES
    code = tl.load(list_ptr + e, mask=live, other=0).to(tl.int32)
    x_at = (e // PER_SPAN * SPAN + code).to(tl.int64) * xt_stride
    sums = tl.zeros((BV, BK), tl.float32)
    begin = tl.program_id(2) * each
    for first in range(0, each, BT):
        t = begin + first + tl.arange(0, BT)
        there = t < tokens
        dy_at = t.to(tl.int64)[:, None] * out + row[None, :]
        a = tl.load(dy_ptr + dy_at, mask=there[:, None] & real[None, :], other=0.0)
        b_at = x_at[:, None] + t[None, :]
        b = tl.load(xt_ptr + b_at, mask=live[:, None] & there[None, :], other=0.0)
        sums = tl.dot(tl.trans(a), tl.trans(b), sums)
    to = (tl.program_id(2).to(tl.int64) * out + row)[:, None] * ENTRIES + e[None, :]
    tl.store(sums_ptr + to, sums, mask=real[:, None] & live[None, :])


@triton.jit
def spread(
    sums_ptr,
    codes_ptr,
    dw_ptr,  # zeros
    out,
    inputs,
    shares,
    V: tl.constexpr,
    ENTRIES: tl.constexpr,
    PER_SPAN: tl.constexpr,
    SPAN: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    """Add the shares in their order, and write them where they are kept."""
    row = tl.program_id(0) * BV + tl.arange(0, BV)
    e = tl.program_id(1) * BK + tl.arange(0, BK)
    live = e < ENTRIES
    list_ptr = codes_ptr + (tl.program_id(0) * BV // V).to(tl.int64) * ENTRIES
    column = e // PER_SPAN * SPAN + tl.load(list_ptr + e, mask=live, other=0).to(tl.int32)
    inside = (row < out)[:, None] & live[None, :]
    total = tl.zeros((BV, BK), tl.float32)
    for share in range(0, shares):
        at = (row.to(tl.int64) + share * out)[:, None] * ENTRIES + e[None, :]
        total += tl.load(sums_ptr + at, mask=inside, other=0.0)
    to = row.to(tl.int64)[:, None] * inputs + column[None, :]
    tl.store(dw_ptr + to, total.to(dw_ptr.dtype.element_ty), mask=inside)


@triton.jit
def list_entries(
    codes_ptr,
    table_ptr,  # (inputs, lists): the entries of each column, in the panels' order
    count_ptr,  # (inputs,): how many
    inputs,
    lists,
    N: tl.constexpr,
    M: tl.constexpr,
    REACH: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
):
    """Which entries of all panels are of a column."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    group, real = column // M, column < inputs
    code = column % M + group % REACH * M
    entries = inputs // M * N
    count = tl.zeros((BC,), tl.int32)
    for first in range(0, lists, BL):
        panel = first + tl.arange(0, BL)
        live = (panel < lists)[:, None] & real[None, :]
        own, found = tl.zeros((BL, BC), tl.int32), tl.zeros((BL, BC), tl.int32)
        for n in tl.static_range(N):  # pyright: ignore[reportGeneralTypeIssues]
            e = panel[:, None] * entries + (group * N + n)[None, :]
            hit = live & (tl.load(codes_ptr + e, mask=live, other=0).to(tl.int32) == code[None, :])
            own = tl.where(hit, e, own)
            found = found | hit.to(tl.int32)
        at = count[None, :] + tl.cumsum(found, 0) - 1
        to = column.to(tl.int64)[None, :] * lists + at
        tl.store(table_ptr + to, own, mask=found != 0)
        count += tl.sum(found, 0)
    tl.store(count_ptr + column, count, mask=real)


@triton.jit
def entry_sums(
    dy_ptr,
    values_ptr,
    sums_ptr,  # (lists entries, stride): of each entry and token of a share; BT divides stride
    begin,
    tokens,  # the share's last one, and one
    out,
    stride,
    V: tl.constexpr,
    ENTRIES: tl.constexpr,
    BV: tl.constexpr,  # rows at a time, a divisor of V
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """A panel's entries (BK, V) by its rows (V, BT) of dyᵀ."""
    panel, e = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    own = tl.program_id(2) * BT + tl.arange(0, BT)
    t, live = begin + own, e < ENTRIES
    there = t < tokens
    pairs = (ENTRIES + 1) // 2
    sums = tl.zeros((BK, BT), tl.float32)
    for first in range(0, V, BV):
        row = panel * V + first + tl.arange(0, BV)
        real = row < out
        at = ((row // 16).to(tl.int64)[:, None] * pairs + (e // 2)[None, :]) * 32
        at += (row % 16 * 2)[:, None] + (e % 2)[None, :]
        a = tl.load(values_ptr + at, mask=real[:, None] & live[None, :], other=0.0)
        b_at = t.to(tl.int64)[:, None] * out + row[None, :]
        b = tl.load(dy_ptr + b_at, mask=there[:, None] & real[None, :], other=0.0)
        sums = tl.dot(tl.trans(a), tl.trans(b), sums)
    to = (panel * ENTRIES + e).to(tl.int64)[:, None] * stride + own[None, :]
    tl.store(sums_ptr + to, sums.to(sums_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def input_grad(
    sums_ptr,
    table_ptr,
    count_ptr,
    dx_ptr,
    begin,
    tokens,
    inputs,
    lists,
    stride,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    """Add the sums of each column's entries, in the panels' order."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    own = tl.program_id(1) * BT + tl.arange(0, BT)
    t, real = begin + own, column < inputs
    there = t < tokens
    count = tl.load(count_ptr + column, mask=real, other=0)
    total = tl.zeros((BC, BT), tl.float32)
    for i in range(0, tl.max(count)):
        on = i < count
        e = tl.load(table_ptr + column.to(tl.int64) * lists + i, mask=on, other=0)
        at = e.to(tl.int64)[:, None] * stride + own[None, :]
        # What lies past the tokens is read, so that reads are wide, and is not written.
        total += tl.load(sums_ptr + at, mask=on[:, None], other=0.0).to(tl.float32)
    to = t.to(tl.int64)[None, :] * inputs + column[:, None]
    value = total.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + to, value, mask=real[:, None] & there[None, :])


@triton.jit
def mend(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    fits_ptr,
    rows,
    columns,
    depth,
    a_row,
    a_depth,
    b_depth,
    b_column,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """c = a b + bias where a weight does not fit its pattern; else nothing, without a wait.

    As many programs as run at once, since all of them are launched where there is nothing to do.
    """
    if tl.load(fits_ptr) == 0:
        across = (columns + BN - 1) // BN
        blocks = (rows + BM - 1) // BM * across
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row = block // across * BM + tl.arange(0, BM)
            column = block % across * BN + tl.arange(0, BN)
            real, there = row < rows, column < columns
            sums = tl.zeros((BM, BN), tl.float32)
            for first in range(0, depth, BK):
                k = first + tl.arange(0, BK)
                live = k < depth
                a_at = row.to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_depth
                a = tl.load(a_ptr + a_at, mask=real[:, None] & live[None, :], other=0.0)
                b_at = k.to(tl.int64)[:, None] * b_depth + column.to(tl.int64)[None, :] * b_column
                b = tl.load(b_ptr + b_at, mask=live[:, None] & there[None, :], other=0.0)
                sums = tl.dot(a, b.to(a_ptr.dtype.element_ty), sums)
            if BIAS:
                bias = tl.load(bias_ptr + column, mask=there, other=0.0)
                sums += bias.to(tl.float32)[None, :]
            to = row.to(tl.int64)[:, None] * columns + column[None, :]
            value = sums.to(c_ptr.dtype.element_ty)
            tl.store(c_ptr + to, value, mask=real[:, None] & there[None, :])
