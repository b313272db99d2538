"""Networks to measure: by a short name, any kind of `transformers`, a folder or a hub name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmflow.errors import ConfigError
from nmflow.inspect.pretrained import NO_CODE, from_folder
from nmflow.text_table import one_line

# Short names for the sizes that papers speak of; any other kind of transformers has its defaults.
KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "vit-base": ("vit", {}),
    "vit-large": (
        "vit",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16},
    ),
    "t5-small": ("t5", {}),
    "t5-base": ("t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "bert-base": ("bert", {}),
    "minilm-l6": (
        "bert",
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
         "num_attention_heads": 12},
    ),
}  # fmt: skip


def network(source: str) -> nn.Module:
    """A network in evaluation mode; of an encoder-decoder its encoder.

    Args:
        source: a short name (`vit-base`, `t5-base`), a kind of `transformers` (`gpt2`), both with
            random weights by config; a folder, with the weights in it; or the name of a
            configuration on the hub, with random weights.

    Raises:
        ConfigError: none of them, or transformers cannot build it.
    """
    import transformers

    try:
        if os.path.isdir(source):
            model = from_folder(Path(source), fallback=transformers.AutoModel)
            config = model.config
        else:
            kind, fields = KNOWN.get(source, (source, {}))
            if kind in transformers.CONFIG_MAPPING:
                config = transformers.AutoConfig.for_model(kind, **fields)
            else:
                config = transformers.AutoConfig.from_pretrained(source, **NO_CODE)
            model = transformers.AutoModel.from_config(config, **NO_CODE)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"model is {source!r}: give one of {', '.join(KNOWN)}, a kind of transformers, a "
            f"folder, or a name on the hub ({one_line(error)})"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return model.eval()


def language_model(source: str) -> tuple[Any, Path | None]:
    """A causal language model, float32, in evaluation mode, and its GGUF file if it is one.

    Args:
        source: a GGUF file or a folder, with the weights in it; a kind of `transformers` (`gpt2`)
            or the name of a configuration on the hub, with random weights.

    Raises:
        ConfigError: none of them, or transformers cannot build it.
    """
    import transformers

    file = Path(source)
    try:
        if file.suffix == ".gguf":
            model = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
            )
            return model.eval(), file
        if file.is_dir():
            return from_folder(file, fallback=transformers.AutoModelForCausalLM).float(), None
        if source in transformers.CONFIG_MAPPING:
            config = transformers.AutoConfig.for_model(source)
        else:
            config = transformers.AutoConfig.from_pretrained(source, **NO_CODE)
        model = transformers.AutoModelForCausalLM.from_config(config, **NO_CODE)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"model is {source!r}: give a GGUF file (with nmflow[pretrained]), a folder, a kind of "
            f"transformers or a name on the hub of a causal language model ({one_line(error)})"
        ) from error
    return model.float().eval(), None


def example(model: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """A random input: images of the config's size, or `length` tokens of its vocabulary.

    Raises:
        ConfigError: the network takes something else.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    wanted = getattr(model, "main_input_name", "")
    if wanted == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {wanted: torch.randn(batch, channels, height, width, generator=generator)}
    if wanted == "input_ids":
        ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
        return {wanted: ids}
    raise ConfigError(
        f"model takes {wanted or 'an unknown input'!r}: give networks of images (pixel_values) or "
        "of text (input_ids), or pass your own example to nmflow.bench.bench"
    )
