"""The mask kernel in Triton; imported by `nmflow.masks.triton` alone, where Triton is there."""

# Types here are of Triton's language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _other(value, w, delta, pull, scale_ptr):
    """What a pruned place becomes."""
    # No product with 0, which would make -0.0 of pruned negatives.
    other = tl.where(delta == 0.0, 0.0, value * delta)
    if pull is not None:
        strength = pull
        if scale_ptr is not None:
            strength = pull * tl.load(scale_ptr).to(tl.float32)
        other += strength * w
    return other


@triton.jit
def _tile(
    w_ptr,
    values_ptr,  # None: w
    out_ptr,  # None: nothing is written of w
    mask_ptr,  # None: nor of what is kept
    fine_ptr,
    scale_ptr,  # None: 1
    total,
    inner,
    n,
    delta,
    pull,  # None: 0
    block,  # of tiles along memory
    beside,  # and among the groups that lie side by side
    M: tl.constexpr,  # the size of a group
    P: tl.constexpr,  # M, or the next power of two
    R: tl.constexpr,  # groups in a tile
    AXIS: tl.constexpr,  # of a tile (groups, P) or (P, groups), along which a group lies
    KIND: tl.constexpr,  # 0: every weight is kept; 1: one of each group; 2: n of each group
    LOWEST: tl.constexpr,  # the lowest bit of a float32 that the dtype can set
):
    """A tile of groups: which weights are kept, and what is written of them."""
    place, column = tl.arange(0, R), tl.arange(0, P)
    if AXIS == 1:  # groups lie in one piece
        start = (block.to(tl.int64) * R + place) * M
        at = start[:, None] + column[None, :]
        valid = (column[None, :] < M) & (at < total)
    else:  # `inner` groups side by side
        i = beside * R + place
        row = block.to(tl.int64) * M + column
        at = row[:, None] * inner + i[None, :]
        valid = (column[:, None] < M) & (i[None, :] < inner)
    stored = tl.load(w_ptr + at, mask=valid, other=0.0)
    w = stored.to(tl.float32)
    # The bits of |w| are ordered as |w| is, and those of what is not finite come last.
    key = tl.abs(w).to(tl.int32, bitcast=True)
    worst = tl.max(tl.max(key, 1), 0)
    # No masked store: the interpreter of Triton 3.2 heeds no mask of a scalar.
    if worst >= 0x7F800000:
        tl.store(fine_ptr, 0)
    key = tl.where(valid, key, -1)
    if KIND == 0:
        kept = valid
    elif KIND == 1:
        best = tl.argmax(key, AXIS, tie_break_left=True)
        kept = tl.expand_dims(column, 1 - AXIS) == tl.expand_dims(best, AXIS)
    else:
        # The n-th largest key, bit by bit; of those that equal it the first fill the rest.
        least = tl.zeros([R], tl.int32)
        for b in range(31 - LOWEST):
            trial = least | (1 << (30 - b))
            wide = tl.expand_dims(trial, AXIS)
            enough = tl.sum((key >= wide).to(tl.int32), AXIS) >= n
            least = tl.where(enough, trial, least)
        least = tl.expand_dims(least, AXIS)
        above, equal = key > least, key == least
        room = tl.expand_dims(n - tl.sum(above.to(tl.int32), AXIS), AXIS)
        kept = above | (equal & (tl.cumsum(equal.to(tl.int32), AXIS) <= room))
    if mask_ptr is not None:
        tl.store(mask_ptr + at, kept.to(tl.uint8), mask=valid)
    if out_ptr is not None:
        value = w
        if values_ptr is not None:
            value = tl.load(values_ptr + at, mask=valid, other=0.0).to(tl.float32)
        other = _other(value, w, delta, pull, scale_ptr)
        tl.store(out_ptr + at, tl.where(kept, value, other).to(stored.dtype), mask=valid)


