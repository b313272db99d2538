"""The compiled mask kernel: magnitude mask and projection of a weight in one pass over memory."""

from __future__ import annotations

import math

import torch

from nmflow.errors import PatternError, WeightError
from nmflow.native import DTYPES, NOT_FINITE, REASONS, library


def _pointer(
    tensor: torch.Tensor | None, name: str, like: torch.Tensor, dtype: torch.dtype
) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.shape != like.shape:
        raise WeightError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}: it must be {dtype} "
            f"{tuple(like.shape)}"
        )
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise WeightError(f"{name} must be a contiguous CPU tensor: pass {name}.contiguous()")
    return tensor.data_ptr()


def project(
    w: torch.Tensor,
    n: int,
    m: int,
    delta: float,
    dense: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    dim: int = -1,
    panel: int = 1,
    values: torch.Tensor | None = None,
    pull: float = 0.0,
) -> bool:
    r"""Magnitude mask and projection of a weight, in one pass over memory.

    Writes any of `dense = w`, `mask` (True for the n largest |w| of every m consecutive elements
    along `dim`) and `out = w * (mask + (1 - mask) * delta)`, +0.0 where pruned if `delta` is 0.

    Args:
        w: contiguous CPU tensor, float32, bfloat16 or float16.
        n: number kept of every `m`; exactly that many, ties to the lowest index.
        m: size of a group.
        delta: what pruned weights are multiplied with, in float32, rounded once to the dtype.
        dense: like `w`, or None.
        mask: bool of `w`'s shape, or None.
        out: like `w`, or None; may be `w` itself, or `values`.
        dim: the axis that is cut into groups; its length is a multiple of `m`.
        panel: consecutive places along axis 0 that share what they keep, the n largest sums of
            their |w|, added in float32 in their order; the last panel may be smaller. Not along
            `dim` itself.
        values: like `w`: what `out` is made of where it is not `w`, such as a gradient.
        pull: adds `pull * w` to pruned places of `out`, in float32, before it is rounded.

    Returns:
        False if `w` holds a NaN or an infinity: what the outputs then hold is unspecified.

    Raises:
        WeightError: a tensor of the wrong dtype, shape, device or layout.
        PatternError: not 1 <= n <= m, the axis is missing or not a multiple of m, or panels are
            asked for along it.
        NMFlowError: the library is not available.

    Example:
        >>> w = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
        >>> out = torch.empty_like(w)
        >>> project(w, 1, 4, 0.5, out=out), out
        (True, tensor([[ 0.5000, -3.0000,  1.0000,  0.2500]]))
    """
    lib = library()
    code = DTYPES.get(w.dtype)
    if code is None:
        raise WeightError(f"w is {w.dtype}: the kernel takes float32, bfloat16 and float16")
    shape = w.shape
    if not -len(shape) <= dim < len(shape):
        raise PatternError(
            f"dim is {dim}, but w has the shape {tuple(shape)}: name one of its axes"
        )
    dim %= len(shape)
    if not 1 <= n <= m or shape[dim] % m:
        raise PatternError(
            f"pattern is '{n}:{m}' along axis {dim} of a weight of shape {tuple(shape)}: it needs "
            f"1 <= N <= M and an axis that is a multiple of M"
        )
    if panel < 1 or (panel > 1 and dim == 0):
        raise PatternError(
            f"panel is {panel} for groups along axis {dim}: panels run along axis 0, so it must be "
            f"at least 1, and 1 where the groups run along axis 0 themselves"
        )
    # Axes between the rows and the groups only repeat the groups: M divides the grouped one.
    outer = shape[0] if dim else 1
    inner = math.prod(shape[dim + 1 :])
    length = math.prod(shape[1 : dim + 1]) if dim else shape[0]
    base = _pointer(w, "w", w, w.dtype)
    status = lib.nmflow_project(
        *(base, code, outer, length, inner, n, m, panel, float(delta)),
        _pointer(values, "values", w, w.dtype),
        float(pull),
        _pointer(dense, "dense", w, w.dtype),
        _pointer(mask, "mask", w, torch.bool),
        _pointer(out, "out", w, w.dtype),
        torch.get_num_threads(),
    )
    if status < 0:
        raise WeightError(f"w of shape {tuple(shape)} {REASONS[status]}")
    return status != NOT_FINITE


