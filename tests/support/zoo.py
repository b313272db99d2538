"""Every architecture of transformers, timm and diffusers, as a model on the meta device."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Which class of a model type is built: the first of these mappings that has one.
_TASKS = (
    "FOR_CAUSAL_LM", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_MULTIMODAL_LM",
    "FOR_SPEECH_SEQ_2_SEQ", "FOR_MASKED_LM", "FOR_IMAGE_CLASSIFICATION",
    "FOR_SEQUENCE_CLASSIFICATION", "FOR_CTC", "FOR_AUDIO_CLASSIFICATION",
    "FOR_VIDEO_CLASSIFICATION", "FOR_OBJECT_DETECTION", "FOR_SEMANTIC_SEGMENTATION",
    "FOR_UNIVERSAL_SEGMENTATION", "FOR_DEPTH_ESTIMATION", "FOR_PRETRAINING", "",
)  # fmt: skip
_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
_LAYERS = 4
# What a default configuration lacks.
_GIVEN: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "nemotron": {"num_key_value_heads": 8},
    "ministral": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
}
_DIFFUSERS = (
    "FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel",
    "UNet2DConditionModel", "DiTTransformer2DModel", "AuraFlowTransformer2DModel",
    "HunyuanDiT2DModel", "CogVideoXTransformer3DModel", "SanaTransformer2DModel",
    "LTXVideoTransformer3DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel",
    "AutoencoderKL",
)  # fmt: skip


class NotBuilt(Exception):
    """Why a type cannot be built here."""


def transformers_types() -> list[str]:
    """Every model type that has a configuration."""
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def timm_types() -> list[str]:
    """One model of each of timm's modules: the one with the shortest name."""
    timm = _imported("timm")
    by_module = timm.models._registry._module_to_models
    return sorted(min(names, key=lambda n: (len(n), n)) for names in by_module.values() if names)


def diffusers_types() -> list[str]:
    """Denoisers and an autoencoder of diffusers."""
    _imported("diffusers")
    return list(_DIFFUSERS)


def build(library: str, name: str) -> nn.Module:
    """A model on the meta device, its default size, with at most four layers.

    Raises:
        NotBuilt: it has no model class, or its default configuration builds none.
    """
    with _quiet(), torch.device("meta"):
        if library == "timm":
            timm = _imported("timm")
            return timm.create_model(name)
        if library == "diffusers":
            try:
                return getattr(_imported("diffusers"), name)()
            except (TypeError, ValueError) as error:
                raise NotBuilt(f"{type(error).__name__}: {error}") from error
        return _of_transformers(name)


def _of_transformers(name: str) -> nn.Module:
    import transformers
    from transformers.models.auto import modeling_auto

    failed = "it has no model class"
    for task in _TASKS:
        mapping = f"MODEL_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES"
        classes = getattr(modeling_auto, mapping, {}).get(name)
        if not classes:
            continue
        for small in (True, False):  # some cannot be made smaller
            try:
                config = transformers.CONFIG_MAPPING[name](**_GIVEN.get(name, {}))
                if small:
                    _shrink(config)
                kind = getattr(transformers, classes if isinstance(classes, str) else classes[0])
                return kind._from_config(config) if hasattr(kind, "_from_config") else kind(config)
            except Exception as error:  # noqa: BLE001 - whatever a default configuration lacks
                said = " ".join(str(error).split()) or type(error).__name__
                failed = f"{type(error).__name__}: {said[:90]}"
    raise NotBuilt(failed)


def _shrink(config: Any, depth: int = 0) -> None:
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and depth < 3:
            _shrink(value, depth + 1)
    for key in _DEPTHS:
        if isinstance(getattr(config, key, None), int) and getattr(config, key) > _LAYERS:
            with contextlib.suppress(Exception):  # some are properties of other fields
                setattr(config, key, _LAYERS)


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise NotBuilt(f"{name} is not installed ({error})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