@triton.jit
def project(
    w_ptr,
    values_ptr,
    out_ptr,
    mask_ptr,
    fine_ptr,
    scale_ptr,
    total,
    inner,
    n,
    delta,
    pull,
    M: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    AXIS: tl.constexpr,
    KIND: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """A tile of one weight."""
    block, beside = tl.program_id(0), tl.program_id(1)
    _tile(
        w_ptr, values_ptr, out_ptr, mask_ptr, fine_ptr, scale_ptr, total, inner, n, delta, pull,
        block, beside, M, P, R, AXIS, KIND, LOWEST,
    )  # fmt: skip


@triton.jit
def project_all(
    jobs_ptr,  # addresses of w, values and out; total, inner, its first block, tiles side by side
    owner_ptr,  # the job of each block
    like_ptr,  # of the dtype of all
    fine_ptr,
    scale_ptr,
    delta_ptr,  # None: `delta` is δ
    n,
    delta,
    pull,
    M: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    AXIS: tl.constexpr,
    KIND: tl.constexpr,
    LOWEST: tl.constexpr,
    VALUES: tl.constexpr,  # whether what is written is made of other values than w
    ALIGNED: tl.constexpr,  # whether every address and every size is a multiple of 16
):
    """A tile of one of many weights."""
    job_ptr = jobs_ptr + tl.load(owner_ptr + tl.program_id(0)) * 7
    kind = tl.pointer_type(like_ptr.dtype.element_ty)
    w_ptr = tl.load(job_ptr).to(kind)
    values_ptr = tl.load(job_ptr + 1).to(kind)
    out_ptr = tl.load(job_ptr + 2).to(kind)
    total, inner = tl.load(job_ptr + 3), tl.load(job_ptr + 4)
    if ALIGNED:  # else Triton would read value by value
        total = tl.multiple_of(total, 16)
        w_ptr = tl.multiple_of(w_ptr, 16)
        values_ptr = tl.multiple_of(values_ptr, 16)
        out_ptr = tl.multiple_of(out_ptr, 16)
    place = tl.program_id(0) - tl.load(job_ptr + 5)
    wide = tl.load(job_ptr + 6)
    block, beside = place // wide, place % wide
    if delta_ptr is not None:
        delta = tl.load(delta_ptr)
    if VALUES:
        _tile(
            w_ptr, values_ptr, out_ptr, None, fine_ptr, scale_ptr, total, inner, n, delta, pull,
            block, beside, M, P, R, AXIS, KIND, LOWEST,
        )  # fmt: skip
    else:
        _tile(
            w_ptr, None, out_ptr, None, fine_ptr, scale_ptr, total, inner, n, delta, pull,
            block, beside, M, P, R, AXIS, KIND, LOWEST,
        )  # fmt: skip


@triton.jit
def hold_all(
    jobs_ptr,  # addresses of w, values, out and the mask; total, its first block
    owner_ptr,  # the job of each block
    like_ptr,  # of the dtype of all
    fine_ptr,
    scale_ptr,
    delta_ptr,  # None: `delta` is δ
    delta,
    pull,
    B: tl.constexpr,  # weights of a block
    VALUES: tl.constexpr,  # whether what is written is made of other values than w
    ALIGNED: tl.constexpr,  # whether every address and every size is a multiple of 16
):
    """A block of one of many weights whose masks are there already."""
    job_ptr = jobs_ptr + tl.load(owner_ptr + tl.program_id(0)) * 6
    kind = tl.pointer_type(like_ptr.dtype.element_ty)
    w_ptr = tl.load(job_ptr).to(kind)
    values_ptr = tl.load(job_ptr + 1).to(kind)
    out_ptr = tl.load(job_ptr + 2).to(kind)
    mask_ptr = tl.load(job_ptr + 3).to(tl.pointer_type(tl.uint8))
    total = tl.load(job_ptr + 4)
    if ALIGNED:
        total = tl.multiple_of(total, 16)
        w_ptr = tl.multiple_of(w_ptr, 16)
        values_ptr = tl.multiple_of(values_ptr, 16)
        out_ptr = tl.multiple_of(out_ptr, 16)
        mask_ptr = tl.multiple_of(mask_ptr, 16)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr)
    at = (tl.program_id(0) - tl.load(job_ptr + 5)) * B + tl.arange(0, B)
    valid = at < total
    stored = tl.load(values_ptr + at, mask=valid, other=0.0)
    value = stored.to(tl.float32)
    w = value  # where nobody needs W, such as for the masked rule, it is not read
    if pull is not None:  # noqa: SIM102 -- Triton's `and` is no short circuit everywhere
        if VALUES:
            w = tl.load(w_ptr + at, mask=valid, other=0.0).to(tl.float32)
    if tl.max(tl.abs(w).to(tl.int32, bitcast=True), 0) >= 0x7F800000:
        tl.store(fine_ptr, 0)
    kept = tl.load(mask_ptr + at, mask=valid, other=1) != 0
    other = _other(value, w, delta, pull, scale_ptr)
    tl.store(out_ptr + at, tl.where(kept, value, other).to(stored.dtype), mask=valid)


@triton.jit
def fingerprints(
    jobs_ptr,  # addresses of a matrix and of its factors; the words of a row, its first block
    owner_ptr,  # the matrix of each block
    like_ptr,  # of the dtype of the words
    prints_ptr,
    B: tl.constexpr,  # words of a step
):
    """A row of one of many matrices: its words times constants, modulo 2⁶⁴."""
    block = tl.program_id(0)
    job_ptr = jobs_ptr + tl.load(owner_ptr + block) * 4
    words = tl.load(job_ptr + 2)
    row = block - tl.load(job_ptr + 3)
    words_ptr = tl.load(job_ptr).to(tl.pointer_type(like_ptr.dtype.element_ty)) + row * words
    odd_ptr = tl.load(job_ptr + 1).to(tl.pointer_type(tl.int64))
    sums = tl.zeros([B], tl.int64)
    for first in range(0, words, B):
        at = first + tl.arange(0, B)
        word = tl.load(words_ptr + at, mask=at < words, other=0).to(tl.int64)
        sums += word * tl.load(odd_ptr + at, mask=at < words, other=0)
    tl.store(prints_ptr + block, tl.sum(sums, 0))
