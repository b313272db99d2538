"""`nn.MultiheadAttention` with packed projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmflow.errors import CompressError
from nmflow.packed.stands_for import StandsFor


class PackedAttention(StandsFor):
    """Takes the place of an `nn.MultiheadAttention`; same arguments, same results.

    Args:
        attention: the module it stands for; its sizes and flags are copied.
        q: the query projection.
        k: the key projection.
        v: the value projection.
        out: the output projection.

    `in_proj_bias` is None and `_qkv_same_embed_dim` False, which is how `nn.TransformerEncoder`
    is told not to take the fused path that reads dense weights.
    """

    def __init__(
        self, attention: nn.MultiheadAttention, q: nn.Module, k: nn.Module, v: nn.Module,
        out: nn.Module,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim, self.dropout = attention.head_dim, attention.dropout
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.batch_first = attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False
        self.was_one_matrix = attention._qkv_same_embed_dim
        self.dense_names = (
            ("in_proj_weight",)
            if self.was_one_matrix
            else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        )
        self.had_bias = attention.in_proj_bias is not None
        self.q, self.k, self.v, self.out_proj = q, k, v, out
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; raises `CompressError` where that raises."""
        if is_causal and attn_mask is None:
            raise CompressError("is_causal is a hint about attn_mask: pass attn_mask with it")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self.q(query), self.k(key), self.v(value)
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
            added += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            added += 1
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        # As torch, which takes the hint for the mask where nothing else is asked for.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, added)
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = heads[0] @ heads[1].transpose(-2, -1) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, drop, self.training)
            mixed = weights @ heads[2]
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], mask, drop, causal)
        y = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, added: int
    ) -> Tensor | None:
        """One additive mask `(batch or 1, heads or 1, queries or 1, keys)` of both masks."""
        both: Tensor | None = None
        if attn_mask is not None:
            both = _additive(attn_mask, q.dtype)
            both = both.unflatten(0, (-1, self.num_heads)) if both.dim() == 3 else both[None, None]
        if padding is not None:
            pad = _additive(padding, q.dtype)[:, None, None]
            both = pad if both is None else both + pad
        return both if both is None or not added else F.pad(both, (0, added))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
