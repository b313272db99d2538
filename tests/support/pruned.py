"""Networks that are pruned without training, for tests of `compress`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from nmflow import mask


def prune(model: Any, pattern: str = "1:8") -> Any:
    """Prune every weight of two or more dimensions that has groups."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            dim = 0 if isinstance(module, Conv1D) else 1
            if parameter.ndim >= 2 and parameter.shape[dim] % int(pattern.split(":")[1]) == 0:
                parameter.data *= mask(parameter, pattern, dim)
    return model.eval()


class Attend(nn.Module):
    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(32, 4, **kwargs)
        self.kdim, self.vdim = self.mha.kdim, self.mha.vdim
        self.batch_first = self.mha.batch_first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        k, v = x[..., : self.kdim], x[..., : self.vdim]
        return self.mha(x, k, v)


def flat(output: Tensor | tuple[Tensor | None, ...]) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([p.double().flatten() for p in parts if p is not None])


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return ViTForImageClassification(config)


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                   vocab_size=64))  # fmt: skip


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=64,
                   bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


NETWORKS = {
    "vit": (vit, {"pixel_values": torch.zeros(2, 3, 16, 16).normal_()}, 0),
    "t5": (t5, {"input_ids": torch.arange(12).view(2, 6)}, 0),
    "gpt2": (gpt2, {"input_ids": torch.arange(12).view(2, 6)}, 0),
}
