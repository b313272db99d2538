"""One launch on a GPU for many weights: prepared once, run at every step.

A launch from Python takes some 50 µs, as long as several weights. A table on the device has the
addresses of the weights; it is made once for each set of addresses.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmflow.errors import FlowError
from nmflow.masks.triton import Cut, constants, cut_of, power_of_two
from nmflow.pattern import Pattern

_KEPT = 8  # tables of a launch: gradients return to addresses of some steps before
_BLOCK = 2048
_ROOM = 4 << 20  # bytes for the tables of a graph

Number = float | Tensor
"""A number, or a float32 scalar on the device, which a CUDA graph reads at each replay."""


class Job(NamedTuple):
    """One weight among many.

    Attributes:
        w: a weight that `triton.serves` takes; contiguous where there is a mask.
        pattern: N:M without panels.
        dim: the axis that is cut into groups.
        mask: the held mask, contiguous; None makes it from `w`.
    """

    w: Tensor
    pattern: Pattern
    dim: int
    mask: Tensor | None = None


class Launch:
    """The weights of one launch.

    Attributes:
        members: their places among the given jobs.
    """

    def __init__(self, jobs: Sequence[Job], members: Sequence[int]) -> None:
        self.members = list(members)
        some = [jobs[i] for i in members]
        self._w = [job.w for job in some]  # which keeps their memory
        self._masks = [job.mask for job in some]
        self._held = some[0].mask is not None
        self._pattern, first = some[0].pattern, some[0].w
        self._cuts = [cut_of(job.w, job.pattern, job.dim) for job in some]
        grids = [(-(-w.numel() // _BLOCK), 1) for w in self._w]
        grids = grids if self._held else [cut.grid for cut in self._cuts]
        counts = [math.prod(grid) for grid in grids]
        self._grid = (sum(counts),)
        starts = list(itertools.accumulate(counts, initial=0))
        self._fixed = [
            (w.numel(), start) if self._held else (w.numel(), cut.inner, start, grid[1])
            for w, cut, start, grid in zip(self._w, self._cuts, starts, grids, strict=False)
        ]
        self._tables = Tables(counts, first.device)

    def __call__(
        self,
        out: Sequence[int] | None = None,
        values: Sequence[int] | None = None,
        *,
        delta: Number = 0.0,
        pull: float = 0.0,
        scale: Tensor | None = None,
    ) -> Tensor:
        """`triton.project`, or `held.hold`, of all of them.

        Args:
            out: the addresses to write to, each like its weight; None is the weights.
            values: the addresses of the values that are projected; None is the weights.
            delta: δ.
            pull: as for `triton.project`.
            scale: as for it.

        Returns:
            A bool scalar on the device: whether all weights that were read were finite. With held
            masks and no pull, `values` are projected without reading the weights.
        """
        from nmflow.masks import triton_kernel

        first, kernel = self._w[0], triton_kernel
        places = (*(out or ()), None, *(values or ()))
        table = self._tables.of(places, lambda: self._rows(out, values))
        fine = torch.ones((), dtype=torch.bool, device=first.device)
        own = delta if isinstance(delta, Tensor) else None
        common: dict[str, Any] = {
            "jobs_ptr": table.rows,
            "owner_ptr": self._tables.owner,
            "like_ptr": first,
            "fine_ptr": fine.view(torch.uint8),
            "scale_ptr": scale,
            "delta_ptr": own,
            "delta": 0.0 if isinstance(delta, Tensor) else float(delta),
            "pull": float(pull) or None,
            "VALUES": values is not None,
            "ALIGNED": table.aligned,
        }
        run: Any
        with torch.cuda.device_of(first):
            if self._held:
                run = kernel.hold_all
                run[self._grid](B=_BLOCK, **common)
            else:
                run = kernel.project_all
                run[self._grid](**constants(self._pattern, self._cuts[0], first.dtype), **common)
        return fine

    def _rows(
        self, out: Sequence[int] | None, values: Sequence[int] | None
    ) -> tuple[list[tuple[int, ...]], int]:
        """The table's rows, and how many of their first numbers decide the alignment."""
        own = [w.data_ptr() for w in self._w]
        masks = [() if m is None else (m.data_ptr(),) for m in self._masks]
        rows = [
            (*places, *mask, *fixed)
            for *places, mask, fixed in zip(
                own, values or own, out or own, masks, self._fixed, strict=True
            )
        ]
        return rows, 5 if self._held else 4


