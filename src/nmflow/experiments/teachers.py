"""The teacher of a run: a saved network, a finished run's, or the initial network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from nmflow.distill import Distiller
from nmflow.errors import ConfigError
from nmflow.experiments import architectures, models, origins
from nmflow.experiments.specs import Distill
from nmflow.inspect.pretrained import from_folder

KEY = "distill.teacher"
SELF = "self"


def distiller(told: Distill, model: nn.Module) -> Distiller:
    """The distiller that a configuration's `distill` describes, for a student before training.

    Raises:
        ConfigError: there is no such network, or it lacks weights.
    """
    teacher = copy.deepcopy(model) if told.teacher == SELF else _saved(told.teacher, model)
    return Distiller(
        teacher,
        task=told.task,
        logits=told.logits,
        hidden=told.hidden,
        temperature=told.temperature,
    )


def _saved(text: str, model: nn.Module) -> Any:
    origin = origins.locate(text, KEY)
    if Path(origin.place).is_dir() and not origin.options:
        try:
            return from_folder(Path(origin.place), (architectures,))
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error}") from None
    return models.load(text, KEY, type(model), {}, {})
