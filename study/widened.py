"""bfloat16 products on a CPU that has no instructions for them, through float32.

torch multiplies bfloat16 there about seven times slower than float32. Here the same numbers are
widened, multiplied in float32 and rounded: sums are in float32 in both, in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmflow.packed.onednn import onednn_takes

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""aten's products, and the place of their left matrix among the arguments."""

_kept: list[torch.library.Library] = []


def slow() -> bool:
    """Whether this CPU lacks such instructions."""
    return not onednn_takes(torch.bfloat16)


def widen() -> None:
    """Replace aten's products on CPUs in this process."""
    if not _kept:
        _kept.append(torch.library.Library("aten", "IMPL"))
        for name, left in PRODUCTS.items():
            _kept[0].impl(name, _product(getattr(torch.ops.aten, name).out, left), "CPU")


def _product(out: Any, left: int) -> Any:
    def product(*args: Any, **more: Any) -> Tensor:
        a, b = args[left : left + 2]
        half = a.dtype == torch.bfloat16
        given = [x.float() if half and isinstance(x, Tensor) else x for x in args]
        dtype = torch.float32 if half else a.dtype
        made = out(*given, **more, out=torch.empty((*a.shape[:-1], b.shape[-1]), dtype=dtype))
        return made.bfloat16() if half else made

    return product