def launches_of(jobs: Sequence[Job]) -> list[Launch]:
    """As few launches as serve all weights: one for all weights that are cut alike."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, job in enumerate(jobs):
        key: tuple[Any, ...] = (job.w.device, job.w.dtype, job.mask is not None)
        if job.mask is None:
            cut: Cut = cut_of(job.w, job.pattern, job.dim)
            n, m = job.pattern.n, job.pattern.m
            key += (n, m == n, cut.m, cut.groups, cut.inner == 1)
        alike.setdefault(key, []).append(i)
    return [Launch(jobs, members) for members in alike.values()]


class Prints:
    """The fingerprints of many tensors, in a launch for each size of their words.

    Args:
        xs: contiguous tensors on one device.
        odd: for each, int64 factors for the words of a row, on that device.
        words: the integer dtype of the words of all.
    """

    def __init__(self, xs: Sequence[Tensor], odd: Sequence[Tensor], words: torch.dtype) -> None:
        counts = [x.shape[0] if x.ndim else 1 for x in xs]
        starts = list(itertools.accumulate(counts, initial=0))
        self.rows = [slice(*pair) for pair in itertools.pairwise(starts)]
        self._count, self._like = starts[-1], odd[0].view(words)
        self._odd = list(odd)
        self._tables = Tables(counts, odd[0].device)
        places = tuple(x.data_ptr() for x in xs)
        jobs = zip(places, odd, starts, strict=False)
        rows = [(at, o.data_ptr(), len(o), start) for at, o, start in jobs]
        self._table = self._tables.of(places, lambda: (rows, 0))
        self._step = min(1024, power_of_two(max(map(len, odd))))

    def blank(self) -> Tensor:
        """Memory for them: int64, one number for each row."""
        return torch.empty(self._count, dtype=torch.int64, device=self._like.device)

    def __call__(self, out: Tensor | None = None) -> Tensor:
        """`Σⱼ oddⱼ·wⱼ mod 2⁶⁴` over the words w of every row, those of the first tensor first."""
        from nmflow.masks import triton_kernel

        kernel: Any = triton_kernel.fingerprints
        prints = self.blank() if out is None else out
        with torch.cuda.device_of(prints):
            kernel[(self._count,)](
                jobs_ptr=self._table.rows,
                owner_ptr=self._tables.owner,
                like_ptr=self._like,
                prints_ptr=prints,
                B=self._step,
            )
        return prints


class Table(NamedTuple):
    """Numbers on a device, and whether the first ones of every row are multiples of 16."""

    rows: Tensor
    aligned: bool


class Tables:
    """The tables of one launch, by their addresses, and the job of each block.

    Args:
        counts: the blocks of each job.
        device: the device of the tables.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self._device = device
        self.owner = _owners(tuple(counts), device)
        self._known: dict[Any, Table] = {}

    def of(self, places: Any, rows: Callable[[], tuple[list[tuple[int, ...]], int]]) -> Table:
        """The table for some addresses; `rows` gives what is in it, and how much says `aligned`."""
        table = self._known.get(places) or self._make(places, *rows())
        if _captures:
            _captures[0].tables += [table.rows, self.owner]
        return table

    def _make(self, places: Any, numbers: list[tuple[int, ...]], first: int) -> Table:
        if len(self._known) >= _KEPT:
            self._known.pop(next(iter(self._known)))
        aligned = not any(number % 16 for row in numbers for number in row[:first])
        table = Table(_sent(torch.tensor(numbers, dtype=torch.int64), self._device), aligned)
        self._known[places] = table
        return table


# The entry is a function of its key alone.
@functools.lru_cache(64)
def _owners(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The job of each block, of jobs with so many blocks."""
    each = torch.arange(len(counts), dtype=torch.int32)
    return _sent(each.repeat_interleave(torch.tensor(counts)), device)


class _Capture:
    """Tables that a CUDA graph reads: kept for it, and filled when its capture is over.

    Memory that a capture allocates belongs to its graph, which gives it to several tensors in turn:
    earlier tensors would overwrite a table at each replay. So tables are in memory from before the
    capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.tables: list[Tensor] = []
        self.late: list[tuple[Tensor, Tensor]] = []
        self._left = torch.empty(_ROOM, dtype=torch.uint8, device=device)

    def room(self, t: Tensor) -> Tensor:
        """Where a table will be on the device."""
        size = -(-t.nbytes // 16) * 16
        if size > len(self._left):
            raise FlowError(
                f"the tables of a captured step take more than {_ROOM >> 20} MiB, which are the "
                "addresses of some ten thousand weights: step without flow.graphed()"
            )
        there, self._left = self._left[: t.nbytes].view(t.dtype).view(t.shape), self._left[size:]
        self.late.append((there, t))
        return there


_captures: list[_Capture] = []  # the one that runs now, or none


def begin_capture(device: torch.device) -> None:
    """Note that a CUDA graph of work on a device will be captured now."""
    _captures[:] = [_Capture(device)]


def end_capture() -> list[Tensor]:
    """Note that the capture has ended; return the graph's tables, which must live as long as it."""
    capture = _captures.pop()
    for there, t in capture.late:
        there.copy_(t)
    return capture.tables


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """A tensor on its way to a device, without waiting for it."""
    if not _far(device):
        return t
    if _captures:  # no copy from the host may be captured
        return _captures[0].room(t)
    return t.pin_memory().to(device, non_blocking=True)


def _far(device: torch.device) -> bool:
    """Whether a tensor has to be copied to the device."""
    return device.type == "cuda"
