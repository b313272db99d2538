"""`from_pretrained`: a packed network out of its folder, whichever library its class is of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from nmflow import disk
from nmflow.errors import ConfigError, FileFormatError
from nmflow.inspect.pretrained import NO_CODE, from_folder
from nmflow.packed.files.architecture import parameters_on_meta
from nmflow.packed.files.companions import CONFIG, INDEX
from nmflow.packed.files.container import is_packed
from nmflow.packed.files.loading import load
from nmflow.text_table import shown

_MODULES = "modules.json"
# What `timm.create_model` takes besides the arguments of an architecture.
_OF_TIMM = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "scriptable", "exportable", "no_jit", "model_name",
)  # fmt: skip


def from_pretrained(source: str | os.PathLike[str]) -> Any:
    """The packed network in a folder, built from the config beside it.

    The config is one of transformers (`config.json` with `model_type`), of timm (`config.json`
    with `architecture`) or of sentence-transformers (`modules.json`). Dense weights are never
    built: the peak of memory is the packed network and one layer. No code of the folder runs.

    Args:
        source: what `nmflow.save` or `save_pretrained` of a packed network wrote.

    Returns:
        The network in evaluation mode; for sentence-transformers a `SentenceTransformer`.

    Raises:
        ConfigError: there is no config, or one that names no known architecture or needs code of
            its own.
        FileFormatError: as `load`.

    Example:
        >>> import tempfile, transformers
        >>> import nmflow
        >>> config = transformers.BertConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...     num_attention_heads=2)
        >>> model = transformers.BertModel(config)
        >>> weight = model.encoder.layer[0].output.dense.weight
        >>> weight.data *= nmflow.mask(weight, "1:16")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nmflow.save(model, folder)
        ...     packed = from_pretrained(folder)
        >>> packed.encoder.layer[0].output.dense.pattern
        Pattern('1:16')
    """
    folder = Path(source)
    if os.path.lexists(folder / _MODULES):
        return _sentence_transformer(folder)
    if not is_packed(folder):
        raise ConfigError(
            f"source is {str(folder)!r}, which holds no packed network: give a folder that "
            "nmflow.save wrote"
        )
    try:
        config = disk.read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"source is {str(folder)!r}, whose {CONFIG} cannot be read "
            f"({shown(str(getattr(error, 'strerror', None) or error), 100)}): build the network "
            "yourself, and call nmflow.load(folder, model)"
        ) from error
    if isinstance(config, dict) and "architecture" in config:
        return load(folder, _timm(folder, config)).eval()
    if not os.path.lexists(folder / INDEX):
        raise ConfigError(
            f"source is {str(folder)!r}, which an older nmflow wrote: load it once with "
            "nmflow.load(folder, model), and save it again"
        )
    return from_folder(folder)


def _timm(folder: Path, config: dict[str, Any]) -> Any:
    """The architecture of timm that a config names, its parameters on `meta`."""
    import timm  # pyright: ignore[reportMissingImports]

    name, given = config["architecture"], config.get("model_args") or {}
    if not isinstance(name, str) or not timm.is_model(name):
        raise ConfigError(
            f"source is {str(folder)!r}, whose {CONFIG} names no architecture of timm: "
            f"{shown(str(name), 80)}"
        )
    if not isinstance(given, dict) or any(key in _OF_TIMM for key in given):
        raise ConfigError(
            f"source is {str(folder)!r}, whose model_args say where to load from: remove them"
        )
    cfg = config.get("pretrained_cfg")
    for key in ("num_classes", "global_pool"):
        if isinstance(config.get(key), int | str):
            given.setdefault(key, config[key])
    try:
        with torch.device("cpu"), parameters_on_meta():
            model = timm.create_model(name, pretrained=False, **given)
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"source is {str(folder)!r}, whose network cannot be built ({shown(str(error), 200)})"
        ) from error
    if isinstance(cfg, dict):
        model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    return model


def _sentence_transformer(folder: Path) -> Any:
    try:
        modules = disk.read_json(folder / _MODULES)
        kinds = [module["type"] for module in modules]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"'{folder / _MODULES}' cannot be read ({shown(str(error), 100)}): save the "
            "SentenceTransformer again"
        ) from error
    for kind in kinds:
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise ConfigError(
                f"source is {str(folder)!r}, whose module {shown(str(kind), 80)} is not one of "
                "sentence-transformers, and nmflow runs no code of a folder"
            )
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    return SentenceTransformer(str(folder), local_files_only=True, **NO_CODE).eval()
