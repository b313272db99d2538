"""The rows of a packed weight, part by part: canonical, and as the layers that hold them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from nmflow.kernels.layout import Shape
from nmflow.packed.attention import PackedAttention
from nmflow.packed.convolution import PackedConv
from nmflow.packed.layout import bytes_to_index
from nmflow.packed.modules import FusedLinear, PackedLinear


class Part(NamedTuple):
    """Output rows `start` to `stop` of a weight in canonical form, or dense rows.

    Attributes:
        shape: None where the rows are dense, which `values` then holds.
        values: kept values, or 8-bit ones if there is a `scale` (of each row).
        places: the index, canonical or `in_bits` as a file holds it; None where the rows are dense.
    """

    start: int
    stop: int
    shape: Shape | None
    values: Tensor
    places: Tensor | None = None
    scale: Tensor | None = None
    in_bits: bool = False

    @property
    def index(self) -> Tensor | None:
        """The canonical index, a byte each; of bits it is made anew at each call."""
        if self.shape is None or self.places is None or not self.in_bits:
            return self.places
        return bytes_to_index(self.places, self.shape.entries, self.shape.m)


def parts_of(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The linear layers, packed or dense, that the rows of each packed weight lie in, in order."""
    if isinstance(module, PackedLinear):
        return {"weight": [module]}
    if isinstance(module, PackedConv):
        return {"weight": [module.linear]}
    if isinstance(module, FusedLinear):
        return {"weight": list(module.parts)}
    if not isinstance(module, PackedAttention):
        return {}
    q, k, v = (_flat(part) for part in (module.q, module.k, module.v))
    if module.was_one_matrix:
        found = {"in_proj_weight": [*q, *k, *v]}
    else:
        found = {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
    found["out_proj.weight"] = _flat(module.out_proj)
    return {n: parts for n, parts in found.items() if any(map(_is_packed, parts))}


def _flat(module: nn.Module) -> list[nn.Module]:
    return list(module.parts) if isinstance(module, FusedLinear) else [module]


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear)
