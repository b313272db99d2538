"""Unmodified networks of `transformers`: built by kind, or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from nmflow.errors import ConfigError
from nmflow.experiments import (
    architectures,  # noqa: F401 - makes `mlp-mixer` and `lstm` known
    narrower,
    origins,
)
from nmflow.experiments.config_errors import near
from nmflow.experiments.specs import Model
from nmflow.inspect.pretrained import NO_CODE


def build(model: Model, auto: Any, task_fields: Mapping[str, Any]) -> PreTrainedModel:
    """A network with the head of `auto` (such as `AutoModelForCausalLM`).

    Args:
        model: the kind and its fields, or where to load the network from.
        auto: the `AutoModelFor...` class that the task needs.
        task_fields: fields from the task (vocabulary, classes, sizes). The file's fields replace
            them, and those that the kind does not have are dropped.

    Raises:
        ConfigError: an unknown kind or field, or values that the network refuses.
    """
    if model.load is not None:
        made = load(model.load, "model.load", auto, model.fields, task_fields)
    else:
        made = _made(model, auto, task_fields)
    if model.keep_units is not None:
        narrower.keep_units(made, model.keep_units)
    return _frozen(model, made)


def _made(model: Model, auto: Any, task_fields: Mapping[str, Any]) -> PreTrainedModel:
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


def load(
    text: str, key: str, auto: Any, fields: Mapping[str, Any], task_fields: Mapping[str, Any]
) -> PreTrainedModel:
    """Load a saved network in float32, with a new head or pooler if it has none.

    Args:
        text: where it is, as `origins.locate` takes it.
        key: the key of the configuration.
        auto: the `AutoModelFor...` class that the task needs.
        fields: fields of its config from the file; a `dtype` among them is kept.
        task_fields: fields from the task; a saved network uses only the number of labels.

    Raises:
        ConfigError: there is no such network, it cannot be loaded, it needs code of its own, or it
            lacks weights of its body.
    """
    if "trust_remote_code" in fields:
        raise ConfigError(
            "model.fields has trust_remote_code: nmflow runs no code of a saved network; leave it "
            "out, and give one of transformers' own kinds"
        )
    origin = origins.locate(text, key)
    labels = {k: v for k, v in task_fields.items() if k == "num_labels"}
    try:
        made, told = auto.from_pretrained(
            origin.place,
            **{**labels, **fields, **origin.options, **NO_CODE},
            ignore_mismatched_sizes=bool(labels),
            output_loading_info=True,
        )
        # bfloat16 is too coarse for optimizer steps; GGUF is read as float32.
        if not {"dtype", "torch_dtype"} & set(fields) and "gguf_file" not in origin.options:
            made = made.float()
    except (OSError, ValueError, RuntimeError) as error:  # the last key: sizes that differ
        raise ConfigError(origins.reason(text, key, error)) from None
    fresh = sorted({*told["missing_keys"], *(row[0] for row in told["mismatched_keys"])})
    lacks = [n for n in fresh if n.startswith(f"{made.base_model_prefix}.") and "pooler" not in n]
    if lacks:
        raise ConfigError(
            f"{key} is {text!r}: it lacks {len(lacks)} weights of {type(made).__name__}, such as "
            f"{lacks[0]!r}; give a network of that kind"
        )
    return made


def _frozen(model: Model, made: PreTrainedModel) -> PreTrainedModel:
    names = dict(made.named_parameters())
    for glob in model.freeze:
        matched = [name for name in names if fnmatchcase(name, glob)]
        if not matched:
            raise ConfigError(
                f"model.freeze is {glob!r}: no parameter matches it, of names such as "
                f"{next(iter(names))!r}"
            )
        for name in matched:
            names[name].requires_grad_(False)
    return made
