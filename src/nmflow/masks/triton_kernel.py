"""The mask kernel in Triton; imported by `nmflow.masks.triton` alone, where Triton is there."""

# Types here are of Triton's language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def project(
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
        start = (tl.program_id(0).to(tl.int64) * R + place) * M
        at = start[:, None] + column[None, :]
        valid = (column[None, :] < M) & (at < total)
    else:  # `inner` groups side by side
        i = tl.program_id(1) * R + place
        row = tl.program_id(0).to(tl.int64) * M + column
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
        # No product with 0, which would make -0.0 of pruned negatives.
        other = tl.where(delta == 0.0, 0.0, value * delta)
        if pull is not None:
            strength = pull
            if scale_ptr is not None:
                strength = pull * tl.load(scale_ptr).to(tl.float32)
            other += strength * w
        tl.store(out_ptr + at, tl.where(kept, value, other).to(stored.dtype), mask=valid)
