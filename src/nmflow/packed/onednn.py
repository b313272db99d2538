"""`nn.Linear` on a weight that oneDNN has reordered: the best dense way of many layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


class OneDNNLinear(nn.Linear):
    """An `nn.Linear` that keeps, beside its weight, a copy that oneDNN has reordered.

    The copy is made at the first run without gradients and again when the weight has changed; it
    is no part of the state dict, of pickles or of deep copies. A write through `weight.data` leaves
    no trace that could be seen: move such a layer by `.to(...)`, or compress again.
    """

    tokens: int
    _packed: tuple[Tensor, object, Tensor] | None

    @classmethod
    def of(cls, linear: nn.Linear, tokens: int) -> OneDNNLinear:
        """Take the place of a layer that will meet about that many tokens."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        made.__dict__.update(tokens=tokens, _packed=None)  # plain, past nn.Module's registry
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        weight = self.weight
        if (
            torch.compiler.is_compiling()
            or input.device.type != "cpu"
            or input.dtype != weight.dtype
            or weight.is_inference()
            or torch.is_autocast_enabled("cpu")
            or not onednn_takes(weight.dtype)  # moved to another dtype since it was measured
            or (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        ):
            return F.linear(input, weight, self.bias)
        # The weight itself is held: another one could come to lie at its address.
        now = (weight.data_ptr(), weight.dtype, weight.stride(), weight._version)
        held = self._packed
        if held is None or held[0] is not weight or held[1] != now:
            ready = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.tokens)
            held = self.__dict__["_packed"] = (weight, now, ready)
        multiply = torch.ops.mkldnn._linear_pointwise
        return multiply(input, held[2], self.bias, "none", [], "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # oneDNN's own tensors cannot be copied
