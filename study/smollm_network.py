"""SmolLM2 as its study trains it: hidden states at hand, and norms that give what products take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm
from transformers import AutoModelForCausalLM

from nmflow.distill import logit_loss


class Norm(nn.Module):
    """Llama's norm in one kernel, whose result every product after it reads without a cast."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.weight, self.eps = old.weight, old.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """In float32, rounded to what products take."""
        made = rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return made.to(torch.bfloat16)


class Network:
    """A Llama with its hidden states at hand. It has no dropout, so it stays in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.eval()

    def __call__(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits for every next token that is there, and the hidden states after each layer."""
        body = self.model.model
        hidden = body.embed_tokens(ids)
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        turned = body.rotary_emb(hidden, position_ids=places)
        states = []
        for layer in body.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=turned)
            states.append(hidden)
        return self.model.lm_head(body.norm(hidden[:, :-1])), states


def taught_loss(logits: Tensor, told: Tensor, ids: Tensor) -> Tensor:
    """Half the text's loss, half the teacher's."""
    return 0.5 * own_loss(logits, ids) + 0.5 * logit_loss(logits, told, temperature=1.0)


def own_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy of the next token."""
    return cross_entropy(logits.flatten(0, -2).float(), ids[:, 1:].flatten())


def loaded(weights: Path) -> Any:
    """The dense network in float32, with frozen embeddings."""
    more, folder = {}, weights
    if weights.is_file():
        more, folder = {"gguf_file": weights.name}, weights.parent
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    model.model.embed_tokens.requires_grad_(False)
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(part, name, Norm(child))
    return model