def hold(
    w: torch.Tensor,
    mask: torch.Tensor,
    delta: float,
    out: torch.Tensor,
    *,
    values: torch.Tensor | None = None,
    pull: float = 0.0,
    odd: torch.Tensor | None = None,
    prints: torch.Tensor | None = None,
) -> bool:
    r"""Project a weight by a mask that is there already, in one pass over memory.

    Writes `out = v * (mask + (1 - mask) * delta)`, +0.0 where pruned if `delta` is 0, with `v` the
    `values`, or `w` itself.

    Args:
        w: contiguous CPU tensor, float32, bfloat16 or float16.
        mask: bool of `w`'s shape.
        delta: what pruned places are multiplied with, in float32, rounded once to the dtype.
        out: like `w`; may be `w` itself, or `values`.
        values: like `w`, such as a gradient.
        pull: adds `pull * w` to pruned places of `out`, in float32, before it is rounded.
        odd: int64 factors for the words of a row of `out`, see `flow.marks.fingerprint`.
        prints: int64, one for each index of axis 0: gets the fingerprint of `out`.

    Returns:
        False if `w` holds a NaN or an infinity.

    Raises:
        WeightError: a tensor of the wrong dtype, shape, device or layout.
        NMFlowError: the library is not available.

    Example:
        >>> w = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
        >>> out = torch.empty_like(w)
        >>> hold(w, w > 0.75, 0.5, out), out
        (True, tensor([[ 1.0000, -1.5000,  2.0000,  0.2500]]))
    """
    lib = library()
    code = DTYPES.get(w.dtype)
    if code is None:
        raise WeightError(f"w is {w.dtype}: the kernel takes float32, bfloat16 and float16")
    if (odd is None) != (prints is None):
        raise WeightError("odd and prints go together: give both, or none")
    rows = w.shape[0] if w.ndim else 1
    status = lib.nmflow_hold(
        *(_pointer(w, "w", w, w.dtype), code, rows, w.numel() // max(rows, 1)),
        *(_pointer(mask, "mask", w, torch.bool), float(delta)),
        *(_pointer(values, "values", w, w.dtype), float(pull), _pointer(out, "out", w, w.dtype)),
        *(None if odd is None else odd.data_ptr(), None if prints is None else prints.data_ptr()),
        torch.get_num_threads(),
    )
    if status < 0:
        raise WeightError(f"w of shape {tuple(w.shape)} {REASONS[status]}")
    return status != NOT_FINITE


def prints(rows: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """The sums of a contiguous matrix's words times factors, a row each, modulo 2⁶⁴: int64.

    Words have 8 bytes, 4 where 8 do not divide a row, or 2. See `flow.marks.fingerprint`.
    """
    sums = torch.empty(len(rows), dtype=torch.int64)
    status = library().nmflow_prints(
        *(rows.data_ptr(), len(rows), rows.shape[1] * rows.element_size()),
        *(odd.data_ptr(), sums.data_ptr(), torch.get_num_threads()),
    )
    if status < 0:
        raise WeightError(f"rows of shape {tuple(rows.shape)} {REASONS[status]}")
    return sums


def take(x: torch.Tensor, bits: torch.Tensor, starts: torch.Tensor, values: torch.Tensor) -> None:
    """Write the elements of `x` that are kept to `values`, row r from `starts[r]` on.

    Args:
        x: float32, contiguous, on the CPU.
        bits: what is kept, as `kept_values.to_bits` has it.
        starts: int64, one more than rows.
        values: as many as are kept.
    """
    status = library().nmflow_take(
        *(x.data_ptr(), bits.data_ptr(), starts.data_ptr(), len(x), x[0].numel()),
        *(values.data_ptr(), torch.get_num_threads()),
    )
    if status:
        raise WeightError(f"x of shape {tuple(x.shape)} {REASONS[status]}")


def put(
    values: torch.Tensor,
    bits: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    prints: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> bool:
    """Write `values` to the kept places, and 0 elsewhere; with fingerprints, as `hold`.

    Returns:
        Whether the values are finite.
    """
    odd, sums = prints or (None, None)
    status = library().nmflow_put(
        *(values.data_ptr(), bits.data_ptr(), starts.data_ptr(), len(out), out[0].numel()),
        *(out.data_ptr(), None if odd is None else odd.data_ptr()),
        *(None if sums is None else sums.data_ptr(), torch.get_num_threads()),
    )
    if status not in (0, NOT_FINITE):
        raise WeightError(f"out of shape {tuple(out.shape)} {REASONS[status]}")
    return status == 0
