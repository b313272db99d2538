"""Networks of `transformers`, unmodified: by the name of their kind, or loaded from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from nmflow.errors import ConfigError
from nmflow.experiments import architectures  # noqa: F401 - makes `mlp-mixer` and `lstm` known
from nmflow.experiments.config_errors import near
from nmflow.experiments.specs import Model
from nmflow.inspect.checkpoints import check_shards
from nmflow.inspect.pretrained import NO_CODE


def build(model: Model, auto: Any, task_fields: Mapping[str, Any]) -> PreTrainedModel:
    """A network with the head of `auto` (such as `AutoModelForCausalLM`).

    Args:
        model: the kind and its fields, or where to load it from.
        auto: the `AutoModelFor...` class that the task needs.
        task_fields: what the task knows (vocabulary, classes, sizes); the file's fields win, and
            those that the kind does not know are dropped.

    Raises:
        ConfigError: an unknown kind or field, or values that the network refuses.
    """
    if model.load is not None:
        return _load(model, auto, task_fields)
    config = _config(str(model.kind), model.fields, task_fields)
    try:
        return auto.from_config(config, **NO_CODE)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model is {model.kind!r}: it cannot be built ({reason[:200]})") from None


def _config(
    kind: str, fields: Mapping[str, Any], task_fields: Mapping[str, Any]
) -> PretrainedConfig:
    known = check_fields(kind, fields)
    ours = {key: value for key, value in task_fields.items() if key in known}
    try:
        return AutoConfig.for_model(kind, **{**ours, **fields})
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.fields are refused by {kind}: {reason[:200]}") from None


def check_fields(kind: str, fields: Mapping[str, Any]) -> set[str]:
    """Every field of the kind's config; a ConfigError for an unknown kind or field."""
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"model.kind is {kind!r}{near(kind, list(CONFIG_MAPPING))}")
    known = known_fields(kind)
    for key in fields:
        if key not in known:
            raise ConfigError(f"unknown key 'model.fields.{key}'{near(key, sorted(known))}")
    return known


def known_fields(kind: str) -> set[str]:
    """Every field that a kind's config accepts, its aliases too (`hidden_size` of GPT-2)."""
    config = CONFIG_MAPPING[kind]
    aliases = getattr(config, "attribute_map", {})
    # `num_labels` is a property of every config, stored as `id2label`.
    return set(config().to_dict()) | set(aliases) | {"num_labels"}


def _load(model: Model, auto: Any, task_fields: Mapping[str, Any]) -> PreTrainedModel:
    if "trust_remote_code" in model.fields:
        raise ConfigError(
            "model.fields has trust_remote_code: nmflow runs no code of a saved network; leave it "
            "out, and give one of transformers' own kinds"
        )
    if model.load and Path(model.load).is_dir():
        check_shards(Path(model.load))
    labels = {k: v for k, v in task_fields.items() if k == "num_labels"}
    try:
        return auto.from_pretrained(
            model.load,
            **{**labels, **model.fields, **NO_CODE},
            ignore_mismatched_sizes=bool(labels),
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.load is {model.load!r}: {reason[:200]}") from None
