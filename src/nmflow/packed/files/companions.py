"""What other libraries read beside a packed network: its config, and an index of its weights."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

# The name under which transformers finds the quantizer, in `quantization_config` of config.json.
METHOD = "nmflow"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# transformers reads each of these before it reads an index.
RIVALS = ("model.safetensors", "pytorch_model.bin")


def is_pretrained(model: nn.Module) -> bool:
    """Whether a module is a network of transformers, without importing transformers."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__ == "transformers.modeling_utils"
        for cls in type(model).__mro__
    )


def saves_adapters(model: nn.Module) -> bool:
    """Whether a network's own `save_pretrained` writes adapters of PEFT, and not the network."""
    of_peft = any(
        cls.__name__ == "PeftModel" and cls.__module__ == "peft.peft_model"
        for cls in type(model).__mro__
    )
    return of_peft or getattr(model, "_hf_peft_config_loaded", False)


def is_timm(model: nn.Module) -> bool:
    """Whether a module is a network that `timm.create_model` builds, without importing timm."""
    timm = sys.modules.get("timm")
    cfg = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, dict) else None
    return timm is not None and isinstance(name, str) and bool(timm.is_model(name))


def companions(model: nn.Module) -> dict[str, str]:
    """Name to text of the files that build the network again; none for a class of your own.

    For a network of transformers: `config.json`, with `quantization_config` in it and without
    `auto_map`, and `generation_config.json`. For one of timm: `config.json`.
    """
    if is_pretrained(model):
        return _of_transformers(model)
    if is_timm(model):
        return {CONFIG: _json(_of_timm(model))}
    return {}


def index_of(names: Iterable[str], file: str, size: int) -> str:
    """The index that tells transformers which file has the tensors."""
    return _json({"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, file)})


def _of_transformers(model: Any) -> dict[str, str]:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # transformers 4 has `torch_dtype`, which 5 calls `dtype`.
    dtype = str(model.dtype).removeprefix("torch.")
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
    values = json.loads(config.to_json_string())
    values.pop("auto_map", None)
    values["quantization_config"] = {"quant_method": METHOD}
    made = {CONFIG: _json(values)}
    if model.can_generate() and model.generation_config is not None:
        made["generation_config.json"] = model.generation_config.to_json_string()
    return made


def _of_timm(model: Any) -> dict[str, Any]:
    said = {k: v for k, v in model.pretrained_cfg.items() if _is_plain(v)}
    made: dict[str, Any] = {"architecture": said["architecture"], "pretrained_cfg": said}
    for name in ("num_classes", "num_features", "global_pool"):
        if isinstance(value := getattr(model, name, None), int | str):
            made[name] = value
    return made


def _is_plain(value: Any) -> bool:
    """Whether JSON can express a value; callables and None are left out."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
