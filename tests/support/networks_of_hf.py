"""Tiny networks of transformers, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = {"input_ids": torch.arange(12).view(2, 6) + 3}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL)), IDS),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, image_size=32, patch_size=8)
        ),
        PIXELS,
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64,
                        decoder_start_token_id=0)  # pyright: ignore
        ),
        {**IDS, "decoder_input_ids": IDS["input_ids"]},
    ),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)), IDS),
    "llama scaled": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **SMALL, num_key_value_heads=2,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
            )
        ),
        IDS,
    ),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, num_key_value_heads=2)), IDS),
    "qwen3": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
        IDS,
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=64,
                          bos_token_id=0, eos_token_id=0)
        ),
        IDS,
    ),
    "modernbert": (
        lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(
                **SMALL, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2  # pyright: ignore
            )
        ),
        IDS,
    ),
    "swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2],
                          num_heads=[2, 4], window_size=4)
        ),
        PIXELS,
    ),
    "a network of one": (lambda: Head(hf.BertModel(hf.BertConfig(**SMALL))), IDS),
}  # fmt: skip


class Head(nn.Module):
    """No network of transformers itself, but built around one."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(32, 8)

    def forward(self, **inputs: Tensor) -> tuple[Tensor]:
        return (self.head(self.body(**inputs)[0]),)
