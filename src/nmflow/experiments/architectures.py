"""Networks that `transformers` lacks, written as its own: `mlp-mixer` and `lstm`.

They are registered with its `Auto` classes, so that a config names them by `kind` like any other,
and `save_pretrained`, `from_pretrained` and the `Trainer` work on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput, ImageClassifierOutput


class MlpMixerConfig(PretrainedConfig):
    """An MLP-Mixer (arXiv 2105.01601): patches, then layers that mix tokens and channels in turn.

    Args:
        image_size: pixels of the square image, a multiple of `patch_size`.
        patch_size: pixels of a square patch.
        num_channels: 1 or 3.
        hidden_size: channels.
        tokens_mlp_dim: width of the MLP across patches.
        intermediate_size: width of the MLP across channels.
        num_hidden_layers: layers.
        dropout: after both MLPs.
        kwargs: arguments of every config, such as `num_labels`.
    """

    model_type = "mlp-mixer"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 512,
        tokens_mlp_dim: int = 256,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 8,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        self.image_size, self.patch_size = image_size, patch_size
        self.num_channels, self.hidden_size = num_channels, hidden_size
        self.tokens_mlp_dim, self.intermediate_size = tokens_mlp_dim, intermediate_size
        self.num_hidden_layers, self.dropout = num_hidden_layers, dropout
        super().__init__(**kwargs)


class LstmConfig(PretrainedConfig):
    """A language model of LSTM layers whose output shares its weights with the embedding.

    Args:
        vocab_size: tokens.
        hidden_size: width of the embedding and of each layer.
        num_hidden_layers: layers.
        dropout: after the embedding, between layers and before the output.
        kwargs: arguments of every config.
    """

    model_type = "lstm"

    def __init__(
        self,
        vocab_size: int = 8000,
        hidden_size: int = 256,
        num_hidden_layers: int = 2,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.dropout = num_hidden_layers, dropout
        super().__init__(**{"tie_word_embeddings": True, **kwargs})


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(nn.functional.gelu(self.fc1(x))))


class _MixerLayer(nn.Module):
    def __init__(self, config: MlpMixerConfig, patches: int) -> None:
        super().__init__()
        width, drop = config.hidden_size, config.dropout
        self.norm_tokens, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_mlp = _Mlp(patches, config.tokens_mlp_dim, drop)
        self.channel_mlp = _Mlp(width, config.intermediate_size, drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm_channels(x))


class MlpMixerForImageClassification(PreTrainedModel):
    """An MLP-Mixer with a linear classifier on the mean patch."""

    config_class = MlpMixerConfig
    base_model_prefix = "mixer"
    main_input_name = "pixel_values"

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__(config)
        size = config.patch_size
        patches = (config.image_size // size) ** 2
        self.patch_embed = nn.Conv2d(config.num_channels, config.hidden_size, size, size)
        self.layers = nn.ModuleList(
            _MixerLayer(config, patches) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 1))
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Logits (batch, classes) of images (batch, channels, size, size), and the loss."""
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        logits: Any = self.classifier(self.norm(x).mean(1))
        loss: Any = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class LstmForCausalLM(PreTrainedModel):
    """LSTM layers between an embedding and an output layer with a shared weight."""

    config_class = LstmConfig
    base_model_prefix = "lstm"
    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        width, layers = config.hidden_size, config.num_hidden_layers
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.dropout = nn.Dropout(config.dropout)
        between = config.dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=between)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):
            # The forget gate, the second quarter of a bias, starts open (Jozefowicz et al., 2015).
            for name, value in module.named_parameters():
                if name.startswith("bias_ih"):
                    value[module.hidden_size : 2 * module.hidden_size].fill_(1.0)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The output, whose weight is the embedding's."""
        return self.lm_head

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        """Logits (batch, length, vocabulary) of the next token, and the loss on `labels`."""
        states, _ = self.lstm(self.dropout(self.embedding(input_ids)))
        logits: Any = self.lm_head(self.dropout(states))
        loss: Any = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            )
        return CausalLMOutput(loss=loss, logits=logits)


def register() -> None:
    """Register both with the `Auto` classes, on import of this module."""
    for config, auto, network in (
        (MlpMixerConfig, AutoModelForImageClassification, MlpMixerForImageClassification),
        (LstmConfig, AutoModelForCausalLM, LstmForCausalLM),
    ):
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
            auto.register(config, network)


register()
