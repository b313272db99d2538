"""The teacher of a run: a saved network, a finished run's, or the network as it is at first."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from nmflow.distill import Distiller
from nmflow.errors import ConfigError
from nmflow.experiments import architectures, models, origins
from nmflow.experiments.run_folder import MODEL, RESULT
from nmflow.experiments.specs import Distill
from nmflow.inspect.pretrained import from_folder

KEY = "distill.teacher"
SELF = "self"


def distiller(told: Distill, model: nn.Module) -> Distiller:
    """What `distill` of a configuration describes, for a student that has not been trained yet.

    Raises:
        ConfigError: no such network, or one that lacks weights.
    """
    teacher = copy.deepcopy(model) if told.teacher == SELF else _saved(told.teacher, model)
    return Distiller(
        teacher,
        task=told.task,
        logits=told.logits,
        hidden=told.hidden,
        temperature=told.temperature,
    )


def place(text: str) -> str:
    """The network that `text` names: of a folder of one finished run, the run's.

    Raises:
        ConfigError: a folder of several runs, or of none that is finished.
    """
    folder = Path(text)
    if not folder.is_dir() or (folder / "model.safetensors").is_file():
        return text
    runs = [folder] if (folder / RESULT).is_file() else []
    runs += [path.parent for path in sorted(folder.glob(f"*/{RESULT}"))]
    held = [run / MODEL for run in runs if (run / MODEL).is_dir()]
    if len(held) == 1:
        return str(held[0])
    if runs or not (folder / "config.json").is_file():
        raise ConfigError(
            f"{KEY} is {text!r}: it holds {len(held)} finished runs with a network; give a "
            "network's folder, or one of a single run with training.save_model"
        )
    return text


def _saved(text: str, model: nn.Module) -> Any:
    found = place(text)
    origin = origins.locate(found, KEY)
    if Path(origin.place).is_dir() and not origin.options:
        try:
            return from_folder(Path(origin.place), (architectures,))
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error}") from None
    return models.load(found, KEY, type(model), {}, {})
